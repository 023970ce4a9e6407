"""`write_report`: one run as one HTML file that needs nothing else: no network, no other file, no script.

A `Report` is plain data that its caller has gathered; nothing is computed here but means, SDs and Holm's correction.
The file stays small: at most 24 examples, pictures of 256 pixels, 4 drawings, long texts and curves cut as the page
says.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.cards import Example, cards, count_groups, examples_of
from tasks.metrics.score import Score
from tasks.page import Line, chart, drawing, escaped, facts, page, section, table
from tasks.statistics import Comparison, holm, mean_sd

__all__ = [
    "Curve", "DataPart", "Drawing", "Example", "Opening", "PartScores", "Report", "Trial",
    "count_groups", "examples_of", "report_html", "write_report",
]  # fmt: skip
NOT_KNOWN = (math.nan, None)
MAX_DRAWINGS = 4


@dataclass(frozen=True)
class DataPart:
    """What a part of the data was."""

    name: str
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class Curve:
    """One training: (step, loss) and (step, dev score) points."""

    name: str
    loss: Sequence[tuple[float, float]] = ()
    dev: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Trial:
    """A candidate and its score on dev (None if it has none); `selected` is the one that went on to the test."""

    settings: Mapping[str, Any]
    dev: float | None
    selected: bool = False


@dataclass(frozen=True)
class PartScores:
    """The scores on one test part, of the base and of the adapter.

    adapted: by the name of each seed ("seed 0").
    comparison: of the adapter (A, all seeds) with the base (B).
    """

    part: str
    base: Score | None = None
    adapted: Mapping[str, Score] = field(default_factory=dict)
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Opening:
    """When the sealed test was opened, and why, or what else is to be known about it."""

    opened: str
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure of where the adapter's edits act in a test row; png: the file's bytes."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    factor: what scores are multiplied by for show: 100 for shares, 1 for points.
    num_trained: trained numbers by kind; num_weights: those of the base.
    seconds: of all trainings; peak_memory: in bytes.
    num_by_group: how many of all test rows are in each group of examples, see `count_groups`.
    """

    title: str
    task: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[DataPart] = ()
    seeds: Sequence[int] = ()
    num_trained: Mapping[str, int] = field(default_factory=dict)
    num_weights: int | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    device: str = ""
    curves: Sequence[Curve] = ()
    trials: Sequence[Trial] = ()
    scores: Sequence[PartScores] = ()
    openings: Sequence[Opening] = ()
    examples: Sequence[Example] = ()
    num_by_group: Mapping[str, int] = field(default_factory=dict)
    drawings: Sequence[Drawing] = ()
    notes: Sequence[str] = ()
    factor: float = 100.0


def write_report(path: str | Path, run: Report) -> None:
    """Write the report to one HTML file; an interrupted write leaves the former one as it was.

    Raises: ValueError for more than 24 examples or 4 drawings, pictures that cannot be read, scores that do not fit
    together.
    """
    html = report_html(run)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as out:
            out.write(html)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def report_html(run: Report) -> str:
    """Return the report as HTML; the same report gives the same text."""
    _check_scores(run.scores)
    seeds = f"seeds {', '.join(map(str, run.seeds))}" if run.seeds else ""
    line = " · ".join(filter(None, (run.model, seeds, run.device)))
    parts = (
        f'<header><p class="soft">{escaped(run.task)}</p><h1>{escaped(run.title)}</h1>'
        f'<p class="soft">{escaped(line)}</p></header>',
        _headline(run),
        _sealed(run),
        *(f'<p class="notice">{escaped(note)}</p>' for note in run.notes),
        section("Scores", _scores(run)),
        section("Training", _curves(run)),
        section("Trials on dev", _trials(run)),
        section("Examples", cards(run.examples, run.num_by_group)),
        section("Where the edits act", _drawings(run.drawings)),
        section("What was run", *_setting(run)),
    )
    return page(run.title, "\n".join(filter(None, parts)))


def _drawings(drawings: Sequence[Drawing]) -> str:
    if len(drawings) > MAX_DRAWINGS:
        raise ValueError(f"{len(drawings)} drawings; a report shows {MAX_DRAWINGS} at most: take fewer.")
    return "\n".join(drawing(one.png, one.caption) for one in drawings)


# Scores --------------------------------------------------------------------------------------------------------------


