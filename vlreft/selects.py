"""Selects: which tokens of a segment, each a frozen dataclass and a row of `SELECTS`.

Shape suffixes: B = rows, L = tokens of the layout, T = tokens of a forward.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlreft.layout import Grid

_NUMBER = r"[0-9]{1,6}"


@dataclass(frozen=True, eq=False)
class Members:
    """What a select sees of a segment: each token's rank in it, how many it has, where they lie.

    `limit_B1` is how many tokens this select may claim where a short segment is shared. `grid` may be None, `no_grid`
    says why.
    """

    rank_BL: Tensor
    count_B1: Tensor
    limit_B1: Tensor
    grid: Grid | None
    no_grid: str


class Select(ABC):
    """Which tokens of a segment; concrete classes are frozen dataclasses and rows of `SELECTS`."""

    pattern: ClassVar[str]
    spelling: ClassVar[str]

    @classmethod
    @abstractmethod
    def parse(cls, match: re.Match[str]) -> "Select":
        """Build from a match of `pattern`. Raises ValueError where the numbers make no sense."""

    @property
    @abstractmethod
    def num_slots(self) -> int | None:
        """The most tokens a row can have selected, None where it depends on the segment's length."""

    @abstractmethod
    def mask(self, members: "Members") -> Tensor:
        """Return mask_BL of the selected ones; what it says of tokens outside the segment does not matter."""

    @abstractmethod
    def generated(self, rank_T: Tensor) -> Tensor:
        """Return mask_T for tokens being generated, `rank_T` their number in the answer, from 0.

        Raises ValueError where it needs the answer's length, which nobody knows yet.
        """


@dataclass(frozen=True)
class All(Select):
    """Every token of the segment."""

    pattern = r"all"
    spelling = "all"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "All":
        """Build."""
        return cls()

    @property
    def num_slots(self) -> int | None:
        """Unknown before the batch."""
        return None

    def mask(self, members: Members) -> Tensor:
        """Select everything."""
        return torch.ones_like(members.rank_BL, dtype=torch.bool)

    def generated(self, rank_T: Tensor) -> Tensor:
        """Select everything."""
        return torch.ones_like(rank_T, dtype=torch.bool)


@dataclass(frozen=True)
class First(Select):
    """The first `num` tokens."""

    num: int
    pattern = f"f({_NUMBER})"
    spelling = "fN"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "First":
        """Build."""
        return cls(_positive(match))

    @property
    def num_slots(self) -> int | None:
        """At most `num`."""
        return self.num

    def mask(self, members: Members) -> Tensor:
        """Select ranks below `num` and the shared limit."""
        return members.rank_BL < members.limit_B1.clamp(max=self.num)

    def generated(self, rank_T: Tensor) -> Tensor:
        """Select the first `num` generated tokens."""
        return rank_T < self.num


@dataclass(frozen=True)
class Last(Select):
    """The last `num` tokens."""

    num: int
    pattern = f"l({_NUMBER})"
    spelling = "lN"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "Last":
        """Build."""
        return cls(_positive(match))

    @property
    def num_slots(self) -> int | None:
        """At most `num`."""
        return self.num

    def mask(self, members: Members) -> Tensor:
        """Select ranks from `count - num` on, within the shared limit."""
        return members.rank_BL >= members.count_B1 - members.limit_B1.clamp(max=self.num)

    def generated(self, rank_T: Tensor) -> Tensor:
        """Refuse."""
        raise ValueError(_unknown_length(f"l{self.num}"))


