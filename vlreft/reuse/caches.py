"""Keys and values of `generate`'s plain cache: read out, joined by rows, moved along the tokens, put back.

Shape suffixes: B = rows, H = heads, S = slots of a cache, D = a head's width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Layers = list[tuple[Tensor, Tensor] | None]  # keys_BHSD and values_BHSD of each layer, None where it keeps none


def windows_of(cache: Cache) -> list[int]:
    """Return the lengths of a cache's sliding windows, in tokens."""
    return [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """Make the cache that `generate` would make."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def layers_of(cache: Cache) -> Layers:
    """Return a cache's keys and values. Raises TypeError for one that holds anything else."""
    layers: Layers = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TypeError(f"its cache holds more than each token's keys and values: {type(layer).__name__}")
        assert isinstance(layer, DynamicLayer)
        keys_BHSD, values_BHSD = layer.keys, layer.values
        layers.append(None if keys_BHSD is None or values_BHSD is None else (keys_BHSD, values_BHSD))
    return layers


def filled(model: PreTrainedModel, layers: Layers, num_tokens: int) -> DynamicCache:
    """Return a new cache of `num_tokens` tokens; it reads these keys and values and never writes into them."""
    cache = empty_cache(model)
    for layer, kv in zip(cache.layers, layers, strict=True):
        if kv is not None and isinstance(layer, DynamicLayer):
            layer.lazy_initialization(*kv)
            layer.keys, layer.values = kv
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = num_tokens  # it may hold fewer
    return cache


def stack(parts: Sequence[Layers], order: Sequence[int] = ()) -> Layers:
    """Join caches along their rows, ending together, empty slots in front of the shorter ones, and put rows in order.

    Copies are spared where one prefix is all there is: keys and values are the largest tensors around.
    """
    joined: Layers = []
    is_sorted = list(order) == sorted(order)
    for held in zip(*parts, strict=True):
        pairs = [kv for kv in held if kv is not None]
        if not pairs:
            joined.append(None)
        elif all(kv is pairs[0] for kv in pairs):
            keys, values = (x_BHSD.expand(len(pairs) * len(x_BHSD), -1, -1, -1) for x_BHSD in pairs[0])
            joined.append((keys, values))
        else:
            keys, values = (_end_together([kv[which] for kv in pairs]) for which in (0, 1))
            joined.append((keys, values) if is_sorted else (keys[list(order)], values[list(order)]))
    return joined


def _end_together(rows: Sequence[Tensor]) -> Tensor:
    most = max(x_BHSD.shape[2] for x_BHSD in rows)
    return torch.cat([F.pad(x_BHSD, (0, 0, most - x_BHSD.shape[2], 0)) for x_BHSD in rows])


def clone_row(kv: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """Copy one row, so that it does not hold on to the others' memory."""
    return kv[0][row : row + 1].clone(), kv[1][row : row + 1].clone()


def moved(kv: tuple[Tensor, Tensor], num_B: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's slots towards the end; what was behind it goes to the front, where the mask hides it."""
    if not bool(num_B.any()):
        return kv
    moved = []
    for x_BHSD in kv:
        slots = x_BHSD.shape[2]
        from_BS = (torch.arange(slots) - num_B[:, None]).remainder(slots).to(x_BHSD.device)
        moved.append(x_BHSD.gather(2, from_BS[:, None, :, None].expand_as(x_BHSD)))
    return moved[0], moved[1]
