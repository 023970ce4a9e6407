"""The page of a search: the best, the front, which choices mattered, every trial, and dev against what was spent."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.page import Line, chart, escaped, facts, page, section, table

Trial = Mapping[str, Any]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other one beats: better or as good in dev, trained numbers, seconds, memory."""
    whole = [trial for trial in trials if not trial["stopped"]]
    return sorted((one for one in whole if not any(_beats(other, one) for other in whole)), key=lambda one: -one["dev"])


def _beats(one: Trial, other: Trial) -> bool:
    mine, theirs = _costs(one), _costs(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _costs(trial: Trial) -> tuple[float, ...]:
    return -trial["dev"], trial["num_trained"], trial["seconds"], trial["peak_memory"]


def best_so_far(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """Return (spent, best dev value of a whole trial) in the trials' order."""
    points, spent, best = [], 0.0, float("-inf")
    for trial in trials:
        spent += trial["spent"]
        if not trial["stopped"] and trial["dev"] > best:
            best = trial["dev"]
            points.append((spent, best))
    return [*points, (spent, best)] if points else []


def search_page(title: str, model: str, record: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """Return the page as HTML."""
    trials, unit = record["trials"], record["budget"]["unit"]
    line = f"{model} · {record['method']} · {record['budget']['spent']:.4g} of {record['budget']['amount']:g} {unit}"
    lines = [
        Line(stage, best_so_far([trial for trial in trials if trial["stage"] == stage]))
        for stage in dict.fromkeys(trial["stage"] for trial in trials)
    ]
    measured = "operations" if unit == "operations" else "seconds"
    parts = (
        f'<header><p class="soft">{escaped(record["task"])}</p><h1>{escaped(title)}</h1>'
        f'<p class="soft">{escaped(line)}</p></header>',
        section("The best on dev", facts({"dev": f"{best['dev']:.4f}", "trained numbers": f"{best['num_trained']:,}",
                                           **best["choice"]})),
        section("What was found when", chart("best on dev of a stage", lines, measured + " in that stage")),
        section("Which choices mattered", *(_importances(*entry) for entry in record["importances"].items())),
        section("What no other trial beats", _trials(front(trials))),
        section("Trials", _trials(trials)),
        section("What was run", facts({**record["versions"], **record["identity"]["data"]})),
    )  # fmt: skip
    return page(title, "\n".join(filter(None, parts)))


def _importances(stage: str, shares: Mapping[str, float]) -> str:
    if not shares:
        return f'<p class="soft">{escaped(stage)}: too few whole trials to say.</p>'
    rows = [[escaped(name), f"{share:.2f}"] for name, share in shares.items()]
    return f"<h3>{escaped(stage)}</h3>{table(['choice', 'share'], rows)}"


def _trials(trials: Sequence[Trial]) -> str:
    if not trials:
        return ""
    columns = ["trial", "dev", "trained numbers", "seconds", "memory, MB", "steps", "choice"]
    rows = [
        [
            escaped(f"{trial['stage']} {trial['number']}"),
            f"{trial['dev']:.4f}",
            f"{trial['num_trained']:,}",
            f"{trial['seconds']:.1f}",
            f"{trial['peak_memory'] / 1e6:,.0f}",
            f"{trial['steps']}/{trial['num_steps']}",
            escaped(", ".join(f"{key}={value}" for key, value in trial["choice"].items())),
        ]
        for trial in trials
    ]
    return table(columns, rows, ["sub" if trial["stopped"] else "" for trial in trials])
