"""`holding`: groups of an edit that stay as they are while an optimiser trains the others.

Shape suffixes: R = rank, D = width.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from vlreft.edit import Edit, Rotated, orthonormal_rows


@contextmanager
def holding(edits: Iterable[Edit], on: Collection[str], is_meant: Callable[[], bool]) -> Iterator[None]:
    """Keep all groups but those `on` as they are while optimisers step inside: numbers bit for bit, and subspaces.

    Neither weight decay nor an optimiser's momentum moves their numbers. R gives each row what the rows before it leave
    over, so that training a group would turn those behind it: after each step, the trained rows are put back into what
    all the held ones leave over, wherever they stand. `is_meant` says, before a step, whether it is for this call.
    """
    held = [_Held(edit, on) for edit in edits if edit.groups and not set(edit.groups) <= set(on)]

    def before(optimizer: Optimizer, *_: object) -> None:
        if is_meant():
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for item in held:
                item.keep(stepped)

    def after(*_: object) -> None:
        for item in held:
            item.put_back()

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Held:
    """The numbers of one edit that are not to be trained, from before a step until after it."""

    def __init__(self, edit: Edit, on: Collection[str]) -> None:
        self.edit = edit
        self.on = edit.dimensions_of(on)
        self.off = [place for place in range(edit.rank) if place not in self.on]
        self.kept: dict[str, Tensor] = {}
        self.is_straight = False

    def keep(self, stepped: set[int]) -> None:
        """Take the held numbers, if the step is of this edit's parameters."""
        parameters = dict(self.edit.named_parameters())
        if not stepped.isdisjoint(map(id, parameters.values())):
            if isinstance(self.edit, Rotated) and not self.is_straight:
                self.edit.straighten()
                self.is_straight = True
            self.kept = {name: parameter.detach()[self.off].clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the held numbers back, and the trained rows of R at right angles to the held ones."""
        if not self.kept:
            return
        for name, parameter in self.edit.named_parameters():
            parameter[self.off] = self.kept[name]
        self.kept = {}
        if isinstance(self.edit, Rotated) and self.on:
            r_RD = orthonormal_rows(self.edit.rotation[self.off + self.on])
            self.edit.rotation[self.on] = r_RD[len(self.off) :]
