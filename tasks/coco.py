"""COCO captions with Karpathy's splits, and any folder with captions in COCO's form."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.karpathy import (
    CAPTION_FEATURES,
    COCO,
    GENERATION,
    GENERATION_SOURCE,
    INSTRUCTION,
    INSTRUCTION_SOURCE,
    SPLITS_SOURCE,
    caption_line,
    caption_row,
    caption_rows,
    image_number,
)
from tasks.metrics.captions import caption_scores
from tasks.metrics.score import Row
from tasks.task import Hub, Parts, Task
from vlreft.data import files
from vlreft.data.datasets import caption_file
from vlreft.data.datasets import caption_rows as located_captions

METRIC_SOURCE = "metric: salaniz/pycocoevalcap, eval.py; CIDEr-D with the idf of the scored pictures' references"


def read_karpathy(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per caption of train, a row per picture of val and test."""
    return caption_rows(COCO.pictures(folder, part), is_training=part == "train")


def read_folder(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per caption of train, a row per picture of the others, whose captions may stand anywhere."""
    file = caption_file(folder, part)
    pictures: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    # The same file twice at once, row by row: the library's rows have the paths, the file's the ids.
    rows = zip(located_captions(folder, part), annotations(file), strict=True)
    for found, (image_id, number, text) in rows:
        path = pictures.setdefault(image_id, found["image"])
        if part == "train":
            yield caption_row(number, path, [text])
        else:
            captions.setdefault(image_id, []).append(text)
    for image_id, texts in captions.items():
        yield caption_row(str(image_id), pictures[image_id], texts)
    for where, row in files.json_rows(file, "images"):
        if row["id"] not in pictures:
            raise ValueError(f"{where}: the image {row['id']} has no caption; add one or drop the image.")


def annotations(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the image id, own id and text of a COCO file's captions. Raises: ValueError, naming file and row."""
    seen: dict[int, None] = {}
    for where, row in files.json_rows(file, "annotations"):
        number = files.value(row, "id", int, where)
        files.add(seen, number, None, where)
        yield files.value(row, "image_id", int, where), str(number), files.text(row, "caption", where).strip()


def folder_files(folder: Path, part: str) -> list[Path]:
    """Return the part's file."""
    return [caption_file(folder, part)]


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's val2017, whose `question_id` is the picture's file name."""
    name = row["question_id"]
    captions = [caption.strip() for caption in row["answer"]]
    return caption_row(image_number(name, f"the hub's row {name}"), row["image"], captions)


KARPATHY = Task(
    name="coco",
    title="COCO captions, Karpathy's splits: CIDEr over five or more references",
    kind="generate",
    parts=Parts(train="train", dev="val", tests=("test",)),
    features=CAPTION_FEATURES,
    read=read_karpathy,
    files=COCO.paths,
    metric=caption_scores,
    line=caption_line,
    prompt=INSTRUCTION,
    generation=GENERATION,
    sources=(
        "data: https://cocodataset.org, train2014 and val2014, with dataset_coco.json",
        SPLITS_SOURCE,
        f"{INSTRUCTION_SOURCE} (its own coco_karpathy tasks say 'Describe the image briefly.' instead)",
        GENERATION_SOURCE,
        METRIC_SOURCE,
    ),
)
FOLDER = Task(
    name="captions",
    title="captions in COCO's form from any folder, or COCO's val2017: CIDEr over all references",
    kind="generate",
    parts=Parts(train="train", dev="dev", tests=("test",)),
    features=CAPTION_FEATURES,
    read=read_folder,
    files=folder_files,
    metric=caption_scores,
    line=caption_line,
    hub=Hub("lmms-lab/COCO-Caption2017", {"test": "val"}, from_hub),
    prompt=INSTRUCTION,
    generation=GENERATION,
    sources=(
        "data: https://cocodataset.org/#format-data (captions) and #format-results; on the hub, test is val2017",
        INSTRUCTION_SOURCE,
        GENERATION_SOURCE,
        METRIC_SOURCE,
    ),
)
TASKS = (KARPATHY, FOLDER)
