"""`Sheet`: a figure put together from the top down out of titles, lines of tokens, pictures and maps.

Lengths are in inches, fonts in points. Shape suffixes: R, C = rows and columns of patches, K = layers, N = tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlreft.drawing.glyphs import break_lines, chips_of, cut, drawable, fonts, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, PLAIN, EDITED = "#22272b", "#5f6870", "#eceeef", "#e69f00"
BASE, ADAPTED = "#a3aaaf", "#0072b2"  # probabilities without and with the adapter
WIDTH, MARGIN, POINT = 8.4, 0.2, 1 / 72
TITLE, BODY, SMALL = 9.5, 8.0, 7.0
CELL, GAP = 1.8, 0.2  # of pictures
LONGEST, KEPT = 60, 20  # a longer run of tokens is shown by its ends
LONGEST_COLUMNS, KEPT_COLUMNS = 10, 3
MAX_LABELS = 90


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture under up to three lines of text, with patches marked (mask_RC, bool), or values_RC in its place."""

    lines: tuple[str, ...]
    picture: np.ndarray | None = None
    mask_RC: Tensor | None = None
    values_RC: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in any unit."""
        for grid in (self.mask_RC, self.values_RC):
            if grid is not None and self.picture is None:
                return grid.shape[0], grid.shape[1]
        assert self.picture is not None
        return self.picture.shape[0], self.picture.shape[1]


class Page:
    """A figure being drawn: one layer of texts and boxes over all of it, and axes placed in it; y runs downwards."""

    def __init__(self, height: float, width: float = WIDTH) -> None:
        """Make an empty figure."""
        from matplotlib.figure import Figure

        self.height, self.width = height, width
        self.figure = Figure((width, height), dpi=120, facecolor="white")
        self.layer = self.figure.add_axes((0, 0, 1, 1))
        self.layer.set(xlim=(0, width), ylim=(height, 0))
        self.layer.axis("off")

    def text(self, x: float, y: float, text: str, size: float = BODY, color: str = INK, **style: Any) -> None:
        """Write a text at its baseline, as it is: `$` is a dollar."""
        self.layer.text(x, y, text, size=size, color=color, family=list(fonts()), parse_math=False, **style)

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fill a box with round corners."""
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.025"
        self.layer.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=color, edgecolor="none"))

    def axes(self, x: float, y: float, width: float, height: float) -> "Axes":
        """Add axes without ticks and frame."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes


class Sheet:
    """Blocks below each other, each with its height; drawn at last, when the figure's height is known."""

    def __init__(self) -> None:
        """Begin with none."""
        self._blocks: list[tuple[float, Callable[[Page, float], None]]] = []

    def figure(self) -> "Figure":
        """Draw all blocks."""
        page = Page(sum(height for height, _ in self._blocks) + 2 * MARGIN)
        top = MARGIN
        for height, draw in self._blocks:
            draw(page, top)
            top += height
        return page.figure

    def title(self, name: str, more: str) -> None:
        """Write a heading, and more beside it, below if there is no room."""
        name = cut(drawable(name), TITLE, _points(WIDTH - 2 * MARGIN), weight="bold")
        left = MARGIN + POINT * (text_width(name, TITLE, weight="bold") + 9)
        below = left + POINT * text_width(more, BODY) > WIDTH - MARGIN
        more = cut(more, BODY, _points(WIDTH - 2 * MARGIN))

        def draw(page: Page, top: float) -> None:
            page.text(MARGIN, top + 0.17, name, TITLE, weight="bold")
            page.text(MARGIN if below else left, top + (0.33 if below else 0.17), more, BODY, SOFT)

        self._blocks.append((0.43 if below else 0.27, draw))

    def note(self, text: str) -> None:
        """Write a remark, in as many lines as it takes."""
        words = [(word, False) for word in drawable(text).split(" ")]
        lines: list[str] = [""]
        for word, _ in words:
            longer = f"{lines[-1]} {word}".strip()
            if text_width(longer, SMALL) > _points(WIDTH - 2 * MARGIN) and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer

        def draw(page: Page, top: float) -> None:
            for number, line in enumerate(lines):
                page.text(MARGIN, top + 0.1 + 0.13 * number, line, SMALL, SOFT, style="italic")

        self._blocks.append((0.13 * len(lines) + 0.06, draw))

    # Text ----------------------------------------------------------------------------------------------------------

    def tokens(self, tokens: Sequence[str], is_image: Sequence[bool], is_edited: Sequence[bool]) -> None:
        """Write a row's tokens, edited ones on orange; long stretches by their ends."""
        chips = chips_of(tokens, is_image, is_edited, LONGEST, KEPT)
        lines = break_lines(chips, BODY, _points(WIDTH - 2 * MARGIN))
        step = 0.21

        def draw(page: Page, top: float) -> None:
            for number, line in enumerate(lines):
                for x, wide, chip in line:
                    left, y = MARGIN + POINT * x, top + step * number
                    page.box(left, y + 0.01, POINT * wide, step - 0.04, EDITED if chip.is_edited else PLAIN)
                    style = {"style": "italic"} if chip.is_fold else {}
                    color = INK if chip.is_edited or not chip.is_fold else SOFT
                    page.text(left + POINT * 0.3 * BODY, y + 0.135, chip.text, BODY, color, **style)

        self._blocks.append((step * len(lines) + 0.12, draw))

    # Pictures ------------------------------------------------------------------------------------------------------

    def pictures(self, cells: Sequence[Cell]) -> None:
        """Draw pictures, as many beside each other as fit."""
        per_row = int((WIDTH - 2 * MARGIN + GAP) // (CELL + GAP))
        for start in range(0, len(cells), per_row):
            self._row_of_pictures(cells[start : start + per_row])

    def _row_of_pictures(self, cells: Sequence[Cell]) -> None:
        sizes = [_fit(cell, CELL) for cell in cells]
        head = 0.17 + 0.14 * (max(len([line for line in cell.lines if line]) for cell in cells) - 1) + 0.06

        def draw(page: Page, top: float) -> None:
            for number, (cell, (width, height)) in enumerate(zip(cells, sizes, strict=True)):
                left = MARGIN + number * (CELL + GAP)
                _write_lines(page, left, top, cell, CELL, TITLE)
                _draw_cell(page.axes(left, top + head, width, height), cell, 1.0)

        self._blocks.append((head + max(height for _, height in sizes) + 0.2, draw))

    def maps(self, cells: Sequence[Cell], most: float) -> None:
        """Draw maps of values from 0 to `most` in one row, with their scale."""
        size = (WIDTH - 2 * MARGIN - 0.75 - 0.1 * (len(cells) - 1)) / max(len(cells), 7)
        sizes = [_fit(cell, size) for cell in cells]
        tallest = max(height for _, height in sizes)

        def draw(page: Page, top: float) -> None:
            for number, (cell, (width, height)) in enumerate(zip(cells, sizes, strict=True)):
                left = MARGIN + number * (size + 0.1)
                _write_lines(page, left, top, cell, size, SMALL)
                _draw_cell(page.axes(left, top + 0.18, width, height), cell, most)
            right = MARGIN + len(cells) * (size + 0.1)
            _draw_scale(page, right, top + 0.18, tallest, most)

        self._blocks.append((0.18 + tallest + 0.15, draw))

    # Maps of tokens ------------------------------------------------------------------------------------------------

    def strip(self, mask_N: Tensor) -> None:
        """Draw which of some tokens are edited, in their order."""
        self._grid(mask_N[None].float(), [""], None, None)

    def heat(self, values_KN: Tensor, names: Sequence[str], labels: Sequence[str] | None, most: float) -> None:
        """Draw values of tokens by layer."""
        self._grid(values_KN, names, labels, most)

    def token_heat(
        self, values_KL: Tensor, names: Sequence[str], tokens: Sequence[str], is_image: Sequence[bool], most: float
    ) -> None:
        """Draw values of a row's tokens by layer, image tokens by their mean, long stretches by their ends."""
        is_edited = (~values_KL.isnan()).any(0).tolist()
        chips = chips_of(tokens, is_image, is_edited, LONGEST_COLUMNS, KEPT_COLUMNS)
        columns = [values_KL[:, chip.places.start : chip.places.stop].nanmean(1) for chip in chips]
        self._grid(torch.stack(columns, 1), names, [chip.text for chip in chips], most)

    def _grid(self, values_KN: Tensor, names: Sequence[str], labels: Sequence[str] | None, most: float | None) -> None:
        num_rows, num_columns = values_KN.shape
        left = MARGIN + POINT * max([text_width(name, SMALL) for name in names]) + (0.5 if any(names) else 0.0)
        width = WIDTH - MARGIN - left - (0.75 if most is not None else 0.0)
        width = min(width, 0.42 * num_columns)
        above = 0.13 if any(names) else 0.04
        step = 0.2 if num_rows <= 12 else max(0.06, 2.4 / num_rows)
        shown = [cut(label, SMALL, 80) for label in labels or []]
        below = 0.08 + POINT * max([0.0, *(text_width(label, SMALL) for label in shown)]) * 0.85

        def draw(page: Page, top: float) -> None:
            axes = page.axes(left, top + above, width, step * num_rows)
            if most is None:
                axes.imshow(
                    values_KN.numpy(), aspect="auto", cmap=_two_colours(), vmin=0, vmax=1, interpolation="nearest"
                )
            else:
                _draw_values(axes, values_KN, most, aspect="auto")
                _draw_scale(page, left + width + 0.12, top + above, max(0.6, step * num_rows), most)
            _lines_between(axes, num_rows, num_columns)
            if any(names):
                page.text(left - 0.08, top + above - 0.03, "layer", SMALL, SOFT, ha="right")
            every = math.ceil(0.11 / step)
            for number in range(0, num_rows, every):
                y = top + above + step * (number + 0.5) + 0.035
                page.text(left - 0.08, y, names[number], SMALL, SOFT, ha="right")
            sparse = math.ceil(len(shown) / MAX_LABELS)
            for number in range(0, len(shown), max(1, sparse)):
                x, y = left + width * (number + 0.6) / num_columns, top + above + 0.06 + step * num_rows
                style: dict[str, Any] = {"ha": "right", "va": "top", "rotation": 55, "rotation_mode": "anchor"}
                page.text(x, y, shown[number], SMALL, **style)

        height = max(step * num_rows, 0.6 if most is not None and not shown else 0.0)
        self._blocks.append((above + height + below + 0.14, draw))


def _points(inches: float) -> float:
    return inches / POINT


def _fit(cell: Cell, size: float) -> tuple[float, float]:
    """Return width and height of a picture in a square."""
    height, width = cell.shape
    scale = size / max(height, width)
    return width * scale, height * scale


def _write_lines(page: Page, left: float, top: float, cell: Cell, width: float, size: float) -> None:
    y = top + 0.15
    for number, line in enumerate(line for line in cell.lines if line):
        style = {"weight": "bold"} if number == 0 and len(cell.lines) > 1 else {}
        here = size if number == 0 else SMALL
        page.text(
            left, y, cut(drawable(line), here, _points(width), **style), here, INK if number == 0 else SOFT, **style
        )
        y += 0.14


def _draw_cell(axes: "Axes", cell: Cell, most: float) -> None:
    if cell.values_RC is not None:
        _draw_values(axes, cell.values_RC, most)
        return
    rows, cols = (1, 1) if cell.mask_RC is None else cell.mask_RC.shape
    place = (0, cols, rows, 0)
    if cell.picture is None:
        axes.set_facecolor(PLAIN)
    else:
        smooth = "nearest" if max(cell.picture.shape[:2]) < 200 else "antialiased"
        axes.imshow(cell.picture, extent=place, aspect="auto", interpolation=smooth)
    axes.set(xlim=(0, cols), ylim=(rows, 0))
    if cell.mask_RC is not None:
        _tint(axes, cell.mask_RC)


def _tint(axes: "Axes", mask_RC: Tensor) -> None:
    """Lay orange over marked patches, with lines around them, and a white veil over the others."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    veil_RC4 = np.zeros((*mask_RC.shape, 4))
    veil_RC4[:] = to_rgba("white", 0.5)
    veil_RC4[mask_RC.numpy()] = to_rgba(EDITED, 0.22)
    rows, cols = mask_RC.shape
    axes.imshow(veil_RC4, extent=(0, cols, rows, 0), aspect="auto", interpolation="nearest")
    inside = mask_RC[:, 1:] & mask_RC[:, :-1]
    thin = [[(c + 1, r), (c + 1, r + 1)] for r, c in _places(inside)]
    thin += [[(c, r + 1), (c + 1, r + 1)] for r, c in _places(mask_RC[1:] & mask_RC[:-1])]
    axes.add_collection(LineCollection(thin, colors=EDITED, linewidths=min(0.7, 8 / max(rows, cols))))
    around = torch.nn.functional.pad(mask_RC, (1, 1, 1, 1))
    lines = [[(c, r), (c, r + 1)] for r, c in _places(around[1:-1, 1:] != around[1:-1, :-1])]
    lines += [[(c, r), (c + 1, r)] for r, c in _places(around[1:, 1:-1] != around[:-1, 1:-1])]
    axes.add_collection(LineCollection(lines, colors=EDITED, linewidths=1.8, capstyle="projecting", clip_on=False))


def _places(mask_RC: Tensor) -> list[list[int]]:
    return mask_RC.nonzero().tolist()


def _draw_values(axes: "Axes", values_RC: Tensor, most: float, aspect: Literal["equal", "auto"] = "equal") -> None:
    axes.imshow(values_RC.numpy(), cmap=_scale_colours(), vmin=0, vmax=most, interpolation="nearest", aspect=aspect)


def _lines_between(axes: "Axes", num_rows: int, num_columns: int) -> None:
    width = 0.8 if num_columns <= 80 else 0.3 if num_columns <= 200 else 0.0
    axes.vlines([n - 0.5 for n in range(1, num_columns)], -0.5, num_rows - 0.5, color="white", linewidth=width)
    axes.hlines([n - 0.5 for n in range(1, num_rows)], -0.5, num_columns - 0.5, color="white", linewidth=width)


def _scale_colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad=PLAIN)


def _two_colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([PLAIN, EDITED])


def _draw_scale(page: Page, left: float, top: float, height: float, most: float) -> None:
    height = min(height, 1.3)
    axes = page.axes(left, top, 0.1, height)
    axes.imshow(np.linspace(1, 0, 128)[:, None], cmap=_scale_colours(), aspect="auto", extent=(0, 1, 0, 1))
    for share in (0.0, 0.5, 1.0):
        page.text(left + 0.15, top + height * (1 - share) + 0.035, f"{share * most:.2g}", SMALL, SOFT)
