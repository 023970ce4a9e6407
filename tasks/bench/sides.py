"""What the cells compare: each function here makes the sides of one cell, on a shape of its workload."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlreft
from tasks.bench.measure import Side, saved_megabytes
from tasks.bench.workloads import (
    Setup,
    Shape,
    Steps,
    build_base,
    floor_steps,
    greedy,
    lora_model,
    lora_steps,
    make_batch,
    make_prompts,
    only_where_labels_are,
    reft_steps,
    shared,
)
from vlreft.edit import orthonormal_rows

LORA, WIDE_LORA, ANSWER_LORA = "LoRA r8 q,v", "LoRA r32 wide", "LoRA r8 q,v, logits of the answer"
PLAIN, REUSE, REFT = "vlreft, plain step", "vlreft, prefix reuse", "vlreft"
GROUPED = "vlreft, prefix shared by all rows"
CAREFUL_LORA = f"{ANSWER_LORA}, feature cache"
KEPT = "vlreft, prefixes kept"
LORA_FEATURES, REUSE_FEATURES = f"{LORA}, feature cache", f"{REUSE}, feature cache"
UNMERGED_LORA = "LoRA r8 q,v, not merged"
FORWARD, FLOOR = "floor: frozen forward", "floor: gradient to the first edited block"
KEEP = {"reuse_prefix": True, "keep_prefixes": "16GB"}
ROOT = Path(__file__).resolve().parent.parent.parent


# Training steps ------------------------------------------------------------------------------------------------------


def _sides(steps: dict[str, Steps]) -> list[Side]:
    return [
        Side(name, one.forward if name == FORWARD else one.step, one.forget)  # what is never called costs nothing
        for name, one in steps.items()
    ]


def own_cost(setup: Setup, shape: Shape) -> list[Side]:
    """What a method adds to a step in which gradient merely flows."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    steps = {
        FLOOR: floor_steps(setup, base, shape, batch),
        REFT: reft_steps(setup, base, shape, batch, {}),
        LORA: lora_steps(setup, base, shape, batch),
        WIDE_LORA: lora_steps(setup, base, shape, batch, 32, "wide"),
    }
    return _sides(steps)


def _image_steps(setup: Setup, shape: Shape) -> dict[str, Steps]:
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    floor = floor_steps(setup, base, shape, batch)
    return {
        LORA: lora_steps(setup, base, shape, batch),
        ANSWER_LORA: lora_steps(setup, base, shape, only_where_labels_are(batch, shape)),
        PLAIN: reft_steps(setup, base, shape, batch, {"reuse_prefix": False}),
        REUSE: reft_steps(setup, base, shape, batch, {"reuse_prefix": True}),
        FLOOR: floor,
        FORWARD: floor,
    }


def reuse(setup: Setup, shape: Shape) -> list[Side]:
    """A step on different images, all of it and behind the prefix alone."""
    return _sides(_image_steps(setup, shape))


def grouped(setup: Setup, shape: Shape) -> list[Side]:
    """A step on questions about one image, whose prefix runs once."""
    base, batch = setup.base(shape), make_batch(shape, setup.device, one_image=True)
    steps = {
        LORA: lora_steps(setup, base, shape, batch),
        ANSWER_LORA: lora_steps(setup, base, shape, only_where_labels_are(batch, shape)),
        GROUPED: reft_steps(setup, base, shape, batch, {"reuse_prefix": True}),
    }
    return _sides(steps)


def kept(setup: Setup, shape: Shape) -> list[Side]:
    """A step on images whose prefixes are kept from an earlier epoch; LoRA as it is, and at its best."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    steps = {
        LORA: lora_steps(setup, base, shape, batch),
        CAREFUL_LORA: lora_steps(setup, base, shape, only_where_labels_are(batch, shape)).with_features(),
        KEPT: reft_steps(setup, base, shape, batch, KEEP),
    }
    return _sides(steps)


def features(setup: Setup, shape: Shape) -> list[Side]:
    """A step on different images, with the tower's features cached on both sides."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    steps = {
        LORA_FEATURES: lora_steps(setup, base, shape, batch).with_features(),
        REUSE: reft_steps(setup, base, shape, batch, {"reuse_prefix": True}),
        REUSE_FEATURES: reft_steps(setup, base, shape, batch, {"reuse_prefix": True}).with_features(),
    }
    return _sides(steps)


