"""Several adapters on one model: which of them act, in which order, and on which rows of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from vlreft.reft import Reft, find_refts

RowNames = str | Sequence[str] | None  # the adapter of one row, several that act on it, or none


@contextmanager
def use(model: nn.Module, *names: str, rows: Sequence[RowNames] | None = None) -> Iterator[None]:
    """Let only the adapters of these names act inside, in this order: `use(model, "a", "b")`; none by `use(model)`.

    rows: which adapters act on which row of the batch instead, `rows=["a", None, ("a", "b")]`, in forward and
        `generate`: each row comes out as if it ran alone with them. Where an edit sits in a vision tower, a row is one
        picture. Adapters of one row act in the order in which they were attached.

    Strengths that `reft.scaled` set outside do not hold inside. Raises ValueError for a name that is not attached.
    """
    refts = find_refts(model)
    if names and rows is not None:
        raise ValueError("`use` takes names for the whole batch, or `rows`, one entry for each row; not both")
    by_row = [] if rows is None else [_names_of(entry, refts) for entry in rows]
    if rows is not None and not by_row:
        raise ValueError("`rows` is empty; give one entry for each row of the batch")
    used = _names_of(names, refts)
    with ExitStack() as scopes:
        for name, reft in refts.items():
            if rows is None:
                on = name in used
                order = used.index(name) if on else 0
                scopes.enter_context(reft.changed(on=on, order=order, strength=1.0))
            else:
                strength_B = torch.tensor([float(name in entry) for entry in by_row])
                scopes.enter_context(reft.changed(on=bool(strength_B.any()), order=0, strength=strength_B))
        yield


def _names_of(entry: RowNames, refts: dict[str, Reft]) -> tuple[str, ...]:
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    for name in names:
        if name not in refts:
            raise ValueError(f"no adapter '{name}' is attached; there are {list(refts)}")
    if len(set(names)) != len(names):
        raise ValueError(f"adapters {list(names)}: one is named twice, and each acts once")
    return names
