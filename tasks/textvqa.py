"""TextVQA: questions about text in pictures, with ten answers each; no OCR tokens are given to the model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.metrics.score import Row
from tasks.metrics.vqa import vqa_accuracy
from tasks.reading import GENERATION, SHORT, SHORT_SOURCE, commonest, entry, pictures, texts
from tasks.task import VQA_FEATURES, Hub, Parts, Task
from vlreft.data import files


def find(folder: Path, part: str) -> list[Path]:
    """Return the part's file: of `train` or `val`."""
    return [files.find_file(folder, f"TextVQA_0.5.1_{part}.json")]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file; the pictures of both parts are in one folder."""
    (file,) = find(folder, part)
    home = pictures(folder, "train_images", "train_val_images/train_images", "images")
    seen: dict[int, None] = {}
    for where, row in files.json_rows(file, "data"):
        name = files.value(row, "question_id", int, where)
        files.add(seen, name, None, where)
        image = home.named(where, f"{files.text(row, 'image_id', where)}.jpg")
        answers = texts(row, "answers", where)
        yield entry(name, str(image), files.text(row, "question", where), commonest(answers, where), answers)


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set."""
    answers = row["answers"]
    where = f"the hub's question {row['question_id']}"
    return entry(row["question_id"], row["image"], row["question"], commonest(answers, where), answers)


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the challenge's predictions file."""
    return {"question_id": int(row["id"]), "answer": answer}


TASK = Task(
    name="textvqa",
    title="TextVQA: questions about text in pictures, soft accuracy over ten answers",
    kind="generate",
    parts=Parts(train="train", tests=("val",), num_dev=2000),
    features=VQA_FEATURES,
    read=read,
    files=find,
    metric=vqa_accuracy("evalai"),
    line=line,
    hub=Hub("lmms-lab-encoder/textvqa", {"train": "train", "val": "validation"}, from_hub),
    prompt="{question}\n" + SHORT,
    generation=GENERATION,
    sources=(
        "data: https://textvqa.org/dataset (0.5.1), train_val_images.zip",
        f"{SHORT_SOURCE}. LLaVA-1.5's own figure adds OCR tokens to the question (scripts/v1_5/eval/textvqa.sh); "
        "this one has none",
        "metric and normaliser: LLaVA, llava/eval/m4c_evaluator.py, the EvalAI server's",
        "test: val (5,000 questions); the answers of test are not public",
        "dev: 2,000 questions cut from train by the run's seed, whole pictures",
    ),
)
