"""Puts several comparisons into one table: `python -m tasks.compare.overview runs/compare/*` prints it as Markdown.

A row for each method, a column for each task: the test's mean and standard deviation over the seeds, with a star where
it differs from the first method's (corrected p < 0.05). Then what each method costs, as medians over the tasks, and the
mean of what it lost on the base's own tasks.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.compare.results import as_table

Record = Mapping[str, Any]  # what is in a `compare.json`


def overview(records: Sequence[Record]) -> str:
    """Return both tables as Markdown. Raises ValueError without records, and for two of one task."""
    tasks = [record["task"] for record in records]
    if not records or len(set(tasks)) < len(tasks):
        raise ValueError(f"there must be one comparison of each task, got those of {tasks}")
    lines = [{line["name"]: line for line in record["lines"]} for record in records]
    names = list(dict.fromkeys(name for found in lines for name in found))
    titles = {name: line["title"] for found in lines for name, line in found.items()}
    first = [record["lines"][0]["name"] for record in records]
    scores = [["base", *(f"{_base(record):.3f}" for record in records)]]
    scores += [[titles[name], *(_score(found.get(name)) for found in lines)] for name in names]
    costs = [[titles[name], *_costs(name, records, lines, first)] for name in names]
    return f"{as_table(['method', *tasks], scores)}\n\n{as_table(['method', *COSTS], costs)}"


COSTS = ("trained numbers", "file, kB", "step, of the first's", "memory, of the first's", "forgotten")


def _base(record: Record) -> float:
    return next(iter(record["base"].values()))


def _score(line: Record | None) -> str:
    if line is None:
        return ""
    spread = "" if line["test_sd"] is None else f" ± {line['test_sd']:.3f}"
    star = "*" if line["p_value"] is not None and line["p_value"] < 0.05 else ""
    return f"{line['test']:.3f}{spread}{star}"


def _costs(
    name: str, records: Sequence[Record], lines: Sequence[Mapping[str, Record]], first: Sequence[str]
) -> list[str]:
    mine = [(found[name], found[other]) for found, other in zip(lines, first, strict=True) if name in found]
    both = [(record, found[name]) for record, found in zip(records, lines, strict=True) if name in found]
    lost = [loss for record, line in both for loss in _lost(record, line)]
    return [
        f"{statistics.median(line['num_trained'] for line, _ in mine):,.0f}",
        f"{statistics.median(line['num_bytes'] for line, _ in mine) / 1e3:,.0f}",
        f"{statistics.median(line['step'] / other['step'] for line, other in mine):.2f}",
        f"{statistics.median(line['peak_memory'] / other['peak_memory'] for line, other in mine):.2f}",
        f"{statistics.fmean(lost):.3f}" if lost else "",
    ]


def _lost(record: Record, line: Record) -> list[float]:
    """Return what is lost on each of the base's own tasks, all its test parts together."""
    base: dict[str, list[float]] = {}
    for part, score in record["base"].items():
        base.setdefault(part.partition("/")[0], []).append(score)
    return [statistics.fmean(base[task]) - score for task, score in line["own"].items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the folders that are named."""
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if missing := [str(folder) for folder in folders if not (folder / "compare.json").is_file()]:
        sys.exit(f"no finished comparison in {', '.join(missing)}: each folder must hold a compare.json")
    try:
        print(overview([json.loads((folder / "compare.json").read_text(encoding="utf-8")) for folder in folders]))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
