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
NARROWED = ((REFT, FLOOR), (LORA, FLOOR))
IMPORTED = (("peft", "vlreft: attach, load, Collator"),)
ORTHONORMAL = (("torch parametrizations.orthogonal, read once", "vlreft, all at once"),)
_STEP = "forward and backward through the trainer, no optimizer step"
_IMAGES = f"{_STEP}, images all different, the tower counted on both sides"

CELLS: tuple[Cell, ...] = (
    Cell("step", "thin", _STEP, own_cost, AGAINST_FLOOR, 40, same_loss=True, peer="step"),
    Cell("reuse", "llava", _IMAGES, reuse, AGAINST_REUSE, 4, same_loss=True),
    Cell("reuse", "llava-7b", _IMAGES, reuse, AGAINST_REUSE, 10, same_loss=True, needs_gpu=True),
    Cell("kept", "llava", f"{_STEP}, images all different, seen before", kept, AGAINST_KEPT, 4, same_loss=True),
    Cell("grouped", "llava", f"{_STEP}, five questions about one image", grouped, AGAINST_GROUPED, 4, same_loss=True),
    Cell("features", "llava", f"{_STEP}, images all different, seen before", features, CACHED, 4, same_loss=True),
    Cell("memory", "llava", "saved for the backward pass", saved, SAVED, 1, "MB"),
    Cell("memory", "llava-7b", "saved for the backward pass", saved, SAVED, 1, "MB", needs_gpu=True),
    Cell("first", "thin", "the first step of a new trainer, a later one", first_step, FIRST, 10, same_loss=True),
    Cell("first", "llava", "the first step of a new trainer, a later one", first_step, FIRST, 2, same_loss=True),
    Cell("generate", "generate", "greedy, left-padded, a cache", generation, GENERATED, 4, peer="generate"),
    Cell("attach", "thin", "on a base in memory", attaching, ((LORA, REFT),), 15, peer="attach"),
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
)


def shapes(cell: Cell, workloads: Mapping[str, Shape], num_values: int = 0) -> list[tuple[int | None, Shape]]:
    """Return each value of a cell's sweep with its shape, `num_values` of them if that is not 0; else (None, shape)."""
    shape = workloads[cell.workload]
    values = cell.values[: num_values or None]
    return [(value, replace(shape, **{cell.sweep: value})) for value in values] or [(None, shape)]
