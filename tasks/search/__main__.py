"""Find where and how to edit a base for a task, within a budget, on dev alone.

    python -m tasks.search demo_refuse --budget 30m                  # the demo model: from scratch, with no hint
    python -m tasks.search vqav2 --model llava-hf/llava-1.5-7b-hf --data FOLDER --budget 8h
    python -m tasks.search demo_code --method lora --trials 40
    python -m tasks.run demo_refuse --found runs/search/demo_refuse/best.json --seeds 0 1 2

The same command goes on where a killed one stopped; started twice, on one machine or on several that share --storage,
the processes share the work. In the output folder: `best.json`, `search.json` with every trial, `search.html`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.methods.reft import ReftMethod
from tasks.methods.table import METHODS
from tasks.search.command import carry_out, default_output, make_parser, prepare
from tasks.search.page import search_page
from tasks.search.search import Found, Search
from tasks.search.study import open_storage
from tasks.search.trial import Workbench


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Search from the command line; return the record."""
    parser = make_parser("tasks.search", __doc__)
    parser.add_argument("--method", default="loreft", help=f"one of {', '.join(METHODS)}")
    parser.add_argument(
        "--storage", help="Optuna's: a database's address, or journal:FILE; SQLite in the output folder"
    )
    return carry_out(parser, arguments, _search)


def _search(args: argparse.Namespace) -> dict[str, Any]:
    cpu_start = time.process_time()
    if args.method not in METHODS:
        raise ValueError(f"there is no method {args.method!r}; there are {', '.join(METHODS)}.")
    method, ready = METHODS[args.method], prepare(args)
    task, budget, bench = ready.task, ready.budget, ready.bench
    folder = Path(args.output or default_output("search", task))
    loaded = time.process_time() - cpu_start
    storage = open_storage(args.storage or f"sqlite:///{(folder / 'study.db').absolute()}")
    search = Search(bench, method, budget, storage, ready.identity, epochs=args.epochs, seed=args.seed)
    before = search.spent()
    found = search.run()
    record = {
        "task": task.name,
        "method": method.name,
        "budget": {"amount": budget.amount, "unit": budget.unit, "spent": found.spent},
        "seconds": {  # of this process: loading, in trials, and around them
            "loaded": round(loaded, 2),
            "trials": round(found.spent - before, 2) if budget.unit == "seconds" else None,
            "all": round(time.process_time() - cpu_start, 2),
        },
        "identity": ready.identity,
        "versions": ready.versions,
        "importances": found.importances,
        "trials": [
            {"stage": stage, "number": one.number, "choice": dict(one.choice), **one.result.to_dict()}
            for stage, one in found.done
        ],
    }
    best = best_of(bench, method, found, args.epochs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("search.json", record), ("best.json", best)):
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "search.html").write_text(search_page(task.title, ready.settings.model, record, best), encoding="utf-8")
    print(f"dev {found.best.result.dev:.4f} with {found.best.result.num_trained:,} numbers: {dict(found.choice)}")
    print(f"{len(found.done)} trials, {found.spent:.4g} {budget.unit}; all of it: {folder}/search.html")
    return record


def best_of(bench: Workbench, method: Any, found: Found, epochs: float) -> dict[str, Any]:
    """Return the best choice; of interventions in the form that `tasks.run --found` takes."""
    choice = dict(found.choice)
    best = {"method": method.name, "choice": choice, "dev": found.best.result.dev}
    best |= {"num_trained": found.best.result.num_trained, "spent": found.best.result.spent}
    if isinstance(method, ReftMethod):
        training = {
            "learning_rate": choice["learning_rate"],
            "num_train_epochs": epochs * choice["epochs"],
            "warmup_steps": choice["warmup"],
            "weight_decay": choice["weight_decay"],
            **bench.settings,
        }
        best |= {"config": method.config(bench.setup, choice).to_dict(), "training": training}
    return best


if __name__ == "__main__":
    main()
