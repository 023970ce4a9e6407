"""What answering costs with a method in place: the prompt's forward, and each token behind it, beside the base."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tasks.methods.method import Choice, Method
from tasks.search.trial import Workbench
from vlreft import Collator

NUM_ROUNDS, NUM_REPEATS, NUM_TOKENS, NUM_ROWS = 5, 2, 8, 8


@dataclass(frozen=True)
class Costs:
    """Medians in milliseconds, of a batch of eight prompts or pictures. decode: of one token, None where none come."""

    prefill: float
    decode: float | None


def measure_costs(bench: Workbench, methods: Mapping[str, tuple[Method, Choice]]) -> dict[str, Costs]:
    """Time all methods in turns, round by round; "base" is the base alone."""
    if bench.task.kind not in ("generate", "classes"):
        return {}
    found: dict[str, list[Costs]] = {name: [] for name in ("base", *methods)}
    for _ in range(NUM_ROUNDS):
        for name, times in found.items():
            scope = nullcontext() if name == "base" else methods[name][0].adapted(bench.setup, methods[name][1])
            with scope as adapted:
                times.append(_timed(bench, bench.setup.model if adapted is None else adapted.model))
    return {
        name: Costs(
            statistics.median(one.prefill for one in times),
            None if times[0].decode is None else statistics.median(one.decode or 0.0 for one in times),
        )
        for name, times in found.items()
    }


@torch.no_grad()
def _timed(bench: Workbench, model: Any) -> Costs:
    rows = [bench.dev[place % len(bench.dev)] for place in range(NUM_ROWS)]
    model.eval()
    collator = bench.setup.collator
    examples = [bench.setup.examples(rows, training=False)[place] for place in range(NUM_ROWS)]
    if not isinstance(collator, Collator):
        batch = _on(bench, collator(examples))
        return Costs(_milliseconds(lambda: model(**batch)), None)
    batch = _on(bench, collator.prompts(examples))
    one, many = ({"max_new_tokens": num, "min_new_tokens": num, "do_sample": False} for num in (1, 1 + NUM_TOKENS))
    prefill = _milliseconds(lambda: model.generate(**batch, **one))
    whole = _milliseconds(lambda: model.generate(**batch, **many))
    return Costs(prefill, (whole - prefill) / NUM_TOKENS)


def _on(bench: Workbench, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.to(bench.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }


def _milliseconds(run: Callable[[], Any]) -> float:
    """The fastest of some runs."""
    times = []
    for _ in range(NUM_REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)
