"""Watch from outside what the interventions at one block do, without asking vlreft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def _states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (output if isinstance(output, Tensor) else output[0]).detach()


@contextmanager
def recorded(block: nn.Module, *, at_input: bool = False) -> Iterator[list[Tensor]]:
    """Collect `after - before` of the edit on a block's output, or on its input, one tensor for each call.

    The block's own result is seen by its `forward`, the edited one by a hook that runs behind all others.
    """
    before, changes, own = [], [], block.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        before.append(_states(output))
        return output

    def after_output(_module, _args, output):
        changes.append(_states(output) - before.pop())

    def first(_module, args):
        before.append(args[0].detach())

    def last(_module, args):
        changes.append(args[0].detach() - before.pop())

    if at_input:
        handles = [block.register_forward_pre_hook(first, prepend=True), block.register_forward_pre_hook(last)]
    else:
        block.forward = forward
        handles = [block.register_forward_hook(after_output)]
    try:
        yield changes
    finally:
        block.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()


def places(change: Tensor) -> Tensor:
    """Return which positions of (..., D) states were changed at all."""
    return torch.any(change != 0, -1)