@dataclass(frozen=True)
class Uniform(Select):
    """`num` tokens spread evenly: the middles of `num` equal stretches; all tokens of a shorter segment."""

    num: int
    pattern = f"uniform({_NUMBER})"
    spelling = "uniformN"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "Uniform":
        """Build."""
        return cls(_positive(match))

    @property
    def num_slots(self) -> int | None:
        """At most `num`."""
        return self.num

    def mask(self, members: Members) -> Tensor:
        """Select rank floor((i + 1/2) * count / num) for i = 0 .. num - 1, without a list of the picks.

        The first i whose pick is not below a rank is known; the rank is selected if that pick is not above it either.
        """
        rank_BL, count_B1, twice = members.rank_BL, members.count_B1.clamp(min=1), 2 * self.num
        i_BL = (twice * rank_BL + count_B1 - 1).div(2 * count_B1, rounding_mode="floor").clamp(min=0)
        return (i_BL < self.num) & ((2 * i_BL + 1) * count_B1 < twice * (rank_BL + 1))

    def generated(self, rank_T: Tensor) -> Tensor:
        """Refuse."""
        raise ValueError(_unknown_length(f"uniform{self.num}"))


@dataclass(frozen=True)
class Slice(Select):
    """Ranks `start` to `stop` (exclusive) with Python's meaning of negative and missing bounds."""

    start: int
    stop: int | None
    pattern = rf"\[(-?{_NUMBER})?:(-?{_NUMBER})?\]"
    spelling = "[a:b]"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "Slice":
        """Build."""
        start, stop = int(match[1] or 0), None if match[2] is None else int(match[2])
        if stop == 0 or (stop is not None and (start < 0) == (stop < 0) and stop <= start):
            raise ValueError(f"the slice {match[0]} selects nothing")
        return cls(start, stop)

    @property
    def num_slots(self) -> int | None:
        """Known where both bounds count from the same end."""
        if self.stop is None:
            return -self.start if self.start < 0 else None
        return self.stop - self.start if (self.start < 0) == (self.stop < 0) else None

    def mask(self, members: Members) -> Tensor:
        """Select start <= rank < stop, negative bounds counted from the segment's end."""
        return within(members.rank_BL, self.start, self.stop, members.count_B1)

    def generated(self, rank_T: Tensor) -> Tensor:
        """Select by rank where both bounds count from the start."""
        if self.start < 0 or (self.stop is not None and self.stop < 0):
            raise ValueError(_unknown_length(f"[{self.start}:{'' if self.stop is None else self.stop}]"))
        mask_T = rank_T >= self.start
        return mask_T if self.stop is None else mask_T & (rank_T < self.stop)


@dataclass(frozen=True)
class Region(Select):
    """Patches of some rows and columns of the picture's patch grid, with Python's meaning of the bounds."""

    rows: Slice
    cols: Slice
    pattern = rf"rows({Slice.pattern})cols({Slice.pattern})"
    spelling = "rows[a:b]cols[c:d]"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "Region":
        """Build."""
        rows, cols = (re.fullmatch(Slice.pattern, text) for text in (match[1], match[4]))
        assert rows is not None
        assert cols is not None
        return cls(Slice.parse(rows), Slice.parse(cols))

    @property
    def num_slots(self) -> int | None:
        """Unknown: a row may hold several pictures."""
        return None

    def mask(self, members: Members) -> Tensor:
        """Select patches in the rows and columns. Raises ValueError where a picture has none of them."""
        grid = grid_of(members)
        mask_BL = within(grid.row_BL, self.rows.start, self.rows.stop, grid.rows_BL)
        mask_BL = mask_BL & within(grid.col_BL, self.cols.start, self.cols.stop, grid.cols_BL)
        mask_BL = mask_BL & (grid.row_BL >= 0)
        missed_B = (grid.row_BL >= 0).any(1) & ~mask_BL.any(1)
        if missed_B.device.type == "cpu" and bool(missed_B.any()):
            row = int(missed_B.nonzero()[0])
            size = f"{int(grid.rows_BL[row].max())} x {int(grid.cols_BL[row].max())}"
            raise ValueError(f"the region holds none of the {size} patches of picture {row}")
        return mask_BL

    def generated(self, rank_T: Tensor) -> Tensor:
        """Select nothing: no picture is generated."""
        return torch.zeros_like(rank_T, dtype=torch.bool)


