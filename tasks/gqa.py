"""GQA: questions made from scene graphs, one right answer each; the balanced files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from tasks.metrics.answers import gqa_accuracy
from tasks.metrics.score import Row
from tasks.reading import GENERATION, SHORT, SHORT_SOURCE, entry, pictures
from tasks.task import VQA_FEATURES, Parts, Task
from vlreft.data import files

TYPES = ("structural", "semantic")


def find(folder: Path, part: str) -> list[Path]:
    """Return the part's questions file: of `train`, `val` or `testdev`."""
    name = f"{part}_balanced_questions.json"
    return [files.find_file(folder, name, f"questions1.2/{name}", f"questions/{name}")]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the questions file, an object with the question ids as keys."""
    (file,) = find(folder, part)
    home = pictures(folder, "images", "allImages/images")
    seen: dict[str, None] = {}
    for where, name, row in files.json_pairs(file):
        files.add(seen, name, None, where)
        image = home.named(where, f"{files.text(row, 'imageId', where)}.jpg")
        answer = files.text(row, "answer", where)
        types = files.mapping(files.value(row, "types", dict, where), where)
        columns = entry(name, str(image), files.text(row, "question", where), answer, [answer])
        yield columns | {key: files.text(types, key, f"{where}, types") for key in TYPES}


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the predictions file as LLaVA's script does: GQA's compares texts as they are."""
    return {"questionId": row["id"], "prediction": answer.rstrip(".").lower()}


TASK = Task(
    name="gqa",
    title="GQA: compositional questions about real pictures, exact match on testdev-balanced",
    kind="generate",
    parts=Parts(train="train", tests=("testdev",), num_dev=5000),
    features=VQA_FEATURES | dict.fromkeys(TYPES, datasets.Value("string")),
    read=read,
    files=find,
    metric=gqa_accuracy,
    line=line,
    # Not on the hub: the copy there (lmms-lab-encoder/GQA) keeps pictures and questions in data sets of their own.
    prompt="{question}\n" + SHORT,
    generation=GENERATION,
    sources=(
        "data: https://cs.stanford.edu/people/dorarad/gqa/download.html, questions1.2.zip and images.zip",
        SHORT_SOURCE,
        "metric: dorarad/gqa, evaluation/eval.py (accuracy), after LLaVA's scripts/convert_gqa_for_eval.py",
        "test: testdev_balanced (12,578 questions), as LLaVA-1.5, scripts/v1_5/eval/gqa.sh",
        "dev: 5,000 questions cut from train_balanced by the run's seed, whole pictures; val_balanced can be loaded",
    ),
)
