"""Interleaved rounds, medians and spread, bytes saved for the backward pass, arithmetic; and what machine it was."""

import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

PACKAGES = ("vlreft", "torch", "transformers", "peft", "accelerate")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Side:
    """One of those that a cell compares. `run` is timed, or returns the number itself; `prepare` comes before, untimed.

    A `run` that returns a loss (a tensor of one number) lets the cell check that its sides do the same work.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Reading:
    """One round of one side, in the cell's unit. cpu: seconds of all threads of this process, in the same unit."""

    value: float
    cpu: float | None = None


def time_rounds(sides: Sequence[Side], num_rounds: int, device: torch.device) -> dict[str, list[Reading]]:
    """Run all sides in every round, each round beginning with the next one; milliseconds."""
    readings: dict[str, list[Reading]] = {side.name: [] for side in sides}
    gc.freeze()  # what is there need not be looked through again before each run
    try:
        for number in range(num_rounds):
            for place in range(len(sides)):
                side = sides[(number + place) % len(sides)]
                side.prepare()
                gc.collect()
                gc.disable()
                synchronize(device)
                wall, cpu = time.perf_counter(), time.process_time()
                side.run()
                synchronize(device)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                gc.enable()
                readings[side.name].append(Reading(1e3 * wall, 1e3 * cpu))
    finally:
        gc.enable()
        gc.unfreeze()
    return readings


def read_rounds(sides: Sequence[Side], num_rounds: int) -> dict[str, list[Reading]]:
    """Collect numbers that the sides return themselves, in the same interleaved order."""
    readings: dict[str, list[Reading]] = {side.name: [] for side in sides}
    for _ in range(num_rounds):
        for side in sides:
            side.prepare()
            readings[side.name].append(Reading(float(side.run())))
    return readings


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and number of values."""
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    else:
        quartiles = [values[0]] * 3
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]], "n": len(values)}


def summarised(readings: dict[str, list[Reading]]) -> dict[str, Any]:
    """Return each side's summary, with that of its CPU time where it was taken."""
    sides: dict[str, Any] = {}
    for name, rounds in readings.items():
        sides[name] = summary([reading.value for reading in rounds])
        cpu = [reading.cpu for reading in rounds if reading.cpu is not None]
        if cpu:
            sides[name]["cpu"] = summary(cpu)
    return sides


def ratio(readings: dict[str, list[Reading]], of: str, to: str) -> dict[str, Any]:
    """Summarise the ratio of two sides, round by round: what loads the machine for a while loads both."""
    pairs = list(zip(readings[of], readings[to], strict=True))
    found = {"of": of, "to": to, **summary([a.value / b.value for a, b in pairs])}
    cpu = [a.cpu / b.cpu for a, b in pairs if a.cpu is not None and b.cpu]
    return found | ({"cpu": summary(cpu)} if cpu else {})


def saved_megabytes(run: Callable[[], Any], ignored: Sequence[Tensor]) -> float:
    """Return how many MB (1e6 bytes) a step keeps for its backward pass, each storage once, without `ignored`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values()) / 1e6


def peak_megabytes(run: Callable[[], Any], device: torch.device) -> float:
    """Return the most memory during a call, 1e6 bytes, weights and all: of a GPU's tensors; else of this process."""
    if device.type != "cuda":
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # since the process began
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6


def gigaflops(run: Callable[[], Any]) -> float:
    """Return the arithmetic of a call, 1e9 floating point operations: matrix products, convolutions, attention."""
    aten = torch.ops.aten

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    on_cpu: dict[Any, Any] = {  # torch counts the other devices' kernels, not these
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops() / 1e9


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Say what it runs on, and how loaded that is."""
    machine = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "device": str(device),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["gpu_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        machine["cuda"] = torch.version.cuda
    return machine


def describe_versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
