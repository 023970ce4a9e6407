"""VizWiz: questions that blind people asked about their own pictures, with ten answers each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.metrics.score import Row
from tasks.metrics.vqa import vqa_accuracy
from tasks.reading import GENERATION, SHORT, answers_of, commonest, entry, pictures
from tasks.task import VQA_FEATURES, Hub, Parts, Task
from vlreft.data import files

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def find(folder: Path, part: str) -> list[Path]:
    """Return the part's file: of `train` or `val`."""
    return [files.find_file(folder, f"{part}.json", f"Annotations/{part}.json")]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file; the picture's name is the id, as each picture has one question."""
    (file,) = find(folder, part)
    home = pictures(folder, part, f"images/{part}", "images")
    seen: dict[str, None] = {}
    for where, row in files.json_rows(file):
        name = files.text(row, "image", where)
        files.add(seen, name, None, where)
        answers = answers_of(row, where)
        image, question = str(home.named(where, name)), files.text(row, "question", where)
        yield entry(name, image, question, commonest(answers, where), answers)


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set, whose ids are the pictures' names without `.jpg`."""
    name, answers = f"{row['question_id']}.jpg", row["answers"]
    return entry(name, row["image"], row["question"], commonest(answers, f"the hub's {name}"), answers)


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the challenge's predictions file."""
    return {"image": row["id"], "answer": answer}


TASK = Task(
    name="vizwiz",
    title="VizWiz: blind people's questions about their pictures, soft accuracy over ten answers",
    kind="generate",
    parts=Parts(train="train", tests=("val",), num_dev=1000),
    features=VQA_FEATURES,
    read=read,
    files=find,
    metric=vqa_accuracy("evalai"),
    line=line,
    hub=Hub("lmms-lab-encoder/VizWiz-VQA", {"val": "val"}, from_hub),
    prompt=f"{{question}}\n{UNANSWERABLE}\n{SHORT}",
    generation=GENERATION,
    sources=(
        "data: https://vizwiz.org/tasks-and-datasets/vqa, Annotations.zip, train.zip and val.zip",
        "prompt: LLaVA-1.5, as lmms-eval, tasks/vizwiz_vqa/_default_template_vqa_yaml has it; greedy, 16 new tokens",
        "metric and normaliser: LLaVA, llava/eval/m4c_evaluator.py, the EvalAI server's",
        "test: val (4,319 questions); the answers of test are not public",
        "dev: 1,000 questions cut from train by the run's seed",
    ),
)
