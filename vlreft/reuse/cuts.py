"""`Cut`: where the rows of a batch are cut, and the batch's arguments in parts.

Shape suffixes: B = rows, L = tokens of the batch, S = columns of the batch laid anew.

Where prefixes end in different columns, the batch is laid anew: prefixes padded on the left, so that they end together,
and what is behind them on the right; every token keeps its position.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlreft.reuse.pieces import join_arguments

# Inputs whose last dimension runs along the tokens, and which are cut with them.
ALONG_THE_TOKENS = ("input_ids", "labels", "prompt_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
# What no prefix reads.
BEHIND = ("labels", "prompt_mask")


@dataclass(frozen=True, eq=False)
class Cut:
    """Where a batch is cut, in its columns.

    starts_B: each row's first token; stops_B: one behind its prefix; ends_B: one behind its last token; predicts_B: the
    first one from which a label is predicted. num_between: tokens behind each prefix that need no graph either. keys_B:
    what each prefix is known by, where rows may share; media_B: the arguments of each row's pictures then. is_moved:
    whether the batch has to be laid anew.
    """

    names: frozenset[str]
    starts_B: list[int]
    stops_B: list[int]
    ends_B: list[int]
    predicts_B: list[int]
    num_between: int = 0
    keys_B: list[str] | None = None
    media_B: list[list[dict[str, Any]]] | None = None
    is_moved: bool = False

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each row's prefix."""
        return [stop - start for start, stop in zip(self.starts_B, self.stops_B, strict=True)]

    @property
    def width(self) -> int:
        """Columns of the prefix."""
        return max(self.num_tokens) if self.is_moved else self.stops_B[0]

    @property
    def num_silent(self) -> int:
        """Tokens behind the prefix, and behind those between, from which no row predicts a label."""
        nums = [predicts - stop for predicts, stop in zip(self.predicts_B, self.stops_B, strict=True)]
        return max(0, min(nums) - self.num_between)

    @property
    def kind(self) -> tuple[object, ...]:
        """What is tried anew: a batch with images, say, takes another way through a model than one without."""
        return self.names, self.is_moved, self.keys_B is not None, self.num_between > 0

    def sources(self) -> tuple[Tensor, Tensor]:
        """Return of a batch laid anew from_BS, the column that each one is, and is_real_BS: a pad is the last token.

        A pad must be no image token, and an answer ends with none.
        """
        num_behind = max(end - stop for stop, end in zip(self.stops_B, self.ends_B, strict=True))
        starts_B1, stops_B1, ends_B1 = (torch.tensor(x)[:, None] for x in (self.starts_B, self.stops_B, self.ends_B))
        from_BS = stops_B1 - self.width + torch.arange(self.width + num_behind)
        is_real_BS = (from_BS >= starts_B1) & (from_BS < ends_B1)
        return torch.where(is_real_BS, from_BS, ends_B1 - 1), is_real_BS


# Parts of a batch ----------------------------------------------------------------------------------------------------


def media_in(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what does not run along the tokens."""
    return {n: value for n, value in inputs.items() if n not in (*ALONG_THE_TOKENS, "attention_mask")}


def strange_inputs(inputs: Mapping[str, Any]) -> bool:
    """Whether something runs along the tokens that is not known to."""
    shape = inputs["input_ids"].shape
    return any(isinstance(value, Tensor) and value.shape[:2] == shape for value in media_in(inputs).values())


def columns_of(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return some columns of what a prefix reads along the tokens."""
    names = (name for name in (*ALONG_THE_TOKENS, "attention_mask") if name in inputs and name not in BEHIND)
    return {name: inputs[name][..., start:stop] for name in names}


def some_rows(inputs: Mapping[str, Any], cut: Cut, rows: list[int]) -> dict[str, Any]:
    """Return what the prefixes of some rows read."""
    assert cut.media_B is not None
    # Without given positions a model counts columns, pads too: then none may be left out.
    start = cut.width - max(cut.num_tokens[row] for row in rows) if cut.is_moved else 0
    shape = inputs["input_ids"].shape
    taken = {}
    for name, value in columns_of(inputs, start, cut.width).items():
        taken[name] = value.expand(*value.shape[:-2], shape[0], value.shape[-1])[..., rows, :]
    parts = [part for row in rows for part in cut.media_B[row]]
    if rows == list(range(shape[0])):
        return {**taken, **media_in(inputs)}
    return {**taken, **(join_arguments(parts) if parts else {})}


def laid_anew(inputs: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """Return a batch with all prefixes ending in one column, every token in the position that it had."""
    shape, device = inputs["input_ids"].shape, inputs["input_ids"].device
    from_BS, is_real_BS = (x.to(device) for x in cut.sources())
    fills = {"labels": -100, "prompt_mask": 0, "attention_mask": 0}
    along = {name: inputs[name] for name in (*ALONG_THE_TOKENS, "attention_mask") if name in inputs}
    along.setdefault("position_ids", torch.arange(shape[1], device=device).expand(shape))
    laid = dict(inputs)
    for name, value in along.items():
        value = value.expand(*value.shape[:-2], *shape)
        laid[name] = value.gather(-1, from_BS.expand(*value.shape[:-2], *from_BS.shape))
        if name in fills:
            laid[name] = laid[name].masked_fill(~is_real_BS, fills[name])
    return laid


def rope_index_of(model: nn.Module) -> Callable[..., Any] | None:
    """Return what counts positions in models where images have two dimensions (M-RoPE), None for the others.

    Twenty families define `get_rope_index` for it, with no type in common.
    """
    for module in model.modules():
        if (rope_index := getattr(type(module), "get_rope_index", None)) is not None:
            return partial(rope_index, module)
    return None


def with_positions(rope_index: Callable[..., Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the position ids that `rope_index` takes from the whole sequence."""
    if "position_ids" in inputs:
        return inputs
    known = {name: inputs[name] for name in inspect.signature(rope_index).parameters if name in inputs}
    return {**inputs, "position_ids": rope_index(**known)[0]}
