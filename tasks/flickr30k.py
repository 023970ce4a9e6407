"""Flickr30k captions with Karpathy's splits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.coco import METRIC_SOURCE
from tasks.karpathy import (
    CAPTION_FEATURES,
    FLICKR30K,
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


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per caption of train, a row per picture of val and test."""
    return caption_rows(FLICKR30K.pictures(folder, part), is_training=part == "train")


def from_hub(row: Row) -> dict[str, Any]:
    """Read a picture's row of the hub's data set."""
    name = row["filename"]
    captions = [caption.strip() for caption in row["caption"]]
    return caption_row(image_number(name, f"the hub's row {name}"), row["image"], captions)


TASK = Task(
    name="flickr30k",
    title="Flickr30k captions, Karpathy's splits: CIDEr over five references",
    kind="generate",
    parts=Parts(train="train", dev="val", tests=("test",)),
    features=CAPTION_FEATURES,
    read=read,
    files=FLICKR30K.paths,
    metric=caption_scores,
    line=caption_line,
    # Train has a row per picture there, not per caption. lmms-lab/flickr30k has no splits: its "test" is all pictures.
    hub=Hub("umaru97/flickr30k_train_val_test", {"val": "val", "test": "test"}, from_hub),
    prompt=INSTRUCTION,
    generation=GENERATION,
    sources=(
        "data: https://shannon.cs.illinois.edu/DenotationGraph, flickr30k-images, with dataset_flickr30k.json",
        f"{SPLITS_SOURCE}; here 29,000 / 1,014 / 1,000 pictures",
        INSTRUCTION_SOURCE,
        GENERATION_SOURCE,
        f"{METRIC_SOURCE}; lmms-eval's flickr30k_test scores all 31,783 pictures and is another number",
    ),
)
