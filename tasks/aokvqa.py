"""A-OKVQA: questions about COCO's pictures that need world knowledge, with ten direct answers and four choices each."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from tasks.metrics.answers import aokvqa_accuracy
from tasks.metrics.score import Row
from tasks.reading import GENERATION, SHORT, SHORT_SOURCE, choice, commonest, entry, pictures, texts
from tasks.task import VQA_FEATURES, Hub, Parts, Task
from vlreft.data import files

# What the metric reads besides the references: the choices, the right one, and whether direct answers do not count.
FEATURES = VQA_FEATURES | {
    "choices": datasets.List(datasets.Value("string")),
    "correct": datasets.Value("string"),
    "difficult_direct_answer": datasets.Value("bool"),
}


def find(folder: Path, part: str) -> list[Path]:
    """Return the part's file: of `train` or `val`."""
    name = f"aokvqa_v1p0_{part}.json"
    return [files.find_file(folder, name, f"aokvqa/{name}")]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file."""
    (file,) = find(folder, part)
    home = pictures(folder, f"{part}2017", f"coco/{part}2017", f"images/{part}2017", "images")
    seen: dict[str, None] = {}
    for where, row in files.json_rows(file):
        files.add(seen, files.text(row, "question_id", where), None, where)
        if files.text(row, "split", where) != part:
            raise ValueError(f"{where}: 'split' (={row['split']!r}) is not {part!r}, the file's; mend it.")
        image_id = files.value(row, "image_id", int, where)
        image = home.numbered(image_id, where)
        files.text(row, "question", where)
        files.value(row, "difficult_direct_answer", bool, where)
        correct = choice(texts(row, "choices", where), files.value(row, "correct_choice_idx", int, where), where)
        yield columns(row, str(image), texts(row, "direct_answers", where), correct, where)


def columns(row: Row, image: Any, answers: list[str], correct: str, where: str) -> dict[str, Any]:
    """Make the task's row of the file's or the hub's."""
    made = entry(row["question_id"], image, row["question"], commonest(answers, where), answers)
    flag = row["difficult_direct_answer"]
    return made | {"choices": list(row["choices"]), "correct": correct, "difficult_direct_answer": flag}


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set, which has the direct answers as a text of a Python list."""
    where = f"the hub's question {row['question_id']}"
    answers = row["direct_answers"]
    answers = ast.literal_eval(answers) if isinstance(answers, str) else answers
    return columns(row, row["image"], answers, choice(row["choices"], row["correct_choice_idx"], where), where)


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the predictions file; remap_predictions.py finds the choice for an answer that is none."""
    return {row["id"]: {"direct_answer": answer, "multiple_choice": answer}}


TASK = Task(
    name="aokvqa",
    title="A-OKVQA: questions that need world knowledge, direct answers scored against ten",
    kind="generate",
    parts=Parts(train="train", tests=("val",), num_dev=1000),
    features=FEATURES,
    read=read,
    files=find,
    metric=aokvqa_accuracy,
    line=line,
    hub=Hub("HuggingFaceM4/A-OKVQA", {"train": "train", "val": "validation"}, from_hub),
    prompt="{question}\n" + SHORT,
    generation=GENERATION,
    sources=(
        "data: allenai/aokvqa, README.md (aokvqa_v1p0.tar.gz), pictures of COCO 2017",
        SHORT_SOURCE,
        "metric: allenai/aokvqa, evaluation/eval_predictions.py (direct answers; difficult ones are left out)",
        "test: val (1,145 questions); the answers of test are not public",
        "dev: 1,000 questions cut from train by the run's seed, whole pictures",
    ),
)
