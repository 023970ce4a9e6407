"""Compare ways to adapt a base for a task: the same tuning budget for each, several seeds, a test opened at the end.

    python -m tasks.compare demo_refuse --budget 5m --seeds 3
    python -m tasks.compare vqav2 --model llava-hf/llava-1.5-7b-hf --data FOLDER --methods loreft lora --budget 4h
    python -m tasks.compare pope --model ... --own gqa vizwiz                # what was forgotten of other tasks

The first method is compared with each of the others. Without --methods all are that can adapt the base; the others
stand in the results with the reason. In the output folder: `compare.json`, `compare.html`, and for each method its
manifest, the trained numbers of each seed and all answers. The same command goes on where a killed one stopped.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.compare.comparison import Comparison, Plan, possible
from tasks.compare.page import compare_page
from tasks.compare.results import lines_of, markdown, record
from tasks.methods.table import METHODS
from tasks.search.command import budget_of, carry_out, default_output, make_parser, prepare, task_and_source


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare from the command line; return the record."""
    parser = make_parser("tasks.compare", __doc__)
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=5, help="how many final trainings of each method (5)")
    parser.add_argument(
        "--num-test", type=int, help="answer so many examples of each test part only, to try things out"
    )
    parser.add_argument(
        "--own", nargs="*", help="tasks that the base could do before; those of the demo tasks are known"
    )
    return carry_out(parser, arguments, _compare)


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    task, _ = task_and_source(args.task)
    own = tuple(task.own if args.own is None else args.own)
    seeds = tuple(range(args.seeds))
    plan = Plan(tuple(args.methods or METHODS), budget_of(args), seeds, args.epochs, own, args.seed)
    ready, cannot = prepare(args, num_test=args.num_test), {}
    if args.methods is None:
        can, cannot = possible(plan.methods, ready.bench.setup)
        plan = replace(plan, methods=tuple(can))
    folder = Path(args.output or default_output("compare", task))
    comparison = Comparison(task, ready.settings, plan, ready.bench, ready.identity, folder)
    comparison.execute()
    lines = lines_of(comparison)
    data = record(comparison, lines, cannot)
    (folder / "compare.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "compare.html").write_text(compare_page(task.title, ready.settings.model, data, lines), encoding="utf-8")
    print(markdown(comparison, lines))
    for name, why in cannot.items():
        print(f"not compared: {name}: {why}")
    print(f"all of it: {folder}/compare.html")
    return data


if __name__ == "__main__":
    main()