def _check_scores(scores: Sequence[PartScores]) -> None:
    for part in scores:
        if part.base is None and not part.adapted:
            raise ValueError(f"the part {part.part!r} has no scores; leave it out.")
        if part.adapted.keys() != scores[0].adapted.keys() or (part.base is None) != (scores[0].base is None):
            raise ValueError(f"the parts {scores[0].part!r} and {part.part!r} have scores of different runs.")
        if part.comparison is not None:
            _check_comparison(part, part.comparison)


def _check_comparison(part: PartScores, comparison: Comparison) -> None:
    values = [score.value for score in part.adapted.values()]
    if part.base is None or not values:
        raise ValueError(f"the part {part.part!r} has a comparison, but not both base and adapter; add the other.")
    difference = _mean_sd(values)[0] - part.base.value
    if abs(difference - comparison.difference) > 1e-6 * max(1.0, abs(part.base.value)):
        raise ValueError(
            f"the part {part.part!r} has scores that differ by {difference:.6g} and a comparison that says "
            f"{comparison.difference:.6g}; compare these answers (A the adapter, B the base)."
        )


def _headline(run: Report) -> str:
    if not run.scores:
        return ""
    base, adapted = _over_parts(run.scores)
    shown, sd = _mean_sd(adapted) if adapted else (base, None)
    assert shown is not None
    where = run.scores[0].part if len(run.scores) == 1 else f"{len(run.scores)} tests, their mean"
    how = f"mean ± SD of {len(adapted)} seeds" if len(adapted) > 1 else "one seed" if adapted else "the base alone"
    names = ", ".join(dict.fromkeys(score.name for part in run.scores for score in _all_scores(part)))
    number = _number(shown, run) + ("" if sd is None else f" <small>± {_number(sd, run)}</small>")
    entries = []
    if adapted and base is not None:
        entries += [("base", _number(base, run)), ("difference", _signed(shown - base, run))]
        comparison = run.scores[0].comparison
        if len(run.scores) == 1 and comparison is not None:
            entries += [("95 % interval", _interval(comparison, run)), ("p", _p(comparison.p_value))]
    items = "".join(f"<div><dt>{name}</dt><dd>{html}</dd></div>" for name, html in entries)
    return (
        f'<section class="headline"><div><p class="number">{number}</p>'
        f'<p class="soft">{escaped(names)} on {escaped(where)}; {how}</p></div>{f"<dl>{items}</dl>" if items else ""}'
        "</section>"
    )


def _over_parts(scores: Sequence[PartScores]) -> tuple[float | None, list[float]]:
    """The base's value and each seed's, as means over the parts."""
    bases = [part.base.value for part in scores if part.base is not None]
    by_seed = [[part.adapted[name].value for part in scores] for name in scores[0].adapted]
    return _mean_sd(bases)[0] if bases else None, [_mean_sd(values)[0] for values in by_seed]


def _scores(run: Report) -> str:
    if not run.scores:
        return ""
    names = list(run.scores[0].adapted)
    compared = [part.comparison for part in run.scores if part.comparison is not None]
    corrected = holm([comparison.p_value for comparison in compared])
    with_base, with_mean = run.scores[0].base is not None, len(names) > 1
    columns = ["test", *(["base"] if with_base else []), *names, *(["mean", "SD"] if with_mean else [])]
    if compared:
        columns += ["difference", "95 % interval", "p", *(["p (Holm)"] if len(compared) > 1 else [])]
    rows, marks = [], []
    for part in run.scores:
        row = _values(part.part, part.base, part.adapted, None, run)
        if part.comparison is not None:
            p_values = [part.comparison.p_value, corrected.pop(0)][: 2 if len(compared) > 1 else 1]
            row += [_signed(part.comparison.difference, run), _interval(part.comparison, run), *map(_p, p_values)]
        names_of_parts = list(dict.fromkeys(name for score in _all_scores(part) for name in score.parts))
        rows += [row, *(_values(name, part.base, part.adapted, name, run) for name in names_of_parts)]
        marks += ["", *["sub"] * len(names_of_parts)]
    filled = [row + [""] * (len(columns) - len(row)) for row in rows]
    return table(columns, filled, marks) + _remarks(run, compared)


def _values(label: str, base: Score | None, adapted: Mapping[str, Score], part: str | None, run: Report) -> list[str]:
    """A row's cells: the scores' values, or those of a part of them."""
    found = [score.value if part is None else score.parts.get(part) for score in adapted.values()]
    cells = [] if base is None else [base.value if part is None else base.parts.get(part)]
    cells += found
    if len(found) > 1:
        cells += _mean_sd([math.nan if value is None else value for value in found])
    return [escaped(label), *("" if value is None else _number(value, run) for value in cells)]


