"""Place interventions in one go, learned behind gates or guessed from gradients, then tune their learning rate on dev.

    python -m tasks.search.placing demo_refuse --how gates --budget 5m --max-numbers 8224
    python -m tasks.search.placing demo_refuse --how saliency --budget 5m --max-numbers 8224
    python -m tasks.run demo_refuse --found runs/placing/demo_refuse/best.json --seeds 0 1 2

Both choose layers of each slot, at its widest positions, so that LoReFT of `--rank` trains no more than
`--max-numbers`. In the output folder: `best.json`, and `placing.json` with every place and training. Of a budget in
trials the gates' training is one, a guess none.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tasks.search.__main__ import best_of
from tasks.search.budget import Budget
from tasks.search.command import carry_out, default_output, make_parser, prepare
from tasks.search.gates import PlacedMethod, Placement, by_slot, layers_by_slot, learn
from tasks.search.saliency import guess
from tasks.search.search import Found, coarse
from tasks.search.study import Done
from tasks.search.trial import Fidelity, Workbench

How = Literal["gates", "saliency"]
HOWS: tuple[How, ...] = ("gates", "saliency")
PLAIN = {"epochs": 1.0, "warmup": 0.06, "weight_decay": 0.0}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Place from the command line; return the record."""
    parser = make_parser("tasks.search.placing", __doc__)
    parser.add_argument("--how", choices=HOWS, required=True, help="learned in a training, or guessed without one")
    parser.add_argument("--max-numbers", type=int, required=True, help="trained numbers of the interventions, at most")
    parser.add_argument("--rank", type=int, default=4, help="of the interventions at the places that are kept (4)")
    return carry_out(parser, arguments, _place)


def _place(args: argparse.Namespace) -> dict[str, Any]:
    cpu_start = time.process_time()
    ready = prepare(args)
    task, budget, bench = ready.task, ready.budget, ready.bench
    folder = Path(args.output or default_output("placing", task))
    full = Fidelity(args.epochs, None, (1.0,))
    placement = place(bench, args.how, args.max_numbers, args.rank, full, budget, seed=args.seed)
    method = PlacedMethod(places=placement.kept, rank=args.rank)
    found = tune(bench, method, full, budget, first_spent(args.how, placement, budget), seed=args.seed)
    best = best_of(bench, method, found, args.epochs)
    record = {
        "task": task.name,
        "how": args.how,
        "rank": args.rank,
        "max_numbers": args.max_numbers,
        "budget": {"amount": budget.amount, "unit": budget.unit, "spent": found.spent},
        "seconds": round(time.process_time() - cpu_start, 2),
        "identity": ready.identity,
        "versions": ready.versions,
        **described(placement),
        "dev": found.best.result.dev,
        "trials": [{"choice": dict(one.choice), **one.result.to_dict()} for _, one in found.done],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("placing.json", record), ("best.json", best)):
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    _show(record, best, folder)
    return record


def _show(record: dict[str, Any], best: dict[str, Any], folder: Path) -> None:
    print(f"dev {best['dev']:.4f} with {best['num_trained']:,} numbers at {record['placement']}")
    if record.get("expected_numbers", 0.0) > record["max_numbers"]:
        print(
            f"the gates had no time to close: {record['expected_numbers']:,.0f} numbers were still expected to be kept"
        )
    rate, spent = best["choice"]["learning_rate"], record["budget"]["spent"]
    print(f"learning rate {rate:g} of {len(record['trials'])} tried; {spent:.4g} {record['budget']['unit']}: {folder}")


def described(placement: Placement) -> dict[str, Any]:
    """Return a placement as plain JSON data: the kept layers by slot, slots by score, and every place."""
    kept = set(placement.kept)
    return {
        "placement": layers_by_slot(placement.kept),
        "slots": by_slot(placement.scores),
        "placing_spent": placement.spent,
        **placement.about,
        "places": [{**asdict(one), "score": score, "kept": one in kept} for one, score in placement.scores.items()],
    }


def place(
    bench: Workbench, how: How, max_numbers: int, rank: int, full: Fidelity, budget: Budget, *, seed: int = 0
) -> Placement:
    """Return where to put interventions of this rank. full: the final training, of which gates take a share.

    Raises ValueError for a `max_numbers` that is too small for any place, and a budget too small for the gates.
    """
    if how == "saliency":
        return guess(bench, max_numbers, rank, seed=seed)
    rates = coarse(PlacedMethod().space(bench.setup).training["learning_rate"])
    limit = math.inf if budget.unit == "trials" else budget.amount
    blind = Fidelity(full.epochs, 0, ())  # dev is not asked
    rate = rates[len(rates) // 2]
    return learn(bench, max_numbers, rank, blind, learning_rate=rate, seed=seed, limit=limit)[0]


def first_spent(how: How, placement: Placement, budget: Budget) -> float:
    """Return what of the budget a placement has taken."""
    return placement.spent if budget.unit != "trials" else float(how == "gates")


def tune(
    bench: Workbench,
    method: PlacedMethod,
    full: Fidelity,
    budget: Budget,
    spent: float,
    *,
    seed: int = 0,
) -> Found:
    """Train afresh with some learning rates, the middle one first, while the budget lasts; return the best on dev.

    spent: what of the budget is gone. Raises ValueError if it does not last for one training.
    """
    rates = coarse(method.space(bench.setup).training["learning_rate"])
    middle, counts, done = rates[len(rates) // 2], budget.unit == "trials", []
    for number, rate in enumerate((middle, *(rate for rate in rates if rate != middle))):
        typical = 1.0 if counts else max([one.result.spent for one in done], default=0.0)
        left = budget.amount - spent
        if left <= 0 or (done and typical > left):
            break
        choice = {**PLAIN, "learning_rate": rate, "rank": method.rank, "layers": layers_by_slot(method.places)}
        result = bench.run(method, choice, full, seed=seed, limit=math.inf if counts else left)
        spent += 1.0 if counts else result.spent
        done.append(Done(number, choice, result, not result.stopped and math.isfinite(result.dev)))
    whole = [one for one in done if one.is_whole]
    if not whole:
        raise ValueError(_too_small(budget, spent, done))
    best = max(whole, key=lambda one: one.rank)
    return Found(best.choice, best, [("training", one) for one in done], {}, spent)


def _too_small(budget: Budget, spent: float, done: Sequence[Done]) -> str:
    if not done:
        return f"the budget ({budget}) was spent on the placement ({spent:.3g}); give more, or fewer epochs"
    result = done[0].result
    need = result.spent / max(1, result.steps) * result.num_steps + spent - result.spent
    return f"the budget ({budget}) is too small for placement and one training; give at least {need:.3g} {budget.unit}"


if __name__ == "__main__":
    main()
