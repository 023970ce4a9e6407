"""The parts that a report's page is put together from: escaped text, tables, line charts as SVG, and the style sheet.

All functions return HTML. Those that take a `str` named `text` escape it; what is named `html` is taken as it is. The
page loads nothing: its own policy forbids it, pictures are data URIs.
"""

import base64
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from vlreft.data.samples import open_image

MAX_SIDE = 256  # of pictures, in pixels
MAX_TEXT = 4000  # characters of one text; what is beyond is counted, not shown
NUM_SHOWN = 280  # characters of a text before it is folded
NUM_POINTS = 300  # of a line in a chart; more are averaged
NUM_COLOURS = 6
MAX_DRAWING = 500_000  # bytes

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#22272b;--soft:#5f6870;--rule:#dcdfe0;--good:#2c6e58;
--bad:#9a4038;--warn:#fbf1d9;--c0:#2f6690;--c1:#b0702a;--c2:#3f7d5c;--c3:#8a5a83;--c4:#a34a45;--c5:#6b7478}
@media (prefers-color-scheme:dark){:root{--paper:#15181a;--card:#1c2023;--ink:#e3e6e7;--soft:#9ca5ab;--rule:#343a3e;
--good:#7cc0a4;--bad:#df958b;--warn:#39311d;--c0:#7fb2d9;--c1:#dba263;--c2:#86c3a0;--c3:#c79bc1;--c4:#dd8d87;
--c5:#a5aeb2}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.5rem;line-height:1.25;margin:0}h2{font-size:1.1rem;margin:2.5rem 0 .6rem}
h3{font-size:.95rem;margin:1.4rem 0 .5rem}p{margin:.3rem 0}
.soft,figcaption,th,dt{color:var(--soft);font-size:.85rem}
.headline{margin-top:1.2rem;padding:1rem 1.2rem;background:var(--card);border:1px solid var(--rule);border-radius:8px;
display:flex;flex-wrap:wrap;gap:.8rem 2.5rem;align-items:flex-end}
.headline .number{font-size:2.6rem;line-height:1.1;font-weight:600}.headline .number small{font-size:1.2rem;
font-weight:400;color:var(--soft)}
dl{margin:0;display:flex;flex-wrap:wrap;gap:.4rem 1.8rem}dd{margin:0}
.number,td,dd{font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{text-align:left;vertical-align:top;padding:.3rem 1rem .3rem 0;border-bottom:1px solid var(--rule)}
th{font-weight:500}table.numbers :is(th,td):not(:first-child){text-align:right;white-space:nowrap}
tr.sub td:first-child{padding-left:1rem}tr.sub td{color:var(--soft)}tr.chosen td{font-weight:600}
.facts td:last-child{overflow-wrap:anywhere;white-space:pre-wrap}
.notice{background:var(--warn);padding:.6rem .9rem;border-radius:6px;margin:.8rem 0}.notice ol{margin:.2rem 0 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.2rem}
figure{margin:0}svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid{stroke:var(--rule)}
.drawing{margin:0 0 1.4rem}.drawing img{display:block;max-width:100%;height:auto;background:#fff;border-radius:8px;
border:1px solid var(--rule);margin-bottom:.4rem}
.keys{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem;margin:.4rem 0 0;padding:0;list-style:none}
.keys svg{display:inline-block;width:1.5rem;height:.6rem;margin-right:.35rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:.9rem}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.8rem;font-size:.9rem;
break-inside:avoid;min-width:0}
.card img{display:block;max-width:100%;max-height:11rem;margin:0 auto .6rem;border-radius:4px}
.card .text{white-space:pre-wrap;overflow-wrap:anywhere}.card .ask{font-weight:600;margin-bottom:.4rem}
.card dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem .7rem}
.good{color:var(--good)}.bad{color:var(--bad)}summary{cursor:pointer}details[open] .start{display:none}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;--warn:#fff}body{font-size:10pt}
main{max-width:none;padding:0}.scroll{overflow:visible}tr,figure,.headline,.notice{break-inside:avoid}
h2,h3{break-after:avoid}.notice{border:1px solid #888}}
""" + "".join(f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}" for n in range(NUM_COLOURS))

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(text: str, html: str) -> str:
    """Return a whole document with this title and body."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(text)}</title><style>{STYLE}</style></head>\n<body><main>\n{html}\n</main></body></html>\n"
    )


def escaped(text: Any) -> str:
    """Return a text as HTML shows it: escaped, what is no character (controls, lone surrogates) as U+FFFD."""
    lines = str(text).replace("\r\n", "\n")
    shown = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in lines)
    return escape(shown, quote=True)


def folded(text: str) -> str:
    """Return a text; of a long one only the beginning, until it is opened."""
    if not text.strip():
        return '<i class="soft">(empty)</i>'
    whole = escaped(text[:MAX_TEXT])
    if len(text) > MAX_TEXT:
        whole += f'<i class="soft"> … {len(text) - MAX_TEXT:,} more characters</i>'
    if len(text) <= NUM_SHOWN:
        return whole
    start = escaped(text[:NUM_SHOWN])
    summary = f'<span class="start">{start}… </span><i class="soft">({len(text):,} characters)</i>'
    return f"<details><summary>{summary}</summary>{whole}</details>"