def saved(setup: Setup, shape: Shape) -> list[Side]:
    """What a step keeps for its backward pass, parameters apart."""
    steps = _image_steps(setup, shape)
    del steps[FORWARD]
    for one in steps.values():
        one.step()  # the first one tries out whether the prefix can be reused
    return [
        Side(name, partial(saved_megabytes, one.step, list(one.model.parameters())), one.forget)
        for name, one in steps.items()
    ]


def first_step(setup: Setup, shape: Shape) -> list[Side]:
    """The first step of a fresh trainer against a later one, for each method."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    makers: dict[str, Callable[[], Steps]] = {
        REFT: lambda: reft_steps(setup, base, shape, batch, {}),
        LORA: lambda: lora_steps(setup, base, shape, batch),
    }
    sides: list[Side] = []
    for name, make in makers.items():
        fresh: list[Steps] = []
        later = make()

        def renew(fresh: list[Steps] = fresh, make: Callable[[], Steps] = make) -> None:
            fresh[:] = [make()]

        def first(fresh: list[Steps] = fresh) -> Tensor:
            return fresh[0].step()

        sides += [Side(f"{name}: first", first, renew), Side(f"{name}: later", later.step, later.forget)]
    return sides


def growth(setup: Setup, shape: Shape, *, with_plain: bool) -> list[Side]:
    """A step at one value of what grows."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    steps = {LORA: lora_steps(setup, base, shape, batch, 2 * shape.rank)}
    if with_plain:
        steps[PLAIN] = reft_steps(setup, base, shape, batch, {"reuse_prefix": False})
        steps[REUSE] = reft_steps(setup, base, shape, batch, {"reuse_prefix": True})
        steps[KEPT] = reft_steps(setup, base, shape, batch, KEEP)
    else:
        steps[REFT] = reft_steps(setup, base, shape, batch, {})
        steps[FLOOR] = floor_steps(setup, base, shape, batch)
    return _sides(steps)


# The rest ------------------------------------------------------------------------------------------------------------


def generation(setup: Setup, shape: Shape) -> list[Side]:
    """Greedy generation from left-padded prompts, always the same number of new tokens."""
    base, prompts = setup.base(shape).eval(), make_prompts(shape, setup.device)
    edited = shared(base)
    vlreft.attach(edited, shape.config())
    wrapped = lora_model(shared(base), shape).eval()
    settings = greedy(shape.num_answer)

    def run(model: Any) -> Tensor:
        return model.generate(**prompts, generation_config=settings)

    return [
        Side("base", partial(run, base)),
        Side(REFT, partial(run, edited)),
        Side(UNMERGED_LORA, partial(run, wrapped)),
    ]


def by_row(setup: Setup, shape: Shape) -> list[Side]:
    """A forward, and a greedy generation: with one adapter, and with four in turn and none for every fourth row."""
    model, prompts = shared(setup.base(shape).eval()), make_prompts(shape, setup.device)
    for name in "abcd":
        vlreft.attach(model, shape.config(), name)
    num_edited = shape.num_rows - shape.num_rows // 4
    rows = [*("abcd"[row % 4] for row in range(num_edited)), *[None] * (shape.num_rows - num_edited)]

    @torch.no_grad()
    def forward() -> Tensor:
        return model(**prompts).logits

    def generate() -> Tensor:
        return model.generate(**prompts, generation_config=greedy(shape.num_answer))

    def within(scope: Callable[[], AbstractContextManager[None]], run: Callable[[], Tensor]) -> Tensor:
        with scope():
            return run()

    one, several = partial(vlreft.use, model, "a"), partial(vlreft.use, model, rows=rows)
    return [
        Side("forward, one adapter", partial(within, one, forward)),
        Side("forward, by row", partial(within, several, forward)),
        Side("generate, one adapter", partial(within, one, generate)),
        Side("generate, by row", partial(within, several, generate)),
    ]


def attaching(setup: Setup, shape: Shape) -> list[Side]:
    """Putting the method on a base that is in memory: two interventions a block, two LoRA modules a block."""
    base = setup.base(shape)
    fresh: list[Any] = []

    def renew() -> None:
        fresh[:] = [shared(base)]

    return [
        Side(REFT, lambda: vlreft.attach(fresh[0], shape.config()), renew),
        Side(LORA, lambda: lora_model(fresh[0], shape), renew),
    ]


