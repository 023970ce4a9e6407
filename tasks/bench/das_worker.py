"""One side of `tasks.bench.das`: trains and times DAS on a toy model, in the interpreter it is run with.

    PYVENE_PYTHON das_worker.py ORDER.json      # then a JSON command a line on stdin, a JSON answer a line on stdout

Imports nothing of this repository, whose other parts need a newer transformers than pyvene. `tasks.bench.das` uses the
same loop for its own side, so that both draw the same batches, start from the same subspace and stop at the same step.

Shape suffixes: B = rows, L = tokens, V = vocabulary, R = rank, D = width.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Method:
    """A way to exchange states: logits (B, V) behind the last token of (base, source), and what is trained."""

    exchange: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]


@dataclass(frozen=True)
class Pairs:
    """Base and source runs (N, L) and the counterfactual answer's token (N,)."""

    base: Tensor
    source: Tensor
    answer: Tensor

    @classmethod
    def read(cls, lists: dict[str, Any]) -> "Pairs":
        """Take what an order has under `train` or `test`."""
        return cls(*(torch.tensor(lists[name]) for name in ("base", "source", "answer")))


def load_base(order: dict[str, Any]) -> Any:
    """Load the frozen toy model."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(order["folder"]).eval().requires_grad_(False)


def start_rotation(order: dict[str, Any], seed: int) -> Tensor:
    """Return the start of R (R, D), the same on all sides."""
    draw_DR = torch.randn(order["width"], order["rank"], generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw_DR)[0].T.contiguous()


def pyvene_method(model: Any, order: dict[str, Any], seed: int) -> Method:
    """DAS as pyvene does it."""
    import pyvene  # pyright: ignore[reportMissingImports]

    edit = pyvene.LowRankRotatedSpaceIntervention(
        embed_dim=order["width"], low_rank_dimension=order["rank"], keep_last_dim=True
    )
    edit.rotate_layer.weight = start_rotation(order, seed).T
    place = {"layer": order["layer"], "component": "block_output", "intervention": edit}
    wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model=model)
    wrapped.disable_model_gradients()
    where = {"sources->base": order["position"]}

    def exchange(base_BL: Tensor, source_BL: Tensor) -> Tensor:
        _, output = wrapped({"input_ids": base_BL}, [{"input_ids": source_BL}], where)
        return output.logits[:, -1]

    return Method(exchange, list(edit.parameters()))


def floor_method(model: Any, order: dict[str, Any]) -> Method:
    """What all but the hooks costs: the source's whole run without a graph, the base's with gradient from the place."""
    leaf = nn.Parameter(torch.zeros(order["width"]))
    is_base = False

    def let_gradient_begin(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not is_base:
            return output
        return (output[0] + leaf, *output[1:]) if isinstance(output, tuple) else output + leaf

    model.model.layers[order["layer"]].register_forward_hook(let_gradient_begin)

    def exchange(base_BL: Tensor, source_BL: Tensor) -> Tensor:
        nonlocal is_base
        with torch.no_grad():
            model(input_ids=source_BL)
        is_base = True
        try:
            return model(input_ids=base_BL).logits[:, -1]
        finally:
            is_base = False

    return Method(exchange, [leaf])


class Steps:
    """Adam on a method's numbers, batch after batch in an order drawn by a seed."""

    def __init__(self, method: Method, order: dict[str, Any], seed: int) -> None:
        self.method = method
        self.pairs = Pairs.read(order["train"])
        self.batch_size = order["batch_size"]
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(method.parameters, lr=LEARNING_RATE)

    def step(self) -> float:
        """Take one; return its loss."""
        rows_B = torch.randint(len(self.pairs.base), (self.batch_size,), generator=self.generator)
        logits_BV = self.method.exchange(self.pairs.base[rows_B], self.pairs.source[rows_B])
        loss = F.cross_entropy(logits_BV, self.pairs.answer[rows_B])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


@torch.no_grad()
def accuracy(method: Method, pairs: Pairs) -> float:
    """Return the interchange accuracy."""
    return float((method.exchange(pairs.base, pairs.source).argmax(-1) == pairs.answer).float().mean())


def train(method: Method, order: dict[str, Any], seed: int) -> dict[str, float]:
    """Train from the start; return the accuracies on test before and after, and the last loss."""
    test = Pairs.read(order["test"])
    before, steps = accuracy(method, test), Steps(method, order, seed)
    losses = [steps.step() for _ in range(order["num_steps"])]
    return {"before": before, "after": accuracy(method, test), "loss": sum(losses[-20:]) / len(losses[-20:])}


def time_steps(steps: Steps, count: int) -> list[float]:
    """Return the milliseconds of one step, wall and CPU, the mean of several in a row."""
    gc.collect()
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        steps.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gc.enable()
    return [1e3 * wall / count, 1e3 * cpu / count]


def wide_base(order: dict[str, Any]) -> Any:
    """Make the frozen model of the second timing, whose width costs more than what is around it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**order["wide"])).eval().requires_grad_(False)


def timed_steps(order: dict[str, Any], name: str, make: Callable[..., Method]) -> dict[str, Steps]:
    """Return what is timed of one side: its method and a floor, on the toy model and on the wide one."""
    wide = {**order, "width": order["wide"]["hidden_size"]}
    return {
        name: Steps(make(load_base(order), order, 0), order, 0),
        f"{name} floor": Steps(floor_method(load_base(order), order), order, 0),
        f"{name} wide": Steps(make(wide_base(order), wide, 0), wide, 0),
        f"{name} wide floor": Steps(floor_method(wide_base(order), wide), wide, 0),
    }


def main() -> None:
    """Answer one command after another, until there are no more."""
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123
        order = json.load(file)
    torch.set_num_threads(order["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    timed = timed_steps(order, "pyvene", pyvene_method)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "train":
            answer: Any = train(pyvene_method(load_base(order), order, command["seed"]), order, command["seed"])
        elif command["do"] == "time":
            answer = {name: time_steps(steps, command["count"]) for name, steps in timed.items()}
        else:
            answer = {name: version(name) for name in ("pyvene", "torch", "transformers")}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
