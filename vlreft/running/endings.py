"""Ends a forward that is run for some states alone, where the last of these is there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """Ends a forward that has shown all that it was run for."""


@contextmanager
def ending_behind(model: nn.Module, blocks: tuple[nn.Module, ...], layers: Iterable[int]) -> Iterator[None]:
    """End forwards inside where the block behind the last of these layers would run; yields nothing of them.

    They run to their end as ever where hooks hand shards or offloaded weights on from one block to the next one, where
    a model is compiled, and where a block stands in the list twice.
    """
    behind = max(layers, default=len(blocks)) + 1
    if behind >= len(blocks) or len(set(blocks)) < len(blocks) or _is_handed_on(model):
        yield
        return
    handle = blocks[behind].register_forward_pre_hook(_end)
    try:
        with suppress(_Enough):
            yield
    finally:
        handle.remove()


@contextmanager
def ending_when_full(model: nn.Module, cache: Cache) -> Iterator[None]:
    """End a forward inside once each layer of its cache has its keys and values: all that follows is lost anyway.

    It runs to its end where a layer gets none, where the cache does not say how many layers there are, and where
    `ending_behind` lets it.
    """
    missing = set(range(len(cache.layers)))
    if not missing or _is_handed_on(model):
        yield
        return
    own = cache.update

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = own(keys, values, layer_idx, *args, **kwargs)
        missing.discard(layer_idx)
        if not missing:
            raise _Enough
        return states

    cache.__dict__["update"] = update
    try:
        with suppress(_Enough):
            yield
    finally:
        del cache.__dict__["update"]


def _end(*_: Any) -> None:
    raise _Enough


def _is_handed_on(model: nn.Module) -> bool:
    return torch.distributed.is_initialized() or any(
        module._compiled_call_impl is not None or "_hf_hook" in module.__dict__ for module in model.modules()
    )