def orthonormal(setup: Setup, shape: Shape) -> list[Side]:
    """One R for each of `num_layers` edits, rank by width, forward and backward."""
    generator = torch.Generator().manual_seed(4)
    size = (shape.num_layers, shape.rank, shape.width)
    start_GRD = torch.randn(size, generator=generator).to(setup.device)
    target_GRD = torch.randn(size, generator=generator).to(setup.device)
    ours: list[Tensor] = [nn.Parameter(row) for row in start_GRD.clone()]
    theirs: list[nn.Linear] = []
    for row in start_GRD:
        linear = nn.Linear(shape.width, shape.rank, bias=False, device=setup.device)
        linear.weight.data.copy_(row)
        nn.utils.parametrizations.orthogonal(linear)
        theirs.append(linear)

    def batched() -> Tensor:
        loss = (orthonormal_rows(torch.stack(ours)) * target_GRD).sum()
        loss.backward()
        return loss.detach()

    def parametrized(num_reads: int) -> Tensor:
        terms = [
            (linear.weight * target).sum()
            for linear, target in zip(theirs, target_GRD, strict=True)
            for _ in range(num_reads)
        ]
        loss = torch.stack(terms).sum()
        loss.backward()
        return loss.detach()

    def forget() -> None:
        for parameter in (*ours, *(p for linear in theirs for p in linear.parameters())):
            parameter.grad = None

    return [
        Side("vlreft, all at once", batched, forget),
        Side("torch parametrizations.orthogonal, read once", partial(parametrized, 1), forget),
        Side("torch parametrizations.orthogonal, read twice", partial(parametrized, 2), forget),
    ]


# After what a model in memory has brought already.
BROUGHT = "import torch, transformers; transformers.PreTrainedModel, transformers.GenerationMixin"
IMPORTS = {
    "vlreft: attach, load, Collator": (BROUGHT, "import vlreft; vlreft.attach, vlreft.load, vlreft.Collator"),
    "peft": (BROUGHT, "import peft"),
    "vlreft: ReftTrainer, after transformers.Trainer": (
        f"{BROUGHT}, transformers.Trainer",
        "import vlreft; vlreft.attach, vlreft.ReftTrainer",
    ),
    "torch and transformers themselves": ("", BROUGHT),
}


def importing(_setup: Setup, _shape: Shape) -> list[Side]:
    """Imports, each in a process of its own."""

    def run(before: str, timed: str) -> float:
        return in_a_process(
            f"{before}\nimport time\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"
        )

    return [Side(name, partial(run, *code)) for name, code in IMPORTS.items()]


PEAK = """
import dataclasses, json, torch, vlreft
from pathlib import Path
from tasks.bench.workloads import Shape, build_base
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))
shape = Shape(**json.loads({shape!r}))
base = build_base(shape, torch.device("cpu"))
small = dataclasses.replace(shape, width=64, num_layers=2, num_edited=0)
vlreft.attach(build_base(small, torch.device("cpu")), small.config())  # what the first call of anything loads
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
vlreft.attach(base, shape.config())
print(memory("VmHWM") - before)
"""


def attachment(setup: Setup, shape: Shape) -> list[Side]:
    """Memory of attaching, beyond the base, and the size of the checkpoint; on the CPU, of the process."""
    fields = json.dumps(asdict(shape))
    numbers = len(shape.layers) * (2 * shape.rank * shape.width + shape.rank) * 4 / 1e6

    def checkpoint() -> float:
        tied = vlreft.Intervention("loreft", positions=shape.positions, rank=shape.rank, tied=True)
        reft = vlreft.attach(build_base(shape, setup.device), vlreft.ReftConfig(tied))
        with tempfile.TemporaryDirectory(dir=setup.folder) as name:
            reft.save_pretrained(name)
            return sum(path.stat().st_size for path in Path(name).iterdir()) / 1e6

    return [
        Side("peak of attaching, untied", lambda: in_a_process(PEAK.format(shape=fields))),
        Side("its numbers, by arithmetic", lambda: 2 * numbers),
        Side("checkpoint, tied", checkpoint),
        Side("tied numbers, by arithmetic", lambda: numbers),
    ]


def in_a_process(code: str) -> float:
    """Run code in a fresh interpreter, from the root of the repository; return the number that it prints last."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    if done.returncode:
        raise ValueError(f"a process of the benchmark failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.splitlines()[-1])
