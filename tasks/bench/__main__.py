"""Measures vlreft against peft's LoRA and against floors, side by side in one process.

    python -m tasks.bench                                    # all cells: minutes on two cores
    python -m tasks.bench --cells step attach --threads 1
    python -m tasks.bench --pyreft ~/old/bin/python          # pyreft in an environment of its own (transformers 4.57)

Sides of a cell run by turns in every round; a ratio is the median over rounds of the ratio in one round, with its
quartiles. Training steps go through the trainers (`vlreft.ReftTrainer`; `transformers.Trainer` for LoRA and the
floors): forward and backward of one prepared batch, without the optimizer's step. All sides share one base with random
weights, and start at the same loss, which is checked.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tasks.bench.cells import CELLS
from tasks.bench.measure import describe_machine, describe_versions
from tasks.bench.peers import PEERS, run_peer
from tasks.bench.runner import as_markdown, run_cell
from tasks.bench.workloads import TINY, WORKLOADS, Setup


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells, write the records as JSON after each of them, and print the tables."""
    args = _parse(arguments)
    transformers.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    workloads, num_values = (TINY, 2) if args.tiny else (WORKLOADS, 0)
    results: dict[str, Any] = {
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "is_tiny": args.tiny,
        "records": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlreft-bench-") as folder:
        setup = Setup(device, Path(folder))
        for cell in CELLS:
            if cell.name not in args.cells or cell.workload not in args.workloads:
                continue
            print(f"{cell.name} on {cell.workload} ...", file=sys.stderr, flush=True)
            results["records"] += run_cell(cell, setup, workloads, args.rounds, num_values, keep_going=args.keep_going)
            for peer in PEERS if cell.peer else ():
                results["records"].append(run_peer(cell, peer, getattr(args, peer), workloads, args.rounds))
            results["machine"]["load_at_the_end"] = describe_machine(device)["load"]
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(as_markdown(results))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(cell.name for cell in CELLS))
    parser.add_argument("--cells", nargs="+", default=names, choices=names, metavar="CELL", help=", ".join(names))
    known = list(WORKLOADS)
    parser.add_argument("--workloads", nargs="+", default=known, choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--keep-going", action="store_true", help="write down why a cell failed, and run the others")
    parser.add_argument("--rounds", type=_positive, help="rounds of every cell (each has its own number)")
    parser.add_argument("--threads", type=_positive, help="threads of torch (its own choice)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/results.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, and nothing else")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"the interpreter of an environment with {peer}")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


if __name__ == "__main__":
    main()
