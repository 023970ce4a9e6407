"""Runs one cell of a peer (pyreft, adapters) and its own floor, in that peer's interpreter: `peer_worker.py JSON`.

Imports nothing of this repository, whose other parts need a newer transformers. Prints one line of JSON: versions and
[wall, CPU] milliseconds of each round. A step is the model's own forward and backward, without any trainer.
"""

import gc
import json
import sys
import time
from importlib.metadata import version
from typing import Any

FLOOR, BASE = "floor: gradient to the first edited block", "base"


def build(order: dict[str, Any], *, is_training: bool) -> Any:
    """Make the same base as the cell's own workload: same sizes, same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**order["llama"])).requires_grad_(False).train(is_training)
    model.config.use_cache = not is_training
    return model


def wrap_pyreft(model: Any, order: dict[str, Any]) -> Any:
    """LoReFT on all layers, a set of interventions for the first positions and one for the last."""
    import pyreft  # pyright: ignore[reportMissingImports]
    import torch

    width, rank = order["llama"]["hidden_size"], order["rank"]
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=rank, dtype=torch.float32),
        }
        for _ in ("first", "last")
        for layer in range(order["llama"]["num_hidden_layers"])
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def wrap_adapters(model: Any, order: dict[str, Any]) -> Any:
    """LoReFT on all layers, untied."""
    import adapters  # pyright: ignore[reportMissingImports]

    adapters.init(model)
    config = adapters.LoReftConfig(
        r=order["rank"],
        prefix_positions=order["num_first"],
        suffix_positions=order["num_last"],
        tied_weights=False,
        dropout=0.0,
    )
    model.add_adapter("reft", config=config)
    model.train_adapter("reft")
    return model


def locations(order: dict[str, Any], starts: list[int], end: int) -> dict[str, Any]:
    """Say to pyreft where to intervene: on each row's first positions from its start on, on the last before `end`."""
    first = [[start + i for i in range(order["num_first"])] for start in starts]
    last = [[end - i for i in range(order["num_last"], 0, -1)] for _ in starts]
    num_layers = order["llama"]["num_hidden_layers"]
    return {"sources->base": (None, [first] * num_layers + [last] * num_layers)}


def step_sides(order: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward: gradient that merely flows, and the peer."""
    import torch

    ids = torch.tensor(order["ids"])
    labels = ids.clone()
    labels[:, : -order["num_answer"]] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    floor, edited = build(order, is_training=True), build(order, is_training=True)
    leaf = torch.zeros(order["llama"]["hidden_size"], requires_grad=True)

    def let_gradient_begin(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + leaf, *output[1:]) if isinstance(output, tuple) else output + leaf

    floor.model.layers[0].register_forward_hook(let_gradient_begin)
    if order["peer"] == "pyreft":
        wrapped = wrap_pyreft(edited, order)
        places = locations(order, [0] * len(ids), ids.shape[1] - order["num_answer"])

        def forward() -> Any:
            return wrapped(batch, unit_locations=places, labels=labels)[1].loss

        parameters = list(wrapped.get_trainable_parameters())
    else:
        wrapped = wrap_adapters(edited, order)
        wrapped.train()

        def forward() -> Any:
            return wrapped(**batch, labels=labels).loss

        parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]

    def forget() -> None:
        leaf.grad = None
        for parameter in parameters:
            parameter.grad = None

    return {
        FLOOR: (forget, lambda: floor(**batch, labels=labels).loss.backward()),
        order["peer"]: (forget, lambda: forward().backward()),
    }


def attach_sides(order: dict[str, Any]) -> dict[str, Any]:
    """Putting the peer on a base in memory."""
    fresh: list[Any] = []

    def renew() -> None:
        fresh[:] = [build(order, is_training=True)]

    wrap = wrap_pyreft if order["peer"] == "pyreft" else wrap_adapters
    return {order["peer"]: (renew, lambda: wrap(fresh[0], order))}


def generate_sides(order: dict[str, Any]) -> dict[str, Any]:
    """Greedy generation from left-padded prompts."""
    import torch

    prompts = {"input_ids": torch.tensor(order["ids"]), "attention_mask": torch.tensor(order["mask"])}
    count = order["num_answer"]
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    base, edited = build(order, is_training=False), build(order, is_training=False)
    if order["peer"] == "pyreft":
        wrapped = wrap_pyreft(edited, order)
        starts = (prompts["attention_mask"] == 0).sum(1).tolist()
        places = locations(order, starts, prompts["input_ids"].shape[1])

        def run() -> Any:
            return wrapped.generate(prompts, unit_locations=places, intervene_on_prompt=True, **settings)
    else:
        wrapped = wrap_adapters(edited, order).eval()

        def run() -> Any:
            return wrapped.generate(**prompts, **settings)

    return {BASE: (lambda: None, lambda: base.generate(**prompts, **settings)), order["peer"]: (lambda: None, run)}


SIDES = {"step": step_sides, "attach": attach_sides, "generate": generate_sides}


def measure(order: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Interleave the sides of a cell, after two rounds that do not count."""
    import torch

    torch.set_num_threads(order["threads"])
    sides = SIDES[order["cell"]](order)
    readings: dict[str, list[list[float]]] = {name: [] for name in sides}
    gc.collect()
    gc.freeze()
    for number in range(-2, order["num_rounds"]):
        for name, (prepare, run) in sides.items():
            prepare()
            gc.collect()
            gc.disable()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            gc.enable()
            if number >= 0:
                readings[name].append([1e3 * wall, 1e3 * cpu])
    return readings


def measure_import(peer: str) -> dict[str, list[list[float]]]:
    """Import the peer after torch and transformers; seconds."""
    import torch  # noqa: F401
    import transformers

    _ = transformers.PreTrainedModel, transformers.GenerationMixin
    wall, cpu = time.perf_counter(), time.process_time()
    __import__(peer)
    return {peer: [[time.perf_counter() - wall, time.process_time() - cpu]]}


def main() -> None:
    """Do what the order says."""
    order = json.loads(sys.argv[1])
    sides = measure_import(order["peer"]) if order["cell"] == "import" else measure(order)
    versions = {name: version(name) for name in (order["peer"], "torch", "transformers")}
    print(json.dumps({"versions": versions, "sides": sides}))


if __name__ == "__main__":
    main()
