"""`Stream`: the tokens that a text stack reads, laid out once per batch or per `generate`, told apart in every call.

Shape suffixes: B = rows, L = tokens of the prompt's layout, T = tokens of this call, P = selected slots, D = width.

Tokens are told apart by absolute position (tokens in the cache + place in this call), never by counting calls: chunked
prefill, static caches, beams, assisted decoding and recomputation without a cache all agree.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vlreft.layout import Grid, TokenLayout, Vocabulary
from vlreft.placed import Placed
from vlreft.positions import Positions, Selection, select


@dataclass(eq=False)
class Scope:
    """One layout, and the masks that positions give on it. `find_grid` places its image tokens in their pictures."""

    layout: TokenLayout
    find_grid: Callable[[TokenLayout], Grid] | None = None
    masks: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """One run of a text stack inside a scope: which of its tokens are selected. A recomputed block needs it again.

    is_over: all tokens stand behind the prompt and nothing edits those: a decoding step asks no further.
    """

    scope: Scope | None
    model_name: str
    offset: int | Tensor = 0
    has_cache: bool = False
    is_over: bool = False
    selections: dict[tuple[object, ...], Selection | None] = field(default_factory=dict)

    def select(self, placed: Placed, shape: tuple[int, int], device: torch.device) -> Selection | None:
        """Return the selected ones of states of shape (B, T); None if there can be none."""
        key = (placed.positions.text, placed.part, shape, device)
        if key not in self.selections:
            masks = self._masks(placed.positions, *shape)
            mask_BT = None if masks is None else placed.join(masks).to(device)
            chosen = None if mask_BT is None else select(mask_BT, placed.num_slots)
            if chosen is not None and self.scope is not None and shape[0] != self.scope.layout.num_rows:
                chosen = replace(chosen, copies=shape[0] // self.scope.layout.num_rows)
            if chosen is not None and self.scope is not None and shape[1] != self.scope.layout.num_tokens:
                mask_BL = placed.join(self.scope.masks[placed.positions.text]).to(device)
                is_earlier_L = torch.arange(mask_BL.shape[1], device=device) < self.offset
                earlier_B, total_B = (mask_BL & is_earlier_L).sum(1), mask_BL.sum(1)
                chosen = replace(chosen, earlier_B=earlier_B, total_B=total_B)
            self.selections[key] = chosen
        return self.selections[key]

    def _masks(self, positions: Positions, num_rows: int, num_tokens: int) -> tuple[Tensor, ...] | None:
        """Return one mask_BT per part for the tokens of this call; None if none of them can be selected."""
        if self.scope is None:
            raise ValueError(
                "the text blocks ran outside of a call of the model itself, so nothing says which tokens are the "
                "prompt; call the model, or run it inside `with reft.prompt(...)` or `with reft.disabled()`"
            )
        layout = self.scope.layout
        if isinstance(self.offset, int):
            self._check(layout, num_tokens)
            if self.offset >= layout.num_tokens and positions.segment != "response":
                return None
        if positions.text not in self.scope.masks:
            if positions.has_region and self.scope.find_grid is not None and "image" in layout.segments:
                layout = replace(layout, grid=self.scope.find_grid(layout))
            self.scope.masks[positions.text] = positions.masks(layout)
        masks = self.scope.masks[positions.text]
        if not (isinstance(self.offset, int) and self.offset == 0 and num_tokens == layout.num_tokens):
            masks = positions.window(masks, layout, self.offset, num_tokens)
        if num_rows != layout.num_rows:
            copies, rest = divmod(num_rows, layout.num_rows)
            if rest or not layout.repeats:
                raise ValueError(f"the text blocks run on {num_rows} rows, the prompt has {layout.num_rows}")
            masks = tuple(mask_BT.repeat_interleave(copies, 0) for mask_BT in masks)  # beams, return sequences
        return masks

    def _check(self, layout: TokenLayout, num_tokens: int) -> None:
        """Refuse a call whose tokens cannot be told: never edit by guess."""
        assert isinstance(self.offset, int)
        end = self.offset + num_tokens
        cut = num_tokens < layout.num_tokens and not self.has_cache
        if cut or (end > layout.num_tokens and not layout.grows):
            raise ValueError(
                f"the text blocks run on tokens {self.offset} to {end} while the batch has {layout.num_tokens}: "
                f"{self.model_name} feeds its text stack something else than `input_ids`, or keeps a cache that "
                "vlreft cannot read; edit another site of it"
            )


class Stream:
    """The scope that a text stack is in, and its current call. `vocabulary` says what its ids mean."""

    def __init__(self, name: str, vocabulary: Vocabulary, model_name: str) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.model_name = model_name
        self.scope: Scope | None = None
        self.is_fixed = False
        self.call: Call | None = None

    @contextmanager
    def fixed(self, layout: TokenLayout, find_grid: Callable[[TokenLayout], Grid] | None = None) -> Iterator[None]:
        """Use one layout for all forwards inside, each of which may hold a part of it, told by the cache's length."""
        before = self.scope, self.is_fixed
        self.scope, self.is_fixed = Scope(layout, find_grid), True
        try:
            yield
        finally:
            self.scope, self.is_fixed = before
            self.call = None

    def open(self, layout: TokenLayout, find_grid: Callable[[TokenLayout], Grid] | None = None) -> None:
        """Use a layout for this forward, unless one is fixed."""
        if not self.is_fixed:
            self.scope = Scope(layout, find_grid)

    def close(self) -> None:
        """Forget the forward's layout."""
        self.call = None
        if not self.is_fixed:
            self.scope = None

    def start_call(self, arguments: Mapping[str, Any], acting: Iterable[Placed]) -> None:
        """Begin a run of the stack, its owner's arguments given by name, with what acts on it."""
        cache = cache_in(arguments.values())
        self.call = Call(self.scope, self.model_name, has_cache=cache is not None)
        if cache is not None:
            # A static cache hands out its live counter, which moves while the blocks run: copy it.
            length = length_of(cache, self.model_name)
            self.call.offset = length + 0
            if isinstance(length, Tensor) and length.device.type == "cpu" and not torch.compiler.is_compiling():
                self.call.offset = int(length)
        if self.scope is not None and self.scope.layout.grows and isinstance(self.call.offset, int):
            is_behind = self.call.offset >= self.scope.layout.num_tokens
            self.call.is_over = is_behind and not any(one.selecting.positions.segment == "response" for one in acting)

    def current_call(self) -> Call:
        """Return the current call, one without a scope if the stack's owner was not called."""
        return self.call if self.call is not None else Call(self.scope, self.model_name)


def cache_in(values: Iterable[object]) -> Cache | None:
    """Return the cache among a call's or an output's values: transformers 5.24 changed its name, not its type."""
    for value in values:
        if isinstance(value, Cache):
            return value
    return None


def length_of(cache: Cache, model_name: str) -> int | Tensor:
    """Return how many tokens a cache holds. Raises ValueError for one that only keeps a summary of them, as Mamba's."""
    try:
        return cache.get_seq_length()
    except ValueError as error:
        raise ValueError(
            f"the cache of {model_name} does not say how many tokens it holds, so the prompt cannot be told from the "
            "answer; generate with use_cache=False"
        ) from error


def cache_name(model: nn.Module) -> str:
    """Return what the model's forward calls its cache, "" if it takes none."""
    names = inspect.signature(type(model).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), "")
