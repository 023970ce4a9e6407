"""What the cells at a true shape compare beside those of `sides.py`: peaks, compiled steps, questions, edits alone.

Shape suffixes: B = rows, L = tokens, D = hidden width.
"""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vlreft
from tasks.bench.measure import Side, peak_megabytes
from tasks.bench.sides import (
    ANSWER_LORA,
    FLOOR,
    FORWARD,
    GROUPED,
    KEEP,
    KEPT,
    LORA,
    PLAIN,
    REFT,
    REUSE,
    REUSE_FEATURES,
)
from tasks.bench.workloads import (
    Setup,
    Shape,
    Steps,
    floor_steps,
    lora_steps,
    make_batch,
    only_where_labels_are,
    reft_steps,
    shared,
)
from vlreft.interventions import INTERVENTIONS
from vlreft.reuse.questions import SharedPrefixes

ALONE, TOGETHER = "five calls", "one batch of five"
NEW_PICTURE, SAME_PICTURE = "vlreft.Questions, a new picture", "vlreft.Questions, a picture asked before"
COMPILED_REFT, COMPILED_FLOOR = f"{REFT}, compiled", f"{FLOOR}, compiled"
CHECKS_OFF = "TRANSFORMERS_DISABLE_TORCH_CHECK"
EDITS, COMPILED_EDITS, PRODUCTS = "edits", "edits, compiled", "floor: one product with a number each"


def peaks(setup: Setup, shape: Shape) -> list[Side]:
    """The most memory of a step of each kind, the base's weights with it."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    one_image = make_batch(shape, setup.device, one_image=True)
    floor = floor_steps(setup, base, shape, batch)
    steps = {
        LORA: lora_steps(setup, base, shape, batch),
        ANSWER_LORA: lora_steps(setup, base, shape, only_where_labels_are(batch, shape)),
        PLAIN: reft_steps(setup, base, shape, batch, {"reuse_prefix": False}),
        REUSE: reft_steps(setup, base, shape, batch, {"reuse_prefix": True}),
        REUSE_FEATURES: reft_steps(setup, base, shape, batch, {"reuse_prefix": True}).with_features(),
        GROUPED: reft_steps(setup, base, shape, one_image, {"reuse_prefix": True}),
        KEPT: reft_steps(setup, base, shape, batch, KEEP),
        FLOOR: floor,
        FORWARD: floor,
    }
    sides = [Side("weights of the base", partial(peak_megabytes, _nothing, setup.device))]
    for name, one in steps.items():
        run = one.forward if name == FORWARD else one.step
        for _ in range(2):  # the first one tries, the second keeps
            run()
            one.forget()
        sides.append(Side(name, partial(peak_megabytes, run, setup.device), partial(_forget_all, steps)))
    return sides


def _nothing() -> None:
    pass


def _forget_all(steps: dict[str, Steps]) -> None:
    for one in steps.values():
        one.forget()


def questions(setup: Setup, shape: Shape) -> list[Side]:
    """As many questions about one picture as there are rows, answered greedily."""
    model = shared(setup.base(shape)).eval()
    vlreft.attach(model, shape.config())
    batch = make_batch(shape, setup.device, one_image=True)
    batch = {name: value for name, value in batch.items() if name != "labels"}
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, : -shape.num_answer]
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(shape.num_rows)]
    num: dict[str, Any] = {"max_new_tokens": shape.num_answer, "min_new_tokens": shape.num_answer}
    options = {**num, "do_sample": False, "pad_token_id": 0}
    fresh, kept = SharedPrefixes(model), SharedPrefixes(model)
    return [
        Side(ALONE, lambda: [model.generate(**row, **options) for row in rows]),
        Side(TOGETHER, lambda: model.generate(**batch, **options)),
        Side(NEW_PICTURE, lambda: fresh.generate(rows, **options), fresh.forget),
        Side(SAME_PICTURE, lambda: kept.generate(rows, **options)),
    ]


def compiled(setup: Setup, shape: Shape) -> list[Side]:
    """Forward and backward of the model itself, without a trainer, as it is and under `torch.compile`."""
    base, batch = setup.base(shape), make_batch(shape, setup.device)
    backend = "inductor" if setup.device.type == "cuda" else "eager"  # on a CPU it shows that it runs
    steps = {
        REFT: reft_steps(setup, base, shape, batch, {"reuse_prefix": False}),
        FLOOR: floor_steps(setup, base, shape, batch),
    }
    sides = []
    for name, one in steps.items():
        called = torch.compile(one.model, backend=backend, fullgraph=True)
        sides.append(Side(name, partial(_step, one.model, batch), one.forget))
        sides.append(Side(f"{name}, compiled", partial(_step, called, batch), one.forget))
    return sides


def _step(model: Any, batch: dict[str, Any]) -> Tensor:
    # Off on all sides: transformers' check that image tokens and features are as many, which torch 2.11 cannot compile.
    before, os.environ[CHECKS_OFF] = os.environ.get(CHECKS_OFF), "1"
    try:
        loss = model(**batch).loss
    finally:
        del os.environ[CHECKS_OFF]
        os.environ.update({} if before is None else {CHECKS_OFF: before})
    loss.backward()
    return loss.detach()


def edits_alone(setup: Setup, shape: Shape) -> list[Side]:
    """One LoReFT after another on all image tokens, forward and backward, without the model around them.

    The floor reads and writes the states once in the forward and once in the backward, as any kernel has to.
    """
    dtype, size = getattr(torch, shape.dtype), (shape.num_rows, shape.num_image_tokens, shape.width)
    generator = torch.Generator().manual_seed(5)
    with setup.device:
        edits = nn.ModuleList(INTERVENTIONS["loreft"](shape.width, shape.rank) for _ in range(shape.num_layers))
    h_BLD = torch.randn(size, generator=generator).to(setup.device, dtype).requires_grad_()
    grad_BLD = torch.randn(size, generator=generator).to(setup.device, dtype)

    def through(steps: list[Any]) -> None:
        out_BLD = h_BLD
        for one in steps:
            out_BLD = one(out_BLD)
        out_BLD.backward(grad_BLD)

    def forget() -> None:
        edits.zero_grad(set_to_none=True)
        h_BLD.grad = None

    @torch.compile(backend="inductor" if setup.device.type == "cuda" else "eager")
    def edit(one: nn.Module, h_BLD: Tensor) -> Tensor:
        return one(h_BLD)

    return [
        Side(EDITS, partial(through, list(edits)), forget),
        Side(COMPILED_EDITS, partial(through, [partial(edit, one) for one in edits]), forget),
        Side(PRODUCTS, partial(through, [lambda h_BLD: h_BLD * 1.001] * shape.num_layers), forget),
    ]
