"""Text as a figure can draw it: characters that its fonts have, widths, lines of tokens.

Sizes are in points. matplotlib is imported where it is used: drawing is rare, it is slow to import.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

# Fonts with the scripts that matplotlib's own lacks, tried in this order where they are installed.
FAMILIES = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Micro Hei", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Noto Sans", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Thai", "Noto Sans Tamil"),
)
MAX_CHARACTERS = 400  # no line of a figure holds more
MARKS = {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u21b5"}
BLANK, UNKNOWN, MORE = "\u2423", "\u25a1", "\u2026"


@dataclass(frozen=True)
class Chip:
    """A token, or several that are shown as one (is_fold): what is written, whether edited, the tokens' numbers.

    starts_word: whether a blank stands in front of it.
    """

    text: str
    is_edited: bool
    places: range
    is_fold: bool = False
    starts_word: bool = False


@cache
def fonts() -> tuple[str, ...]:
    """Return the families to draw with: matplotlib's own first, then those installed for other scripts."""
    from matplotlib.font_manager import fontManager

    installed = {entry.name for entry in fontManager.ttflist}
    return tuple(name for name in FAMILIES if name in installed)


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found: set[int] = set()
    for name in fonts():
        found |= set(get_font(findfont(FontProperties(family=[name]))).get_charmap())
    return frozenset(found)


def drawable(text: str) -> str:
    """Return a text in one line without blanks around it, with a mark for each character that no font here has."""
    known = _characters()
    if text and not text.strip(" "):
        return BLANK * min(len(text), 4)
    marked = "".join(MARKS.get(character, character) for character in text.strip(" "))
    return "".join(c if c.isprintable() and ord(c) in known else UNKNOWN for c in marked)


def text_width(text: str, size: float, **style: Any) -> float:
    """Return how wide a text is."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    properties = FontProperties(family=list(fonts()), size=size, **style)
    return text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]


def cut(text: str, size: float, width: float, **style: Any) -> str:
    """Return a text that is no wider than `width`, its end left out if it has to be."""
    text = text[:MAX_CHARACTERS]
    if text_width(text, size, **style) <= width:
        return text
    fits = bisect.bisect(range(1, len(text)), width, key=lambda n: text_width(text[:n] + MORE, size, **style))
    return text[:fits] + MORE


def chips_of(
    tokens: Sequence[str], is_image: Sequence[bool], is_edited: Sequence[bool], longest: int, kept: int
) -> list[Chip]:
    """Return the chips of a row: one for a run of image tokens, and one in the middle of a run of more than `longest`.

    Of a longer run, of tokens that are all edited or all not, `kept` are shown on either side.
    """
    chips: list[Chip] = []
    for places in _runs(
        list(zip(is_image, [e and not i for e, i in zip(is_edited, is_image, strict=True)], strict=True))
    ):
        first, num_edited = places[0], sum(is_edited[place] for place in places)
        if is_image[first]:
            share = f"{num_edited} of " if 0 < num_edited < len(places) else ""
            chips.append(Chip(f"image \u00d7 {share}{len(places)}", num_edited > 0, places, is_fold=True))
            continue
        middle = places[kept:-kept] if len(places) > longest else places[:0]
        for place in places:
            if place not in middle:
                text = tokens[place]
                chips.append(
                    Chip(drawable(text), is_edited[first], range(place, place + 1), False, text.startswith(" "))
                )
            elif place == middle[0]:
                chips.append(Chip(f"{MORE} {len(middle)} tokens {MORE}", is_edited[first], middle, is_fold=True))
    return chips


def _runs(kinds: Sequence[tuple[bool, bool]]) -> Iterator[range]:
    start = 0
    for place in range(1, len(kinds) + 1):
        if place == len(kinds) or kinds[place] != kinds[start]:
            yield range(start, place)
            start = place


def break_lines(chips: Sequence[Chip], size: float, width: float) -> list[list[tuple[float, float, Chip]]]:
    """Return lines of (left, width, chip), none beyond `width`; a chip that is wider is cut."""
    lines: list[list[tuple[float, float, Chip]]] = [[]]
    x = 0.0
    for chip in chips:
        text = cut(chip.text, size, width - size)
        wide = text_width(text, size) + 0.6 * size
        gap = 0.0 if not lines[-1] else 0.55 * size if chip.starts_word else 0.25 * size
        if lines[-1] and x + gap + wide > width:
            lines.append([])
            x = gap = 0.0
        lines[-1].append((x + gap, wide, replace(chip, text=text)))
        x += gap + wide
    return lines
