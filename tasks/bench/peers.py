"""Asks pyreft and adapters, which need another transformers, to run the same cells in their own interpreters."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tasks.bench.cells import Cell
from tasks.bench.measure import Reading, ratio, summarised
from tasks.bench.peer_worker import BASE, FLOOR
from tasks.bench.workloads import Shape, make_batch, make_prompts, text_settings

PEERS = ("pyreft", "adapters")
WORKER = Path(__file__).with_name("peer_worker.py")
ENDS = re.compile(r"f(\d+)\+l(\d+)")


def run_peer(
    cell: Cell, peer: str, python: str | None, workloads: Mapping[str, Shape], num_rounds: int | None = None
) -> dict[str, Any]:
    """Return the record of a peer on a cell, or why it was not taken. Times are the CPU's, beside its own floor."""
    about = {"cell": cell.name, "workload": cell.workload, "claim": cell.claim, "unit": cell.unit, "peer": peer}
    if python is None:
        return {**about, "not_taken": f"{peer}: no interpreter was given (`--{peer} PYTHON`)"}
    count = num_rounds or cell.num_rounds
    order = _order(cell, peer, workloads[cell.workload], count)
    readings: dict[str, list[Reading]] = {}
    versions: dict[str, str] = {}
    for _ in range(count if cell.peer == "import" else 1):
        done = _run(python, order)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return {**about, "not_taken": f"{peer} failed: {why}"}
        found = json.loads(done.stdout.splitlines()[-1])
        versions = found["versions"]
        for name, rounds in found["sides"].items():
            readings.setdefault(name, []).extend(Reading(*reading) for reading in rounds)
    floors = [name for name in readings if name in (FLOOR, BASE)]
    ratios = [ratio(readings, peer, floor) for floor in floors]
    return {**about, "versions": versions, "sides": summarised(readings), "ratios": ratios}


def _run(python: str, order: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [python, str(WORKER), json.dumps(order)]
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise ValueError(
            f"`{python}` cannot be run ({error}); name the Python of an environment with the peer"
        ) from error


def _order(cell: Cell, peer: str, shape: Shape, num_rounds: int) -> dict[str, Any]:
    order: dict[str, Any] = {
        "cell": cell.peer,
        "peer": peer,
        "num_rounds": num_rounds,
        "threads": torch.get_num_threads(),
        "llama": text_settings(shape),
        "rank": shape.rank,
        "num_answer": shape.num_answer,
    }
    if (ends := ENDS.fullmatch(shape.positions)) is not None:
        order |= {"num_first": int(ends[1]), "num_last": int(ends[2])}
    cpu = torch.device("cpu")
    if cell.peer == "step":
        order["ids"] = make_batch(shape, cpu)["input_ids"].tolist()
    if cell.peer == "generate":
        prompts = make_prompts(shape, cpu)
        order |= {"ids": prompts["input_ids"].tolist(), "mask": prompts["attention_mask"].tolist()}
    return order
