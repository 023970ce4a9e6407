"""Runs cells into records, and shows records as Markdown."""

import gc
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tasks.bench.cells import Cell, shapes
from tasks.bench.measure import Side, gigaflops, ratio, read_rounds, summarised, time_rounds
from tasks.bench.workloads import Setup, Shape

# What losses may differ by, relative: another order of summation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
NO_GPU = "not taken on a GPU: there is none here"


def run_cell(
    cell: Cell,
    setup: Setup,
    workloads: Mapping[str, Shape],
    num_rounds: int | None = None,
    num_values: int = 0,
    *,
    keep_going: bool = False,
) -> list[dict[str, Any]]:
    """Return a record for the cell, or for each value that it sweeps over.

    A record has `sides` (median, quartiles, n; CPU time; arithmetic and loss of a training step) and `ratios`, or says
    why it was `not_taken`: with `keep_going`, whatever went wrong. Raises ValueError where sides that must compute the
    same loss do not.
    """
    about = {"cell": cell.name, "workload": cell.workload, "claim": cell.claim, "unit": cell.unit}
    if cell.needs_gpu and setup.device.type != "cuda":
        return [{**about, "not_taken": NO_GPU}]
    records = []
    for value, shape in shapes(cell, dict(workloads), num_values):
        at = {} if value is None else {"sweep": cell.sweep, "at": value}
        started = time.perf_counter()
        try:
            found = _run(cell, setup, shape, num_rounds or cell.num_rounds)
        except Exception as error:
            if not keep_going:
                raise
            traceback.print_exc()
            found = {"not_taken": f"{type(error).__name__}: {error}"}
        records.append({**about, **at, **found, "seconds": time.perf_counter() - started})
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    return records


def _run(cell: Cell, setup: Setup, shape: Shape, num_rounds: int) -> dict[str, Any]:
    sides = cell.build(setup, shape)
    if cell.unit != "ms":
        readings = read_rounds(sides, min(num_rounds, cell.num_rounds))
        return {"sides": summarised(readings), "ratios": [ratio(readings, *pair) for pair in cell.ratios]}
    work = _warm_up(sides, is_counted=cell.same_loss)
    if cell.same_loss:
        _refuse_other_losses(cell, {name: float(one["loss"]) for name, one in work.items()}, TOLERANCE[shape.dtype])
    readings = time_rounds(sides, num_rounds, setup.device)
    found = summarised(readings)
    for name, one in work.items():
        found[name] |= one
    ratios = [ratio(readings, *pair) for pair in cell.ratios]
    for one in ratios:
        of, to = (found[one[name]].get("gflop") for name in ("of", "to"))
        if of and to:
            one["by_arithmetic"] = of / to
    return {"sides": found, "ratios": ratios}


def _warm_up(sides: Sequence[Side], *, is_counted: bool) -> dict[str, dict[str, float]]:
    """Run each side twice; where it is counted, return its loss, and its arithmetic in the second run."""
    work: dict[str, dict[str, float]] = {}
    for side in sides:
        side.prepare()
        result = side.run()
        side.prepare()
        if is_counted:
            work[side.name] = {"loss": float(result), "gflop": gigaflops(side.run)}
        else:
            side.run()
    return work


def _refuse_other_losses(cell: Cell, losses: Mapping[str, float], tolerance: float) -> None:
    expected = next(iter(losses.values()))
    others = {name: loss for name, loss in losses.items() if abs(loss - expected) > tolerance * abs(expected)}
    if others:
        raise ValueError(
            f"cell '{cell.name}' on '{cell.workload}' compares different work: losses {dict(losses)} on one batch"
        )


# Markdown ------------------------------------------------------------------------------------------------------------


def as_markdown(results: Mapping[str, Any]) -> str:
    """Return the machine, the versions, a table of sides and a table of ratios."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value is not None)
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    taken = [record for record in results["records"] if "sides" in record]
    missing = [record for record in results["records"] if "not_taken" in record]
    parts = [f"Machine: {machine}.\nVersions: {versions}.", _table(SIDES, [row for r in taken for row in _sides(r)])]
    parts.append(_table(RATIOS, [row for record in taken for row in _ratios(record)]))
    if missing:
        rows = [[record["cell"], record["workload"], record["not_taken"]] for record in missing]
        parts.append(_table(("cell", "workload", "not taken"), rows))
    return "\n\n".join(parts)


SIDES = ("cell", "workload", "side", "median", "quartiles", "CPU", "GFLOP", "n")
RATIOS = ("cell", "workload", "ratio", "median", "quartiles", "of CPU time", "by arithmetic", "n")


def _sides(record: Mapping[str, Any]) -> list[list[str]]:
    unit = record["unit"]
    rows = []
    for name, side in record["sides"].items():
        low, high = side["quartiles"]
        cpu = f"{number(side['cpu']['median'])} {unit}" if "cpu" in side else ""
        flops = number(side["gflop"]) if side.get("gflop") else ""
        spread = f"{number(low)} to {number(high)}"
        rows.append([*_where(record), name, f"{number(side['median'])} {unit}", spread, cpu, flops, str(side["n"])])
    return rows


def _ratios(record: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for one in record["ratios"]:
        low, high = one["quartiles"]
        cpu = f"{one['cpu']['median']:.2f}" if "cpu" in one else ""
        limit = f"{one['by_arithmetic']:.2f}" if "by_arithmetic" in one else ""
        spread = f"{low:.2f} to {high:.2f}"
        name = f"{one['of']} / {one['to']}"
        rows.append([*_where(record), name, f"**{one['median']:.2f}**", spread, cpu, limit, str(one["n"])])
    return rows


def _where(record: Mapping[str, Any]) -> list[str]:
    at = f", {record['sweep']} {record['at']}" if "at" in record else ""
    versions = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
    return [record["cell"], record["workload"] + at + (f" ({versions})" if versions else "")]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Write a number with three digits that matter."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
