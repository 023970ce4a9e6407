"""How an adapter acts for a while: its strength, its groups, the sources it puts in, what is read and recorded of it.

Shape suffixes: B = rows, T = tokens of a forward, K = most selected tokens of a row, D = width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlreft.placed import Change, Placed, States, Strength, Switch
from vlreft.positions import Positions
from vlreft.running.endings import ending_behind
from vlreft.running.hooks import Runtime


@dataclass(frozen=True, eq=False)
class Read:
    """The states of one run at the tokens of one intervention, before any edit of its adapter.

    states_BKD, in the model's dtype, lists each row's selected tokens in order, zeros behind a row's last one, where
    valid_BK is False. `part` numbers the `+` part of its positions, None where all have one intervention.
    """

    site: str
    layer: int
    component: str
    part: int | None
    states_BKD: Tensor
    valid_BK: Tensor


@dataclass(frozen=True, eq=False)
class Edited:
    """What one intervention did in one run of its module.

    mask_BT says which tokens it edited; norm_BT is the length of the edit at each, relative_BT its share of the length
    that the state had. In generation T is the prompt's length first, then mostly 1. Tokens of a tower are its patches
    and others, in its own order.
    """

    site: str
    layer: int
    component: str
    positions: str
    part: int | None
    mask_BT: Tensor
    norm_BT: Tensor
    relative_BT: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside, and each of its modules back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]  # setting it is slow: where needed alone
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def recording(switch: Switch) -> Iterator[list[Edited]]:
    """Fill the list, at the end, with what each edit made inside did."""
    before, switch.records = switch.records, []
    edits: list[Edited] = []
    try:
        yield edits
    finally:
        made, switch.records = switch.records, before
        edits += [_edited(placed, change) for placed, change in made]


def _edited(placed: Placed, change: Change) -> Edited:
    relative_BT = change.norm_BT / change.length_BT.clamp_min(1e-12)
    where = placed.where
    text, part = placed.positions.text, placed.part
    return Edited(where.site, where.layer, where.component, text, part, change.mask_BT, change.norm_BT, relative_BT)


@torch.no_grad()
def read_states(
    runtime: Runtime, switch: Switch, batch: Mapping[str, Any], positions: Positions | None = None
) -> dict[Placed, States]:
    """Run a model on a batch, in evaluation mode and without this adapter's edits; return what it selects."""
    before = switch.reads, switch.read_positions, switch.on
    switch.reads, switch.read_positions, switch.on = {}, positions, True
    try:
        with evaluating(runtime.model), _ending(runtime, switch):
            runtime.model(**batch)
        return switch.reads
    finally:
        switch.reads, switch.read_positions, switch.on = before


def _ending(runtime: Runtime, switch: Switch) -> AbstractContextManager[None]:
    """End the forward behind the last block that is read, where only blocks of a decoder are."""
    read = [hooked for hooked in runtime.hooked.values() if any(item.switch is switch for item in hooked.items)]
    if runtime.batches.has_encoder or {hooked.site.name for hooked in read} != {"text"}:
        return nullcontext()
    return ending_behind(runtime.model, read[0].site.blocks, [hooked.layer for hooked in read])


def reads_of(found: Mapping[Placed, States], placed: Sequence[Placed]) -> list[Read]:
    """Return what was read in the config's order. Raises ValueError for an intervention that selects nothing."""
    reads = []
    for item in placed:
        if item not in found:
            raise ValueError(f"no token of this batch is selected at {item.where}, positions '{item.positions.text}'")
        site, layer, component = item.where[1:]
        reads.append(Read(site, layer, component, item.part, *found[item]))
    return reads


def check_read_positions(positions: Positions, placed: Sequence[Placed]) -> None:
    """Raise ValueError for positions to read that have other parts than an untied intervention's own."""
    for item in placed:
        if item.part is not None and len(positions.selects) != len(item.positions.selects):
            raise ValueError(
                f"positions '{positions.text}' have {len(positions.selects)} parts and '{item.positions.text}' at "
                f"{item.where} {len(item.positions.selects)}, each with an intervention of its own; give as many"
            )


def check_groups(groups: Mapping[str, Strength], placed: Sequence[Placed]) -> None:
    """Raise ValueError for a name that no intervention has among its groups."""
    known = sorted({name for item in placed for name in item.edit.groups})
    if unknown := sorted(set(groups) - set(known)):
        have = f"its groups are {known}" if known else "it has no groups; set `Intervention(..., groups=(...))`"
        raise ValueError(f"`groups` names {unknown}, which the adapter does not have; {have}")


def as_strength(given: float | Sequence[float] | Tensor) -> Strength:
    """Return a strength as one number, or as a tensor of one for each row. Raises TypeError or ValueError."""
    if isinstance(given, bool) or not isinstance(given, int | float | Sequence | Tensor) or isinstance(given, str):
        raise TypeError(f"the strength must be a number, or one for each row of the batch, got {given!r}")
    rows = given if isinstance(given, int | float) else torch.as_tensor(given, dtype=torch.float32)
    if isinstance(rows, Tensor) and rows.dim() == 0:
        rows = float(rows)
    if isinstance(rows, Tensor) and (rows.dim() != 1 or not len(rows)):
        raise ValueError(f"the strengths must be one for each row of the batch, got shape {tuple(rows.shape)}")
    if not bool(torch.isfinite(torch.as_tensor(rows)).all()):
        raise ValueError(f"the strength must be finite, got {given!r}")
    return rows
