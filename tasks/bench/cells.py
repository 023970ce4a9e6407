"""The table of cells: what is compared, on which workload, and what one round does. A new one is a row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from tasks.bench.measure import Side
from tasks.bench.sides import (
    ANSWER_LORA,
    CAREFUL_LORA,
    FLOOR,
    FORWARD,
    GROUPED,
    KEPT,
    LORA,
    LORA_FEATURES,
    PLAIN,
    REFT,
    REUSE,
    REUSE_FEATURES,
    UNMERGED_LORA,
    WIDE_LORA,
    attaching,
    attachment,
    by_row,
    features,
    first_step,
    generation,
    grouped,
    growth,
    importing,
    kept,
    orthonormal,
    own_cost,
    reuse,
    saved,
)
from tasks.bench.true_shape import (
    ALONE,
    COMPILED_EDITS,
    COMPILED_FLOOR,
    COMPILED_REFT,
    EDITS,
    NEW_PICTURE,
    PRODUCTS,
    SAME_PICTURE,
    TOGETHER,
    compiled,
    edits_alone,
    peaks,
    questions,
)
from tasks.bench.workloads import Setup, Shape


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    claim: what one round does. ratios: (of, to), taken round by round. unit: "ms" is timed here; numbers in other units
    are what the sides return. same_loss: the sides return losses, which must agree at the start. sweep: the field of
    `Shape` that runs through `values`. peer: what the peers' worker calls it, "" where they are not asked.
    """

    name: str
    workload: str
    claim: str
    build: Callable[[Setup, Shape], list[Side]]
    ratios: tuple[tuple[str, str], ...]
    num_rounds: int
    unit: Literal["ms", "s", "MB"] = "ms"
    same_loss: bool = False
    needs_gpu: bool = False
    sweep: str = ""
    values: tuple[int, ...] = ()
    peer: str = ""


AGAINST_FLOOR = ((REFT, FLOOR), (LORA, FLOOR), (WIDE_LORA, FLOOR))
AGAINST_REUSE = (
    (LORA, REUSE),
    (ANSWER_LORA, REUSE),
    (LORA, PLAIN),
    (PLAIN, REUSE),
    (REUSE, FORWARD),
    (PLAIN, FLOOR),
    (LORA, FLOOR),
)
AGAINST_GROUPED = ((LORA, GROUPED), (ANSWER_LORA, GROUPED))
AGAINST_KEPT = ((LORA, KEPT), (CAREFUL_LORA, KEPT))
CACHED = ((LORA_FEATURES, REUSE_FEATURES), (REUSE, REUSE_FEATURES))
SAVED = ((LORA, REUSE), (ANSWER_LORA, REUSE), (LORA, PLAIN), (LORA, FLOOR))
FIRST = tuple((f"{name}: first", f"{name}: later") for name in (REFT, LORA))
GENERATED = ((REFT, "base"), (UNMERGED_LORA, "base"))
GROWN = ((LORA, PLAIN), (LORA, REUSE), (LORA, KEPT))
BY_ROW = tuple((f"{name}, by row", f"{name}, one adapter") for name in ("forward", "generate"))
NARROWED = ((REFT, FLOOR), (LORA, FLOOR))
IMPORTED = (("peft", "vlreft: attach, load, Collator"),)
ORTHONORMAL = (("torch parametrizations.orthogonal, read once", "vlreft, all at once"),)
PEAKS = ((LORA, PLAIN), (LORA, REUSE), (ANSWER_LORA, REUSE), (LORA, KEPT))
ASKED = ((ALONE, NEW_PICTURE), (TOGETHER, NEW_PICTURE), (ALONE, SAME_PICTURE))
COMPILED = ((REFT, COMPILED_REFT), (FLOOR, COMPILED_FLOOR), (COMPILED_REFT, COMPILED_FLOOR))
EDITED = ((EDITS, PRODUCTS), (COMPILED_EDITS, PRODUCTS))
_STEP = "forward and backward through the trainer, no optimizer step"
_IMAGES = f"{_STEP}, images all different, the tower counted on both sides"
_SEEN, _ONE_IMAGE = f"{_STEP}, images all different, seen before", f"{_STEP}, five questions about one image"
_ASKED = "five questions about one picture, greedy"
_FIRST, _ATTACH = "the first step of a new trainer, a later one", "on a base in memory"

_large = partial(Cell, needs_gpu=True)

