"""NoCaps: captions of pictures with objects that COCO's captions do not name, by domain."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from tasks.coco import annotations
from tasks.karpathy import (
    CAPTION_FEATURES,
    GENERATION,
    GENERATION_SOURCE,
    INSTRUCTION,
    INSTRUCTION_SOURCE,
    caption_line,
    caption_row,
)
from tasks.metrics.captions import caption_scores
from tasks.metrics.score import Row, Score, check_lengths
from tasks.task import Hub, Parts, Task
from vlreft.data import files
from vlreft.data.files import Pictures

DOMAINS = ("in-domain", "near-domain", "out-domain")
PLACES = ("val", "validation", "images/val", "images", ".")


def data_files(folder: Path, part: str) -> list[Path]:
    """Return the file of the one part."""
    return [
        files.find_file(folder, f"nocaps_{part}_4500_captions.json", f"annotations/nocaps_{part}_4500_captions.json")
    ]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per picture, with its domain; its captions may stand anywhere in the file."""
    (file,) = data_files(folder, part)
    captions: dict[int, list[str]] = {}
    for image_id, _, text in annotations(file):
        captions.setdefault(image_id, []).append(text)
    pictures = Pictures(files.first_with_pictures(folder / place for place in PLACES))
    seen: dict[int, None] = {}
    for where, row in files.json_rows(file, "images"):
        image_id, name = files.value(row, "id", int, where), files.text(row, "file_name", where)
        files.add(seen, image_id, None, where)
        if image_id not in captions:
            raise ValueError(f"{where}: the image {image_id} has no caption; add one or drop the image.")
        image = str(pictures.named(where, name))
        yield {**caption_row(str(image_id), image, captions[image_id]), "domain": _domain(row, where)}
    for where, row in files.json_rows(file, "annotations"):
        if row["image_id"] not in seen:
            raise ValueError(f"{where}: the annotation is for image {row['image_id']}, which `images` lacks; add it.")


def _domain(row: Row, where: str) -> str:
    domain = files.text(row, "domain", where)
    if domain not in DOMAINS:
        raise ValueError(f"{where}: 'domain' (={domain!r}) must be one of {list(DOMAINS)}.")
    return domain


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set, which leaves out the domains."""
    captions = [caption.strip() for caption in row["annotations_captions"]]
    return {**caption_row(str(row["image_id"]), row["image"], captions), "domain": ""}


def nocaps_scores(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score all pictures together, then the CIDEr of each domain as a set of its own, with its own idf."""
    check_lengths(answers, rows)
    parts: dict[str, float] = {}
    for domain in DOMAINS:
        places = [place for place, row in enumerate(rows) if row["domain"] == domain]
        if places:
            part = caption_scores([answers[place] for place in places], [rows[place] for place in places])
            parts[f"{domain} {part.name}"] = part.value
    score = caption_scores(answers, rows)
    by_domain = "each domain by the idf of its own references" if parts else "no domains known"
    return replace(score, parts={**score.parts, **parts}, over=f"{score.over}; {by_domain}")


TASK = Task(
    name="nocaps",
    title="NoCaps val: captions of novel objects, CIDEr over ten references, in all and by domain",
    kind="generate",
    # Its rules allow no other captions to train on than COCO's; the test captions are not public.
    parts=Parts(train_on="coco", tests=("val",)),
    features=CAPTION_FEATURES | {"domain": datasets.Value("string")},
    read=read,
    files=data_files,
    metric=nocaps_scores,
    line=caption_line,
    hub=Hub("lmms-lab/NoCaps", {"val": "validation"}, from_hub),
    prompt=INSTRUCTION,
    generation=GENERATION,
    sources=(
        "data: https://nocaps.org/download, nocaps_val_4500_captions.json (Agrawal et al. 2019, section 3)",
        INSTRUCTION_SOURCE,
        GENERATION_SOURCE,
        "metric: salaniz/pycocoevalcap, eval.py. The server reports in-domain, near-domain, out-domain and entire "
        "(nocaps-org/updown-baseline, updown/utils/evalai.py); its code is not public. A domain is scored here as a "
        "set of its own, as the scripts that evaluate val by one annotation file per domain do",
    ),
)
