"""The position language: `segment:select+select`, parsed once to frozen selectors, resolved on a `TokenLayout`.

Shape suffixes: B = rows, L = tokens of the layout, T = tokens of a forward, P = selected slots.

    prompt | text | image | question | response | cls | patches | eos     the segment; `prompt` when left out
    all  f4  l4  uniform9  [2:10]                                          what is selected of it, joined by `+`
    rows[2:5]cols[0:3]  box[8,8,40,24]  box                               a region of a picture: `patches`, `image`

A bare segment name means all of it. In a vision tower `prompt`, hence no segment, is every token of the tower.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vlreft.layout import ENDLESS_SEGMENTS, TEXT_SEGMENTS, TOWER_SEGMENTS, TokenLayout
from vlreft.selects import REGIONS, SELECTS, All, First, Last, Members, Select

SEGMENTS = tuple(dict.fromkeys(TEXT_SEGMENTS + TOWER_SEGMENTS))
PICTURE_SEGMENTS = ("patches", "image")  # those that a region can be taken of
MAX_LENGTH = 10_000  # characters


@dataclass(frozen=True)
class Positions:
    """A parsed position string; `text` is its spelling."""

    text: str
    segment: str
    selects: tuple[Select, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """The spelling of each select, e.g. ("f4", "l4")."""
        selects = self.text.partition(":")[2] if re.match(r"[a-z]+:", self.text) else self.text
        return ("all",) if self.text == self.segment else tuple(selects.split("+"))

    @property
    def has_region(self) -> bool:
        """Whether it selects by place in a picture."""
        return any(isinstance(select, REGIONS) for select in self.selects)

    @property
    def needs_prompt_end(self) -> bool:
        """Whether the selection depends on where the prompt ends."""
        return self.segment not in ENDLESS_SEGMENTS

    def masks(self, layout: TokenLayout) -> tuple[Tensor, ...]:
        """Return one mask_BL per select; no token is in two of them (the earlier select keeps it).

        With `f` and `l` together a short segment of n tokens is shared as in the paper (section 4.1): the first
        min(f, floor(n/2)) and the last min(l, ceil(n/2)).
        """
        segment_BL = layout.mask(self.segment)
        rank_BL = segment_BL.cumsum(1) - 1
        count_B1 = segment_BL.sum(1, keepdim=True)
        shared = {First, Last} <= {type(select) for select in self.selects}
        taken_BL, masks = torch.zeros_like(segment_BL), []
        for select in self.selects:
            limit_B1 = count_B1
            if shared and isinstance(select, First | Last):
                limit_B1 = count_B1 // 2 if isinstance(select, First) else count_B1 - count_B1 // 2
            members = Members(rank_BL, count_B1, limit_B1, layout.grid, layout.no_grid)
            mask_BL = segment_BL & select.mask(members) & ~taken_BL
            taken_BL = taken_BL | mask_BL
            masks.append(mask_BL)
        return tuple(masks)

    def generated(self, rank_T: Tensor) -> tuple[Tensor, ...]:
        """Return one mask_T per select for answer tokens being generated; nothing outside of `response`."""
        if self.segment != "response":
            return tuple(torch.zeros_like(rank_T, dtype=torch.bool) for _ in self.selects)
        taken_T, masks = torch.zeros_like(rank_T, dtype=torch.bool), []
        for select in self.selects:
            masks.append(select.generated(rank_T) & ~taken_T)
            taken_T = taken_T | masks[-1]
        return tuple(masks)

    def window(
        self, masks: tuple[Tensor, ...], layout: TokenLayout, offset: int | Tensor, num_tokens: int
    ) -> tuple[Tensor, ...]:
        """Return the masks of tokens offset .. offset + num_tokens - 1, which may lie beyond the layout."""
        place_T = offset + torch.arange(num_tokens, device=masks[0].device)
        generated = self.generated(place_T - layout.num_tokens)
        inside_T, clamped_T = place_T < layout.num_tokens, place_T.clamp(max=layout.num_tokens - 1)
        pairs = zip(masks, generated, strict=True)
        return tuple(torch.where(inside_T, mask_BL.index_select(1, clamped_T), grown_T) for mask_BL, grown_T in pairs)


def parse_positions(text: str) -> Positions:
    """Parse a position string. Raises ValueError that points at the character where it stops making sense."""
    if not isinstance(text, str):
        raise TypeError(f"`positions` must be a string such as 'question:f4+l4', got {text!r}")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"`positions` has {len(text):,} characters, more than {MAX_LENGTH:,}; split the intervention")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Positions:
    if text in SEGMENTS:
        return Positions(text, text, (All(),))
    segment, place = "prompt", 0
    if named := re.match(r"([A-Za-z_]*):", text):
        segment, place = named[1], named.end()
        if segment not in SEGMENTS:
            raise _syntax_error(text, 0, f"'{segment}' is no segment", ", ".join(SEGMENTS))
    selects: list[Select] = []
    while True:
        select, end = _parse_select(text, place)
        if isinstance(select, First | Last) and any(type(select) is type(other) for other in selects):
            raise _syntax_error(text, place, "the same select twice", "each of f and l at most once")
        if isinstance(select, REGIONS) and segment not in PICTURE_SEGMENTS:
            raise _syntax_error(text, place, f"'{segment}' is no picture", " or ".join(PICTURE_SEGMENTS) + " before it")
        selects.append(select)
        if end == len(text):
            return Positions(text, segment, tuple(selects))
        if text[end] != "+":
            raise _syntax_error(text, end, f"unexpected {text[end]!r}", "'+' or the end")
        place = end + 1


def _parse_select(text: str, place: int) -> tuple[Select, int]:
    for select in SELECTS:
        if match := re.compile(select.pattern + r"(?![A-Za-z0-9_])").match(text, place):
            try:
                return select.parse(match), match.end()
            except ValueError as error:
                raise _syntax_error(text, place, str(error), "at least one token") from None
    known = ", ".join(select.spelling for select in SELECTS)
    found = "the end" if place >= len(text) else f"'{text[place:]}'"
    hint = "" if ":" in text else f"; or a segment: {', '.join(SEGMENTS)}"
    hint += "; numbers have at most 6 digits" if re.search("[0-9]{7}", text[place:]) else ""
    raise _syntax_error(text, place, f"{found} is no select", known + hint)


def _syntax_error(text: str, place: int, problem: str, expected: str) -> ValueError:
    return ValueError(
        f"`positions` {text!r}: {problem} (character {place + 1})\n    {text}\n    {' ' * place}^\nexpected: {expected}"
    )


@dataclass(frozen=True, eq=False)
class Selection:
    """The selected positions of one forward.

    `mask_BT` says which positions are selected. `index_BP`, if not None, lists them in P slots per row (selected ones
    first, then unselected fillers, all distinct) with `valid_BP` False at the fillers, None if there are none. Without
    an index, P = T: edit densely. `copies` says how many rows there are for each row of the prompt: beams, return
    sequences. Of a forward on a part of the prompt, `earlier_B` counts the prompt's selected tokens before it,
    `total_B` all of them.
    """

    mask_BT: Tensor
    index_BP: Tensor | None
    valid_BP: Tensor | None
    copies: int = 1
    earlier_B: Tensor | None = None
    total_B: Tensor | None = None

    def of(self, rows_N: Tensor) -> "Selection":
        """Return the selection of some rows."""
        index_BP, valid_BP = (None if x is None else x[rows_N] for x in (self.index_BP, self.valid_BP))
        return Selection(self.mask_BT[rows_N], index_BP, valid_BP)


def select(mask_BT: Tensor, num_slots: int | None) -> Selection:
    """Turn a mask into slots: static shapes, on the device, without a host synchronisation on an accelerator.

    `num_slots` bounds the selected tokens per row. Where it is unknown, all T positions are slots on an accelerator;
    on the CPU, where looking is free, as many as the fullest row has.
    """
    num_tokens = mask_BT.shape[1]
    looking_is_free = mask_BT.device.type == "cpu" and not torch.compiler.is_compiling()
    if num_slots is None:
        num_slots = max(1, int(mask_BT.sum(1).max())) if looking_is_free else num_tokens
    if num_slots >= num_tokens:
        return Selection(mask_BT, None, None)
    index_BP = mask_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    valid_BP = mask_BT.gather(1, index_BP)
    return Selection(mask_BT, index_BP, None if looking_is_free and bool(valid_BP.all()) else valid_BP)