def _remarks(run: Report, compared: Sequence[Comparison]) -> str:
    lines = []
    for part in run.scores:
        over = dict.fromkeys(score.over for score in _all_scores(part))
        lines.append(f"{part.part}: {_all_scores(part)[0].name}, over {'; '.join(over)}")
    for comparison in dict.fromkeys((c.num_samples, c.route) for c in compared):
        what = "the rows' scores" if comparison[1] == "rows" else "the rows, the metric computed on each"
        lines.append(f"Interval and p: paired bootstrap, {comparison[0]:,} resamples of {what}; seeds held fixed.")
    return "".join(f'<p class="soft">{escaped(line)}</p>' for line in lines)


def _mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and SD; a score that is not a number is shown as what it is."""
    return mean_sd(values) if all(map(math.isfinite, values)) else NOT_KNOWN


def _all_scores(part: PartScores) -> list[Score]:
    return [*([] if part.base is None else [part.base]), *part.adapted.values()]


def _number(value: float, run: Report) -> str:
    return f"{run.factor * value:.2f}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float, run: Report) -> str:
    return f"{run.factor * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _interval(comparison: Comparison, run: Report) -> str:
    return "[{}, {}]".format(*(_signed(bound, run) for bound in comparison.interval))


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


# What was done -------------------------------------------------------------------------------------------------------


def _sealed(run: Report) -> str:
    if not run.openings:
        text = "There is no record of when the sealed test was opened." if run.scores else "The test is still sealed."
        return f'<p class="soft">{text}</p>'
    if len(run.openings) == 1:
        opening = run.openings[0]
        note = f" ({opening.note})" if opening.note else ""
        return f'<p class="soft">The sealed test was opened once, on {escaped(opening.opened + note)}.</p>'
    entries = "".join(f"<li>{escaped(f'{o.opened}: {o.note}' if o.note else o.opened)}</li>" for o in run.openings)
    return (
        f'<div class="notice">The sealed test was opened {len(run.openings)} times; the numbers are of the last '
        f"time.<ol>{entries}</ol></div>"
    )


def _curves(run: Report) -> str:
    loss = [Line(curve.name, curve.loss) for curve in run.curves if curve.loss]
    dev = [
        Line(curve.name, [(step, run.factor * value) for step, value in curve.dev]) for curve in run.curves if curve.dev
    ]
    charts = chart("training loss", loss) + chart("score on dev", dev)
    return f'<div class="charts">{charts}</div>' if charts else ""


def _trials(run: Report) -> str:
    if not run.trials:
        return ""
    names = list(dict.fromkeys(name for trial in run.trials for name in trial.settings))
    rows, marks = [], []
    for trial in run.trials:
        settings = [escaped(_plain(trial.settings[name])) if name in trial.settings else "" for name in names]
        dev = "none" if trial.dev is None else _number(trial.dev, run)
        rows.append([*settings, dev, "selected" if trial.selected else ""])
        marks.append("chosen" if trial.selected else "")
    return table([*names, "dev", ""], rows, marks)


def _setting(run: Report) -> list[str]:
    general: dict[str, Any] = {"model": run.model, "seeds": ", ".join(map(str, run.seeds)), "device": run.device}
    total = sum(run.num_trained.values())
    if total:
        kinds = ", ".join(f"{name} {number:,}" for name, number in run.num_trained.items())
        share = f"; {100 * total / run.num_weights:.4f} % of the base's {run.num_weights:,}" if run.num_weights else ""
        general["trained numbers"] = f"{total:,} ({kinds}){share}"
    if run.seconds is not None:
        general["training time"] = _duration(run.seconds)
    if run.peak_memory is not None:
        general["peak memory"] = f"{run.peak_memory / 2**30:.2f} GiB"
    parts = [facts({key: value for key, value in general.items() if value})]
    if run.data:
        rows = [[escaped(part.name), f"{part.num_rows:,}", f"<code>{escaped(part.sha256)}</code>"] for part in run.data]
        parts += ["<h3>Data</h3>", table(("part", "rows", "SHA-256"), rows)]
    for title, entries in (("Configuration", run.config), ("Hyperparameters", run.hyperparameters)):
        parts += [f"<h3>{title}</h3>", facts(_flat(entries))] if entries else []
    return [*parts, *(["<h3>Versions</h3>", facts(run.versions)] if run.versions else [])]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {whole % 60:02} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names."""
    flat: dict[str, str] = {}
    for key, value in entries.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            flat |= _flat({str(place): item for place, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
