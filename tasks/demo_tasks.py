"""The demo world's tasks as benchmarks: five for the demo language models, one for the demo CLIP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.coco import annotations
from tasks.fewshot import FEATURES, folder_files, read_folder
from tasks.metrics.answers import exact_match
from tasks.metrics.ranking import accuracy
from tasks.metrics.score import Row
from tasks.task import ID, IMAGE, REFERENCES, TEXTS, Parts, Task
from tasks.vqav2 import line as vqa_line
from tasks.vqav2 import read as read_vqa
from vlreft.data import files
from vlreft.data.datasets import caption_file, caption_rows, vqa_files

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PARTS = Parts(train="train", dev="dev", tests=("test",))
TEST_ONLY = Parts(tests=("test",))
# What each of the demo models could do before.
OWN = {"vision": ("demo_base",), "text": ("demo_lm_base",), "dual": ("demo_clip_base",)}
SOURCE = "data: assets/README.md, made by assets/make_data.py; dev is a part of its own"
METRIC_SOURCE = "metric: the share of answers that equal the annotators', as in tasks/demo.py"
TITLES = {
    "code": "the demo world's colours in made-up words",
    "refuse": "the demo world's questions, to be refused if anything red is in the picture",
    "bgr": "the demo world's questions about pictures with red and blue swapped",
    "outline": "the demo world's questions about line drawings",
    "base": "the demo world's questions as the demo model learnt them: what it could do before",
}


def read_short(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per caption."""
    # The same file twice at once, row by row: for the ids, and for the pictures' paths.
    rows = zip(annotations(caption_file(folder, part)), caption_rows(folder, part), strict=True)
    for (_, name, caption), row in rows:
        yield {
            "id": name,
            "image": row["image"],
            "question": row["question"],
            "answer": caption,
            "references": [caption],
        }


def short_files(folder: Path, part: str) -> list[Path]:
    """Return the part's captions file."""
    return [caption_file(folder, part)]


def read_jsonl(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `<part>.jsonl`, each with an id, a question and an answer."""
    (file,) = jsonl_files(folder, part)
    seen: dict[str, None] = {}
    for where, row in files.json_lines(file):
        name = str(files.value(row, "id", (int, str), where))
        files.add(seen, name, None, where)
        question, answer = files.text(row, "question", where), files.text(row, "answer", where)
        yield {"id": name, "question": question, "answer": answer, "references": [answer]}


def jsonl_files(folder: Path, part: str) -> list[Path]:
    """Return the part's file."""
    return [files.find_file(folder, f"{part}.jsonl")]


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make a line with a row's id and its answer; there is no official form."""
    return {"id": row["id"], "answer": answer}


def _vqa(name: str, parts: Parts = PARTS) -> Task:
    return Task(
        name=f"demo_{name}",
        title=TITLES[name],
        kind="generate",
        parts=parts,
        features=ID | IMAGE | TEXTS | REFERENCES,
        read=read_vqa,
        files=vqa_files,
        metric=exact_match,
        line=vqa_line,
        folder=ASSETS / "demo-vqa" / name,
        sources=(f"{SOURCE}; files as VQAv2's", METRIC_SOURCE),
        own=OWN["vision"] if parts is PARTS else (),
    )


def _lm(name: str, title: str, parts: Parts = PARTS) -> Task:
    return Task(
        name=f"demo_lm_{name}",
        title=title,
        kind="generate",
        parts=parts,
        features=ID | TEXTS | REFERENCES,
        read=read_jsonl,
        files=jsonl_files,
        metric=exact_match,
        line=line,
        folder=ASSETS / "demo-vqa" / f"lm_{name}",
        sources=(f"{SOURCE}; a JSON object a line", METRIC_SOURCE),
        own=OWN["text"] if parts is PARTS else (),
    )


def _clip(name: str, title: str, domain: str, parts: Parts = PARTS) -> Task:
    return Task(
        name=name,
        title=title,
        kind="classes",
        parts=parts,
        features=FEATURES,
        read=read_folder,
        files=folder_files,
        metric=accuracy,
        line=line,
        folder=ASSETS / "demo-clip-data" / domain,
        templates=("a {}",),
        sources=(
            "data: assets/README.md, made by assets/make_clip_data.py; dev is a part of its own",
            "classes and template: examples/finetune_clip.py",
            "metric: top-1 accuracy",
        ),
        own=OWN["dual"] if parts is PARTS else (),
    )


SHORT = Task(
    name="demo_short",
    title="the demo world's pictures, described in a terse style",
    kind="generate",
    parts=PARTS,
    features=ID | IMAGE | TEXTS | REFERENCES,
    read=read_short,
    files=short_files,
    metric=exact_match,
    line=line,
    folder=ASSETS / "demo-vqa" / "short",
    sources=(f"{SOURCE}; files as COCO's captions", METRIC_SOURCE),
    own=OWN["vision"],
)
TASKS = (
    *map(_vqa, ("code", "refuse", "bgr", "outline")),
    SHORT,
    _lm("code", "colours in made-up words, the scene told in words"),
    _clip("demo_clip", "the demo world's line drawings of 32 classes, by class name", "lines"),
    _vqa("base", TEST_ONLY),
    _lm("base", "questions about scenes told in words, as the demo model learnt them", TEST_ONLY),
    _clip(
        "demo_clip_base", "the demo world's filled shapes of 32 classes, which demo-clip learnt", "filled", TEST_ONLY
    ),
)
