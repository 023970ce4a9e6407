"""Compare finished runs of one task on the test rows that they all answered: paired bootstrap, corrected by Holm.

    python -m tasks.bootstrap runs/vqav2-loreft runs/vqav2-mores          # the first against each of the others
    python -m tasks.bootstrap runs/vqav2-loreft                           # against its own base

What was answered is compared, nothing is answered anew. How interval and p value are defined stands in
`tasks/statistics.py`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.protocol import load_test
from tasks.statistics import Comparison, holm, paired_bootstrap
from tasks.table import TASKS
from tasks.task import Task, texts_of
from vlreft.training.answers import read_answers


@dataclass(frozen=True)
class Finished:
    """A finished run, as its folder has it."""

    folder: Path
    data: dict[str, Any]

    def answers(self, part: str, *, base: bool = False) -> list[list[Any]]:
        """Read the answers to a test part, one list for each seed; the base has one."""
        scores = self.data["test"]["scores"][part]
        found = [scores["base"]] if base or not scores["adapters"] else scores["adapters"]
        return [read_answers(self.folder / score["answers"]) for score in found]


def load_run(folder: Path) -> Finished:
    """Read a run's manifest. Raises ValueError if its test was not scored yet."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no manifest.json; name the folder of a run.")
    data = json.loads(path.read_text(encoding="utf-8"))
    if not data["test"]["scores"]:
        raise ValueError(f"the run in {folder} is not finished; finish it with the command that began it.")
    return Finished(folder, data)


def compare(runs: Sequence[Finished]) -> list[tuple[str, Path | None, Comparison]]:
    """Compare the first run with each of the others, or with its base, on each test part: part, other, comparison."""
    first, others = runs[0], runs[1:]
    task = TASKS[first.data["settings"]["task"]]
    if task.kind == "pairs":
        raise ValueError(f"{task.name!r} ranks pictures and texts: a resample of its rows is no set of queries.")
    found = []
    for part in first.data["test"]["scores"]:
        for other in others:
            _refuse_other_rows(first, other, part)
        settings, folder = first.data["settings"], _folder(first)
        rows = list(texts_of(load_test(task, part, folder, settings["num_test"], settings["split_seed"])))
        pairs = [(run.folder, run.answers(part)) for run in others] or [(None, first.answers(part, base=True))]
        mine = first.answers(part)
        found += [(part, folder, paired_bootstrap(task.metric, mine, theirs, rows)) for folder, theirs in pairs]
    return found


def _folder(run: Finished) -> Path | None:
    data = run.data["settings"]["data"]
    return None if data is None else Path(data)


def _refuse_other_rows(first: Finished, other: Finished, part: str) -> None:
    if first.data["settings"]["task"] != other.data["settings"]["task"]:
        raise ValueError(f"{first.folder} and {other.folder} are runs of different tasks; compare runs of one.")
    mine, theirs = (run.data["data"].get(part, {}).get("sha256") for run in (first, other))
    if mine != theirs:
        raise ValueError(
            f"{first.folder} and {other.folder} answered other rows of {part!r}; compare on the same ones."
        )


def table(task: Task, first: Path, compared: Sequence[tuple[str, Path | None, Comparison]]) -> str:
    """Return the comparisons as a table, p values corrected for their number."""
    lines = [f"{'test':<14}{'against':<28}{'difference':>11}{'95 % interval':>20}{'p (Holm)':>10}"]
    for (part, other, found), p in zip(compared, holm([c.p_value for _, _, c in compared]), strict=True):
        low, high = (100 * bound for bound in found.interval)
        name = "its base" if other is None else other.name
        interval = f"[{low:+.2f}, {high:+.2f}]"
        lines.append(f"{part:<14}{name:<28}{100 * found.difference:>+11.2f}{interval:>20}{p:>10.4f}")
    one = compared[0][2]
    lines.append(f"{first.name} on {task.name}: {one.num_samples:,} resamples of {one.num_rows:,} rows ({one.route})")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.bootstrap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    args = parser.parse_args(arguments)
    try:
        runs = [load_run(folder) for folder in args.runs]
        print(table(TASKS[runs[0].data["settings"]["task"]], args.runs[0], compare(runs)))
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
