"""The table of a comparison: scores, differences from the first method, costs, and what was forgotten."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.compare.comparison import Comparison
from tasks.methods.table import METHODS
from tasks.search.budget import Unit
from tasks.statistics import Comparison as Difference
from tasks.statistics import holm, mean_sd, paired_bootstrap
from tasks.table import TASKS


@dataclass(frozen=True)
class Line:
    """One method. Scores are means over the seeds with their standard deviations (None for one seed).

    difference: of the first method from this one on the test, with p corrected for all comparisons of the table.
    own: each own task's score; num_bytes: of the file of what was trained; step: milliseconds of a training step, of
    the processor on a CPU, so that what runs beside does not count; by the clock where operations are the budget.
    spent: by the tuning; trained: by one final training.
    """

    name: str
    title: str
    num_trained: int
    num_bytes: int
    dev: float
    test: float
    test_sd: float | None
    own: Mapping[str, float]
    difference: Difference | None
    p_value: float | None
    step: float
    peak_memory: int
    prefill: float | None
    decode: float | None
    spent: float
    trained: float
    num_trials: int
    choice: Mapping[str, Any]


def lines_of(comparison: Comparison) -> list[Line]:
    """Return the table's lines in the order of the methods; comparisons of answers are paired and corrected by Holm."""
    names, part = comparison.plan.methods, comparison.tests[0]
    key = f"{comparison.task.name}/{part}"
    costs = comparison.costs(names)
    differences = _differences(comparison, part)
    corrected = dict(zip(differences, holm([one.p_value for one in differences.values()]), strict=True))
    lines = []
    for name in names:
        data = comparison.manifests[name].data
        trials, cost = data["trials"], costs.get(name)
        mean, spread = mean_sd([score["value"] for score in data["test"]["scores"][key]["adapters"]])
        lines.append(
            Line(
                name=name,
                title=METHODS[name].title,
                num_trained=trials[0]["num_trained"],
                num_bytes=trials[0]["num_bytes"],
                dev=statistics.fmean(trial["dev"] for trial in trials),
                test=mean,
                test_sd=spread,
                own={other: _own(data, other) for other in comparison.plan.own},
                difference=differences.get(name),
                p_value=corrected.get(name),
                step=1e3 * statistics.median(_step(trial, comparison.plan.budget.unit) for trial in trials),
                peak_memory=max(trial["peak_memory"] for trial in trials),
                prefill=None if cost is None else cost.prefill,
                decode=None if cost is None else cost.decode,
                spent=data["found"]["spent"],
                trained=statistics.median(trial["spent"] for trial in trials),
                num_trials=len(data["found"]["trials"]),
                choice=data["selection"]["choice"],
            )
        )
    return lines


def _step(trial: Mapping[str, Any], unit: Unit) -> float:
    """Seconds of a step, dev's left out."""
    seconds = trial["seconds"] if unit == "operations" else trial["spent"] - trial["dev_spent"]
    return seconds / trial["steps"]


def _own(data: Mapping[str, Any], name: str) -> float:
    """The mean of an own task's parts and seeds."""
    scores = [data["test"]["scores"][f"{name}/{part}"]["adapters"] for part in TASKS[name].parts.tests]
    return statistics.fmean(score["value"] for part in scores for score in part)


def _differences(comparison: Comparison, part: str) -> dict[str, Difference]:
    """The first method against each other one, on the rows that both answered."""
    task = comparison.task
    first, *others = comparison.plan.methods
    if task.kind == "pairs" or not others:  # a resample of captions is no set of queries
        return {}
    rows, mine = comparison.texts(task, part), comparison.answers(first, task, part)
    return {name: paired_bootstrap(task.metric, mine, comparison.answers(name, task, part), rows) for name in others}


def base_scores(comparison: Comparison) -> dict[str, float]:
    """Return the base's own scores, by test part."""
    first = comparison.manifests[comparison.plan.methods[0]].data["test"]["scores"]
    return {part: scores["base"]["value"] for part, scores in first.items()}


def markdown(comparison: Comparison, lines: list[Line]) -> str:
    """Return the table as Markdown."""
    base = base_scores(comparison)
    own = list(comparison.plan.own)
    head = ["method", "trained numbers", "dev", "test", *own, "p", "step, ms", "memory, MB", "decode, ms", "trials"]
    first = f"{comparison.task.name}/{comparison.tests[0]}"
    olds = [f"{base[f'{name}/{TASKS[name].parts.tests[0]}']:.3f}" for name in own]
    rows = [["base", "0", "", f"{base[first]:.3f}", *olds, "", "", "", "", ""]]
    for line in lines:
        spread = "" if line.test_sd is None else f" ± {line.test_sd:.3f}"
        p_value = "" if line.p_value is None else f"{line.p_value:.3f}"
        decode = "" if line.decode is None else f"{line.decode:.2f}"
        rows.append(
            [
                line.title,
                f"{line.num_trained:,}",
                f"{line.dev:.3f}",
                f"{line.test:.3f}{spread}",
                *(f"{line.own[name]:.3f}" for name in own),
                p_value,
                f"{line.step:.1f}",
                f"{line.peak_memory / 1e6:,.0f}",
                decode,
                str(line.num_trials),
            ]
        )
    return as_table(head, rows)


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown: names in the first column, numbers in the others."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def record(comparison: Comparison, lines: list[Line], cannot: Mapping[str, str]) -> dict[str, Any]:
    """Return all of it as JSON data."""
    plan = asdict(comparison.plan)
    return {
        "task": comparison.task.name,
        "plan": json.loads(json.dumps(plan)),
        "identity": comparison.identity,
        "base": base_scores(comparison),
        "lines": [asdict(line) for line in lines],
        "not_possible": dict(cannot),
        "methods": {name: manifest.data for name, manifest in comparison.manifests.items()},
    }
