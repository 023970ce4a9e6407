"""Image-text retrieval on COCO and Flickr30k, Karpathy's splits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.karpathy import COCO, FLICKR30K, PAIR_FEATURES, SPLITS_SOURCE, KarpathyFile, pair_rows
from tasks.metrics.ranking import recall_at_k
from tasks.metrics.score import Row
from tasks.task import Parts, Task

NUM_CAPTIONS = 5  # of a picture, of those that are scored
PARTS = Parts(train="train", dev="val", tests=("test",))
METRIC_SOURCE = (
    "metric: LAION-AI/CLIP_benchmark, clip_benchmark/metrics/zeroshot_retrieval.py: the share of queries with at least "
    "one true match among the first k"
)


def read_coco(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per caption; of val and test, of the first five of each picture."""
    return _rows(COCO, folder, part)


def read_flickr30k(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per caption; of val and test, of the first five of each picture."""
    return _rows(FLICKR30K, folder, part)


def _rows(file: KarpathyFile, folder: Path, part: str) -> Iterator[dict[str, Any]]:
    return pair_rows(file.pictures(folder, part), None if part == "train" else NUM_CAPTIONS)


def line(row: Row, answer: Any) -> dict[str, Any]:
    """Make a line with a caption's ids and its answer; there is no official form."""
    return {"id": row["id"], "image_id": row["image_id"], "answer": answer}


COCO_TASK = Task(
    name="coco_retrieval",
    title="COCO image-text retrieval, Karpathy's 5,000 test pictures: recall at 1, 5 and 10",
    kind="pairs",
    parts=PARTS,
    features=PAIR_FEATURES,
    read=read_coco,
    files=COCO.paths,
    metric=recall_at_k,
    line=line,
    sources=(
        "data: https://cocodataset.org, train2014 and val2014, with dataset_coco.json",
        SPLITS_SOURCE,
        "captions: the first five of each val and test picture (25,000 for test), as in fartashf/vsepp and after it. "
        "CLIP_benchmark and the papers after ALBEF cut nothing: all 25,010 of the test split",
        METRIC_SOURCE,
    ),
)
FLICKR30K_TASK = Task(
    name="flickr30k_retrieval",
    title="Flickr30k image-text retrieval, Karpathy's 1,000 test pictures: recall at 1, 5 and 10",
    kind="pairs",
    parts=PARTS,
    features=PAIR_FEATURES,
    read=read_flickr30k,
    files=FLICKR30K.paths,
    metric=recall_at_k,
    line=line,
    sources=(
        "data: https://shannon.cs.illinois.edu/DenotationGraph, flickr30k-images, with dataset_flickr30k.json",
        f"{SPLITS_SOURCE}; here 29,000 / 1,014 / 1,000 pictures of five captions each",
        METRIC_SOURCE,
    ),
)
TASKS = (COCO_TASK, FLICKR30K_TASK)