CELLS: tuple[Cell, ...] = (
    Cell("step", "thin", _STEP, own_cost, AGAINST_FLOOR, 40, same_loss=True, peer="step"),
    Cell("reuse", "llava", _IMAGES, reuse, AGAINST_REUSE, 4, same_loss=True),
    Cell("kept", "llava", _SEEN, kept, AGAINST_KEPT, 6, same_loss=True),
    Cell("grouped", "llava", _ONE_IMAGE, grouped, AGAINST_GROUPED, 8, same_loss=True),
    Cell("features", "llava", _SEEN, features, CACHED, 4, same_loss=True),
    Cell("memory", "llava", "saved for the backward pass", saved, SAVED, 1, "MB"),
    Cell("questions", "llava", _ASKED, questions, ASKED, 4),
    Cell("first", "thin", _FIRST, first_step, FIRST, 10, same_loss=True),
    Cell("first", "llava", _FIRST, first_step, FIRST, 2, same_loss=True),
    Cell("generate", "generate", "greedy, left-padded, a cache", generation, GENERATED, 8, peer="generate"),
    Cell("by_row", "generate", "8 rows: one adapter, or 4 and 2 rows without", by_row, BY_ROW, 8),
    Cell("attach", "thin", _ATTACH, attaching, ((LORA, REFT),), 15, peer="attach"),
    Cell(
        "attachment",
        "wide",
        "memory and size of what is attached",
        attachment,
        (
            ("peak of attaching, untied", "its numbers, by arithmetic"),
            ("checkpoint, tied", "tied numbers, by arithmetic"),
        ),
        1,
        "MB",
    ),
    Cell("import", "import", "in a new process", importing, IMPORTED, 3, "s", peer="import"),
    Cell("orthonormal", "orthonormal", "forward and backward of all R", orthonormal, ORTHONORMAL, 5),
    Cell(
        "tokens",
        "llava-small",
        _IMAGES,
        partial(growth, with_plain=True),
        GROWN,
        3,
        same_loss=True,
        sweep="num_image_tokens",
        values=(64, 256, 1024, 4096),
    ),
    Cell(
        "rows",
        "llava-small",
        _IMAGES,
        partial(growth, with_plain=True),
        GROWN,
        5,
        same_loss=True,
        sweep="num_rows",
        values=(1, 2, 4, 8, 16),
    ),
    Cell(
        "layers",
        "thin",
        _STEP,
        partial(growth, with_plain=False),
        NARROWED,
        15,
        same_loss=True,
        sweep="num_edited",
        values=(1, 2, 4, 8),
    ),
    Cell(
        "rank",
        "thin",
        _STEP,
        partial(growth, with_plain=False),
        NARROWED,
        15,
        same_loss=True,
        sweep="rank",
        values=(1, 4, 16, 64),
    ),
    # At LLaVA-1.5-7B's true shape. Those that share a base stand together.
    _large("reuse", "llava-7b", _IMAGES, reuse, AGAINST_REUSE, 5, same_loss=True),
    _large("peak", "llava-7b", "the most memory of a step, weights and all", peaks, PEAKS, 1, "MB"),
    _large("grouped", "llava-7b", _ONE_IMAGE, grouped, AGAINST_GROUPED, 5, same_loss=True),
    _large("kept", "llava-7b", _SEEN, kept, AGAINST_KEPT, 5, same_loss=True),
    _large("features", "llava-7b", _SEEN, features, CACHED, 5, same_loss=True),
    _large("memory", "llava-7b", "saved for the backward pass", saved, SAVED, 1, "MB"),
    _large(
        "dense", "llava-7b-dense", f"{_STEP}, edits on all image tokens", own_cost, AGAINST_FLOOR, 5, same_loss=True
    ),
    _large("edits", "llava-7b-dense", "forward and backward of the edits alone", edits_alone, EDITED, 9),
    _large("generate", "llava-7b-generate", "greedy, left-padded, a cache, pictures", generation, GENERATED, 3),
    _large("questions", "llava-7b-questions", _ASKED, questions, ASKED, 3),
    _large("attach", "llava-7b", _ATTACH, attaching, ((LORA, REFT),), 3),
    _large("first", "llava-7b", _FIRST, first_step, FIRST, 3, same_loss=True),
    _large(
        "tokens",
        "llava-7b-tokens",
        _IMAGES,
        partial(growth, with_plain=True),
        GROWN,
        3,
        same_loss=True,
        sweep="num_image_tokens",
        values=(64, 256, 1024, 4096),
    ),
    _large("compile", "llava-7b-short", "forward and backward of the model, no trainer", compiled, COMPILED, 5),
)


def shapes(cell: Cell, workloads: Mapping[str, Shape], num_values: int = 0) -> list[tuple[int | None, Shape]]:
    """Return each value of a cell's sweep with its shape, `num_values` of them if that is not 0; else (None, shape)."""
    shape = workloads[cell.workload]
    values = cell.values[: num_values or None]
    return [(value, replace(shape, **{cell.sweep: value})) for value in values] or [(None, shape)]
