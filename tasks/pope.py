"""POPE: is an object in the picture, yes or no; three ways to choose the objects that are not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from tasks.metrics.answers import pope_scores
from tasks.metrics.score import Row
from tasks.reading import GENERATION, SHORT, SHORT_SOURCE, entry, pictures
from tasks.task import VQA_FEATURES, Hub, Parts, Task
from vlreft.data import files

CATEGORIES = ("random", "popular", "adversarial")


def find(folder: Path, part: str) -> list[Path]:
    """Return the part's file: of `random`, `popular` or `adversarial`."""
    name = f"coco_pope_{part}.json"
    return [files.find_file(folder, name, f"coco/{name}", f"output/coco/{name}")]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file, a JSON object a line."""
    (file,) = find(folder, part)
    home = pictures(folder, "val2014", "images/val2014", "images")
    seen: dict[int, None] = {}
    for where, row in files.json_lines(file):
        name = files.value(row, "question_id", int, where)
        files.add(seen, name, None, where)
        label = files.text(row, "label", where)
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: 'label' (={label!r}) must be 'yes' or 'no'.")
        image = home.named(where, files.text(row, "image", where))
        yield entry(name, str(image), files.text(row, "text", where), label, [label]) | {"category": part}


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set."""
    answer = row["answer"].strip().lower()
    columns = entry(row["question_id"], row["image"], row["question"].strip(), answer, [answer])
    return columns | {"category": row["category"]}


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make a line of the answers file, which has the questions' order."""
    return {"question": row["question"], "answer": answer}


TASK = Task(
    name="pope",
    title="POPE: is an object in the picture; F1, mean over the three ways to choose absent objects",
    kind="generate",
    parts=Parts(train_on="vqav2", tests=CATEGORIES),
    features=VQA_FEATURES | {"category": datasets.Value("string")},
    read=read,
    files=find,
    metric=pope_scores,
    line=line,
    hub=Hub("lmms-lab-encoder/POPE", {name: name for name in CATEGORIES}, from_hub, "Full"),
    prompt="{question}\n" + SHORT,
    generation=GENERATION,
    sources=(
        "data: RUCAIBox/POPE, output/coco/coco_pope_*.json, pictures of COCO val2014",
        SHORT_SOURCE,
        "metric and reading of answers: RUCAIBox/POPE, evaluate.py; the mean F1 of the three as LLaVA-1.5's tables",
        "training: POPE has no training data; models are trained on VQAv2's train, whose pictures are of train2014",
    ),
)
