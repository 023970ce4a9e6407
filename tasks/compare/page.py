"""The page of a comparison: the table, what differs surely, learning curves against what was spent, and the choices."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.compare.results import Line as Method
from tasks.page import Line, chart, escaped, facts, page, section, table
from tasks.search.page import best_so_far


def compare_page(title: str, model: str, record: Mapping[str, Any], lines: Sequence[Method]) -> str:
    """Return the page as HTML."""
    plan, unit = record["plan"], record["plan"]["budget"]["unit"]
    measured = "operations" if unit == "operations" else "seconds"
    budget = f"{plan['budget']['amount']:g} {unit} of tuning for each method, {len(plan['seeds'])} seeds"
    refused = [f'<p class="notice">{escaped(f"{n}: {why}")}</p>' for n, why in record["not_possible"].items()]
    parts = (
        f'<header><p class="soft">{escaped(record["task"])}</p><h1>{escaped(title)}</h1>'
        f'<p class="soft">{escaped(f"{model} · {budget}")}</p></header>',
        section("Scores", _scores(record, lines)),
        section("Differences from " + lines[0].title, _differences(lines)),
        section("Costs", _costs(lines, unit)),
        section(
            "Tuning",
            '<div class="charts">' + "".join(_tuning(name, data, measured) for name, data in record["methods"].items())
            + "</div>",
        ),
        section("Final trainings", '<div class="charts">' + _curves(record, measured) + "</div>"),
        section("What was chosen", *(f"<h3>{escaped(line.title)}</h3>{facts(line.choice)}" for line in lines)),
        section("What could not be compared", *refused),
        section("What was run", facts({**record["identity"]["versions"], **record["identity"]["data"]})),
    )  # fmt: skip
    return page(title, "\n".join(filter(None, parts)))


def _scores(record: Mapping[str, Any], lines: Sequence[Method]) -> str:
    own = list(record["plan"]["own"])
    base = record["base"]
    first = next(iter(base))
    before = [next(f"{value:.4f}" for part, value in base.items() if part.startswith(f"{name}/")) for name in own]
    rows = [["base", "0", "", f"{base[first]:.4f}", "", *before]]
    for line in lines:
        spread = "" if line.test_sd is None else f"{line.test_sd:.4f}"
        mine = [f"{line.own[name]:.4f}" for name in own]
        rows.append(
            [escaped(line.title), f"{line.num_trained:,}", f"{line.dev:.4f}", f"{line.test:.4f}", spread, *mine]
        )
    return table(["method", "trained numbers", "dev", "test", "SD over seeds", *own], rows)


def _differences(lines: Sequence[Method]) -> str:
    rows = []
    for line in lines:
        if (one := line.difference) is not None and line.p_value is not None:
            low, high = one.interval
            interval = f"[{low:+.4f}, {high:+.4f}]"
            rows.append([escaped(line.title), f"{one.difference:+.4f}", interval, f"{line.p_value:.4f}"])
    return table(["against", "difference", "95 % interval", "p (Holm)"], rows) if rows else ""


def _costs(lines: Sequence[Method], unit: str) -> str:
    columns = ["method", "file, kB", "peak memory, MB", "training step, ms", "prefill, ms", "decode, ms"]
    rows = [
        [
            escaped(line.title),
            f"{line.num_bytes / 1e3:,.1f}",
            f"{line.peak_memory / 1e6:,.0f}",
            f"{line.step:.1f}",
            "" if line.prefill is None else f"{line.prefill:.1f}",
            "" if line.decode is None else f"{line.decode:.2f}",
            f"{line.spent:.4g}",
            str(line.num_trials),
            f"{line.trained:.4g}",
        ]
        for line in lines
    ]
    return table([*columns, f"tuning, {unit}", "trials", "one final training"], rows)


def _tuning(name: str, data: Mapping[str, Any], measured: str) -> str:
    trials = data["found"]["trials"]
    stages = dict.fromkeys(trial["stage"] for trial in trials)
    found = [Line(stage, best_so_far([one for one in trials if one["stage"] == stage])) for stage in stages]
    return chart(f"{name}: best on dev of a stage", found, f"{measured} in that stage")


def _curves(record: Mapping[str, Any], measured: str) -> str:
    lines = [
        Line(name, [(spent, value) for spent, _, value in data["trials"][0]["curve"]])
        for name, data in record["methods"].items()
    ]
    return chart("dev of the first seed", lines, f"{measured} of that training")