def section(text: str, *html: str) -> str:
    """Return a section under a heading; an empty one is left out."""
    body = "\n".join(filter(None, html))
    return f"<section><h2>{escaped(text)}</h2>\n{body}\n</section>" if body else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """Return a table of numbers, the first column names; cells are HTML. marks: a CSS class for each row."""
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    classes = marks or [""] * len(rows)
    body = ""
    for mark, row in zip(classes, rows, strict=True):
        start = f'<tr class="{mark}">' if mark else "<tr>"
        body += f"{start}{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n"
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(entries: Mapping[str, Any]) -> str:
    """Return names and what they are, in two columns."""
    rows = "\n".join(
        f'<tr><th scope="row">{escaped(key)}</th><td>{escaped(value)}</td></tr>' for key, value in entries.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>' if rows else ""


def thumbnail(picture: Image.Image, side: int = MAX_SIDE) -> Image.Image:
    """Return a small copy in RGB, no side longer than `side` pixels."""
    small = open_image(picture, "an example")
    small.thumbnail((side, side))
    return small


def data_uri(picture: Image.Image) -> str:
    """Return a picture's thumbnail as a data URI, as JPEG or PNG, whichever is smaller."""
    small = thumbnail(picture)
    kinds = {}
    for kind in ("jpeg", "png"):
        out = BytesIO()
        small.save(out, kind, quality=80, optimize=True)
        kinds[kind] = out.getvalue()
    kind = min(kinds, key=lambda name: len(kinds[name]))
    return f"data:image/{kind};base64,{base64.b64encode(kinds[kind]).decode()}"


def drawing(png: bytes, text: str) -> str:
    """Return a drawing, as large as it is where there is room, over its caption.

    Raises: ValueError for what is no PNG, or more than `MAX_DRAWING` bytes of one.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or len(png) > MAX_DRAWING:
        raise ValueError(
            f"the drawing {text!r} must be a PNG of at most {MAX_DRAWING:,} bytes, got {len(png):,} bytes."
        )
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = escaped(text)
    return f'<figure class="drawing"><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


# Charts --------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 398, 12, 200  # of the plot


@dataclass(frozen=True)
class Line:
    """A line of a chart: (step, value) points by step. Where a value is not finite the line has a gap."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(text: str, lines: Sequence[Line], along: str = "step") -> str:
    """Return a chart of values by step, or what else is `along`, with its legend; nothing without finite points."""
    drawn = [Line(line.name, averaged(line.points)) for line in lines]
    finite = [(x, y) for line in drawn for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = zip(*finite, strict=True)
    x_range, y_range = _padded(min(xs), max(xs), 0), _padded(min(ys), max(ys), 0.06)
    body = _axes(x_range, y_range) + "".join(_drawn(n, line, x_range, y_range) for n, line in enumerate(drawn))
    per_point = max(-(-len(line.points) // NUM_POINTS) for line in lines)
    note = f" (each point the mean of {per_point} or fewer)" if per_point > 1 else ""
    name = f"{escaped(text)}, by {escaped(along)}"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" role="img" aria-label="{name}">{body}</svg>'
    return f"<figure><figcaption>{name}{note}</figcaption>{svg}{_keys(drawn)}</figure>"


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `NUM_POINTS` points: means of neighbours, so that no part of a long training is left out."""
    size = -(-len(points) // NUM_POINTS)
    groups = (
        [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    )
    return [(math.fsum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Return about `num` round values (1, 2 or 5 times a power of ten apart) that lie in the range."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    first = math.ceil(low / step - 1e-9)
    return [step * place for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value
        space = abs(low) / 10 or 1.0
        return low - space, high + space
    return low - share * (high - low), high + share * (high - low)


def _axes(x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    parts = []
    for value in ticks(*y_range):
        y = _y(value, y_range)
        parts.append(f'<line class="grid" stroke="silver" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.5g}</text>')
    for value in ticks(*x_range):
        parts.append(f'<text x="{_x(value, x_range):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{value:.6g}</text>')
    return "".join(parts)


def _drawn(number: int, line: Line, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    path, pen = [], "M"
    for x, y in line.points:
        if math.isfinite(y):
            path.append(f"{pen}{_x(x, x_range):.1f} {_y(y, y_range):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    if not path:
        return ""
    shown = f'<path class="s{number % NUM_COLOURS}" {_stroke(number)} d="{"".join(path)}"><title>{escaped(line.name)}'
    shown += "</title></path>"
    if len(line.points) > 40:
        return shown
    return shown + "".join(
        f'<circle class="f{number % NUM_COLOURS}" r="2.4" cx="{_x(x, x_range):.1f}" cy="{_y(y, y_range):.1f}"><title>'
        f"{escaped(line.name)}, step {x:g}: {y:.5g}</title></circle>"
        for x, y in line.points
        if math.isfinite(y)
    )


def _keys(lines: Sequence[Line]) -> str:
    entries = ""
    for number, line in enumerate(lines):
        path = f'<path class="s{number % NUM_COLOURS}" {_stroke(number)} d="M0 5L24 5"/>'
        entries += f'<li><svg viewBox="0 0 24 10" aria-hidden="true">{path}</svg>{escaped(line.name)}</li>'
    return f'<ul class="keys">{entries}</ul>'


def _stroke(number: int) -> str:
    """How a line is drawn, its colour apart: another dash for each round through the colours."""
    dash = ("none", "5 3", "2 2", "8 3 2 3")[number // NUM_COLOURS % 4]
    pen = 'fill="none" stroke="currentColor" stroke-width="1.6" stroke-linejoin="round"'  # where no style is applied
    return f'{pen} stroke-dasharray="{dash}"'


def _x(value: float, span: tuple[float, float]) -> float:
    return LEFT + (value - span[0]) / (span[1] - span[0]) * (RIGHT - LEFT)


def _y(value: float, span: tuple[float, float]) -> float:
    return BOTTOM - (value - span[0]) / (span[1] - span[0]) * (BOTTOM - TOP)
