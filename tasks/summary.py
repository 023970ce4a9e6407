"""Makes the report of a finished run out of its manifest and its answers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.drawings import draw_adapter, place_to_draw
from tasks.metrics.answers import exact_match
from tasks.metrics.score import Score
from tasks.protocol import Run
from tasks.report import (
    Curve,
    DataPart,
    Opening,
    PartScores,
    Report,
    Trial,
    count_groups,
    examples_of,
    write_report,
)
from tasks.statistics import paired_bootstrap
from tasks.task import texts_of
from vlreft.training.answers import read_answers

PER_GROUP = 3  # examples of each group and test part, at most 24 in all


def write_summary(run: Run, path: Path) -> None:
    """Write the run's report, unless the one that is there is of this state of the run."""
    if path.exists() and path.stat().st_mtime_ns > run.manifest.path.stat().st_mtime_ns:
        return
    data = run.manifest.data
    settings, trials = data["settings"], data["trials"]
    scores, examples, groups, drawings, notes = [], [], {}, [], []
    for number, part in enumerate(data["test"]["scores"]):
        found, drawn, counted, right = _part(run, part)
        scores.append(found)
        examples += drawn
        if number == 0 and right is not None:
            rows, adapter = run.test_rows(part), run.folder / data["selection"]["adapters"][0]
            try:
                drawings = draw_adapter(run.loaded(run.task, rows), adapter, rows, place_to_draw(*right))
            except (
                ValueError
            ) as error:  # a model whose tokens cannot be told: a finished run has its report all the same
                notes.append(f"Where the edits act could not be drawn: {error}")
        groups = {name: groups.get(name, 0) + number for name, number in counted.items()}
    chosen = set(data["selection"]["adapters"])
    report = Report(
        title=run.task.title,
        task=run.task.name,
        model=settings["model"],
        config=settings["config"] or {},
        hyperparameters={key: value for key, value in settings.items() if key not in ("task", "model", "config")},
        versions=data["versions"],
        data=[DataPart(name, part["num_rows"], part["sha256"]) for name, part in data["data"].items()],
        seeds=settings["seeds"] if chosen else (),
        num_trained={} if not trials else trials[0]["num_trained"],
        num_weights=data.get("base", {}).get("num_weights"),
        seconds=sum(trial["seconds"] for trial in trials) if trials else None,
        peak_memory=max((trial["peak_memory"]["bytes"] for trial in trials), default=None),
        device=settings["device"],
        curves=[_curve(trial) for trial in trials],
        trials=[
            Trial({"lr": t["lr"], "seed": t["seed"], "steps": t["steps"]}, t["dev"]["value"], t["adapter"] in chosen)
            for t in trials
        ],
        scores=scores,
        openings=[Opening(opening["opened"], opening["reason"]) for opening in data["test"]["openings"]],
        examples=examples[: 4 * 2 * PER_GROUP],
        num_by_group=groups,
        drawings=drawings,
        notes=notes,
    )
    write_report(path, report)


def _part(run: Run, part: str) -> tuple[PartScores, list[Any], dict[str, int], list[Any] | None]:
    """A test part's scores, some examples of it, how many rows changed how, and how right each was and is."""
    task, scores = run.task, run.manifest.data["test"]["scores"][part]
    rows = run.test_rows(part)
    texts = list(texts_of(rows))
    before = read_answers(run.folder / scores["base"]["answers"])
    base = task.metric(before, texts)
    afters = [read_answers(run.folder / score["answers"]) for score in scores["adapters"]]
    if not afters:
        return PartScores(part, base), [], {}, None
    seeds = run.settings.seeds if run.settings.config is not None else [0]
    adapted = {f"seed {seed}": task.metric(after, texts) for seed, after in zip(seeds, afters, strict=True)}
    if task.kind == "pairs":  # a resample of captions is no set of queries: their pictures go with them
        return PartScores(part, base, adapted), [], {}, None
    is_number = all(math.isfinite(score.value) for score in (base, *adapted.values()))
    compared = paired_bootstrap(task.metric, afters, [before], texts) if is_number and len(texts) > 1 else None
    found = PartScores(part, base, adapted, compared)
    first = next(iter(adapted.values()))
    right = [_by_row(score, answers, texts) for score, answers in ((base, before), (first, afters[0]))]
    per_group = max(1, PER_GROUP // max(1, len(run.tests) - 1))
    drawn = examples_of(rows, before, afters[0], *right, per_group=per_group)
    return found, drawn, count_groups(*right), right


def _by_row(score: Score, answers: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """How right each answer is, in [0, 1]: its part of the score, or whether it equals the row's answer."""
    by_row = score.by_row if score.by_row is not None else exact_match(answers, rows).by_row
    assert by_row is not None
    return tuple(min(1.0, max(0.0, value)) for value in by_row)


def _curve(trial: Mapping[str, Any]) -> Curve:
    points = trial["curve"]
    loss = [(point["step"], point["loss"]) for point in points if "loss" in point]
    return Curve(
        trial["name"], loss, [(point["step"], point["eval_score"]) for point in points if "eval_score" in point]
    )