@dataclass(frozen=True)
class Box(Select):
    """Patches that a pixel box touches: left, top, right, bottom, the last two exclusive; None: the call's own box."""

    pixels: tuple[int, int, int, int] | None
    pattern = rf"box(?:\[({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})\])?"
    spelling = "box[left,top,right,bottom]"

    @classmethod
    def parse(cls, match: re.Match[str]) -> "Box":
        """Build."""
        if match[1] is None:
            return cls(None)
        left, top, right, bottom = (int(match[number]) for number in range(1, 5))
        if left >= right or top >= bottom:
            raise ValueError(f"{match[0]} has no area")
        return cls((left, top, right, bottom))

    @property
    def num_slots(self) -> int | None:
        """Unknown before the picture's size is."""
        return None

    def mask(self, members: Members) -> Tensor:
        """Select patches whose pixels and the box's have one in common."""
        grid = grid_of(members)
        boxes_BL4 = grid.boxes_BL4
        if self.pixels is not None:
            boxes_BL4 = torch.tensor([[self.pixels]], device=grid.row_BL.device)
        if boxes_BL4 is None:
            raise ValueError("`box` needs a box for each picture: run the model inside `with reft.boxes(...)`")
        left_BL, top_BL, right_BL, bottom_BL = boxes_BL4.unbind(-1)
        is_patch_BL = grid.row_BL >= 0
        outside_BL = is_patch_BL & ((right_BL > grid.width_BL) | (bottom_BL > grid.height_BL))
        if outside_BL.device.type == "cpu" and bool(outside_BL.any()):
            row, place = outside_BL.nonzero()[0].tolist()
            box = boxes_BL4.expand(*outside_BL.shape, 4)[row, place].tolist()
            width, height = (int(size.expand_as(outside_BL)[row, place]) for size in (grid.width_BL, grid.height_BL))
            raise ValueError(f"the box {box} reaches out of picture {row}, which is {width} x {height} pixels")
        in_cols_BL = _touches(grid.col_BL, left_BL, right_BL, grid.cols_BL, grid.width_BL)
        return in_cols_BL & _touches(grid.row_BL, top_BL, bottom_BL, grid.rows_BL, grid.height_BL) & is_patch_BL

    def generated(self, rank_T: Tensor) -> Tensor:
        """Select nothing: no picture is generated."""
        return torch.zeros_like(rank_T, dtype=torch.bool)


SELECTS: tuple[type[Select], ...] = (All, First, Last, Uniform, Slice, Region, Box)
REGIONS = (Region, Box)


def within(rank_BL: Tensor, start: int, stop: int | None, count_BL: Tensor) -> Tensor:
    """Return mask_BL of start <= rank < stop, negative bounds counted from `count_BL`."""
    mask_BL = rank_BL >= (start if start >= 0 else count_BL + start)
    if stop is not None:
        mask_BL = mask_BL & (rank_BL < (stop if stop >= 0 else count_BL + stop))
    return mask_BL


def grid_of(members: Members) -> Grid:
    """Return where the segment's tokens lie. Raises ValueError if nothing is known of it."""
    if members.grid is None:
        raise ValueError(f"there is no patch grid here to take a region of: {members.no_grid}")
    return members.grid


def _touches(place_BL: Tensor, low_BL: Tensor, high_BL: Tensor, num_BL: Tensor, size_BL: Tensor) -> Tensor:
    """Return whether [place, place + 1) * size / num and [low, high) meet, in whole numbers."""
    return (place_BL * size_BL < high_BL * num_BL) & ((place_BL + 1) * size_BL > low_BL * num_BL)


def _positive(match: re.Match[str]) -> int:
    if int(match[1]) == 0:
        raise ValueError(f"{match[0]} selects nothing")
    return int(match[1])


def _unknown_length(spelling: str) -> str:
    return f"`response:{spelling}` needs the answer's length, which is unknown while it is generated; use `all` or `fN`"
