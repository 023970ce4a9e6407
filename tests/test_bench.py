"""The benchmark compares equal work and writes what it says it writes. Nothing here is about how long it takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tasks.bench import peers
from tasks.bench import sides as sides_file
from tasks.bench.__main__ import main
from tasks.bench.cells import CELLS, shapes
from tasks.bench.measure import Reading, Side, gigaflops, ratio, read_rounds, saved_megabytes, summary, time_rounds
from tasks.bench.peer_worker import locations, measure, measure_import
from tasks.bench.peers import run_peer
from tasks.bench.plot import LABELS, draw
from tasks.bench.runner import NO_GPU, as_markdown, run_cell
from tasks.bench.sides import ANSWER_LORA, FLOOR, FORWARD, LORA, PLAIN, REUSE
from tasks.bench.workloads import (
    TINY,
    WORKLOADS,
    Setup,
    build_base,
    floor_steps,
    make_batch,
    only_where_labels_are,
    reft_steps,
    shared,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
CPU = torch.device("cpu")
IN_PROCESSES = ("import", "attachment")  # each number is a fresh interpreter: seconds


@pytest.fixture
def setup(tmp_path):
    return Setup(CPU, tmp_path)


def cell_named(name, workload=None):
    return next(cell for cell in CELLS if cell.name == name and workload in (None, cell.workload))


# Cells ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=[pytest.mark.slow] if cell.needs_gpu else [], id=f"{cell.name}-{cell.workload}")
        for cell in CELLS
        if cell.name not in IN_PROCESSES
    ],
)
def test_every_cell_runs(setup, cell):
    num_values = 2 if cell.name == "tokens" else 1
    records = run_cell(cell, setup, TINY, num_rounds=2, num_values=num_values)
    if cell.needs_gpu:
        assert [record["not_taken"] for record in records] == [NO_GPU]
        records = run_cell(replace(cell, needs_gpu=False), setup, TINY, num_rounds=2, num_values=num_values)
    assert [record.get("at") for record in records] == [*(cell.values[:num_values] or [None])]
    for record in json.loads(json.dumps(records)):
        num_rounds = min(2, cell.num_rounds)
        assert len(record["sides"]) > 1
        for side in record["sides"].values():
            assert side["n"] == num_rounds
            assert 0 < side["quartiles"][0] <= side["median"] <= side["quartiles"][1]
            assert not cell.same_loss or side["gflop"] > 0
        assert [(one["of"], one["to"]) for one in record["ratios"]] == [*cell.ratios]
        assert all(one["n"] == num_rounds and one["median"] > 0 for one in record["ratios"])
        assert {name for pair in cell.ratios for name in pair} <= record["sides"].keys()


def test_all_workloads_have_a_tiny_one_and_true_sizes():
    assert WORKLOADS.keys() == TINY.keys() == {cell.workload for cell in CELLS}
    assert len({(cell.name, cell.workload) for cell in CELLS}) == len(CELLS)
    llava = WORKLOADS["llava"]
    assert (llava.width, llava.num_layers, llava.num_image_tokens, llava.num_rows) == (512, 8, 576, 5)
    [(value, shape), *_] = shapes(cell_named("tokens"), WORKLOADS)
    assert value == shape.num_image_tokens == 64


def test_imports_and_attachment_measure_a_fresh_process(setup, monkeypatch):
    codes = []

    def in_a_process(code):
        compile(code, "<cell>", "exec")
        codes.append(code)
        return len(codes)

    monkeypatch.setattr(sides_file, "in_a_process", in_a_process)
    for name in IN_PROCESSES:
        [record] = run_cell(cell_named(name), setup, TINY, num_rounds=1)
        assert [(one["of"], one["to"]) for one in record["ratios"]] == [*cell_named(name).ratios]
    assert len(codes) == len(sides_file.IMPORTS) + 1
    monkeypatch.undo()
    assert sides_file.in_a_process("import tasks.bench\nprint(6)") == 6
    with pytest.raises(ValueError, match="division"):
        sides_file.in_a_process("1 / 0")


# Equal work ----------------------------------------------------------------------------------------------------------


def test_all_sides_of_a_step_start_at_one_loss(setup):
    [record] = run_cell(cell_named("reuse", "llava"), setup, TINY, num_rounds=1)
    losses = {name: side["loss"] for name, side in record["sides"].items()}
    assert losses.keys() == {LORA, ANSWER_LORA, PLAIN, REUSE, FLOOR, FORWARD}
    assert list(losses.values()) == pytest.approx([losses[PLAIN]] * 6, rel=1e-6)
    flops = {name: side["gflop"] for name, side in record["sides"].items()}
    assert max(flops[FORWARD], flops[REUSE]) < flops[PLAIN] < flops[ANSWER_LORA] < flops[LORA]


def test_unequal_work_is_refused(setup):
    cell = cell_named("step")

    def unequal(where, shape):
        [first, second, *rest] = cell.build(where, shape)
        return [first, replace(second, run=lambda: torch.tensor(0.5)), *rest]

    with pytest.raises(ValueError, match=r"cell 'step' on 'thin' compares different work.*0\.5"):
        run_cell(replace(cell, build=unequal), setup, TINY, num_rounds=1)


def test_sides_share_the_weights_and_nothing_else():
    base = build_base(TINY["llava"], CPU)
    other = shared(base)
    for (name, theirs), ours in zip(base.named_parameters(), other.parameters(), strict=True):
        assert theirs is ours, name
    assert not {id(module) for module in base.modules()} & {id(module) for module in other.modules()}
    assert not any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("num_edited", [1, 2, 0])
def test_the_floors_gradient_reaches_the_first_edited_block_and_no_further(setup, num_edited):
    shape = replace(TINY["thin"], num_edited=num_edited)
    steps = floor_steps(setup, build_base(shape, CPU), shape, make_batch(shape, CPU))
    reached = []
    for block in steps.model.model.layers:
        block.register_forward_hook(lambda _, args, h: reached.append((args[0].requires_grad, h.requires_grad)))
    steps.step()
    first = shape.layers[0]
    assert reached == [(i > first, i >= first) for i in range(shape.num_layers)]
    [(name, leaf)] = [(name, p) for name, p in steps.model.named_parameters() if p.grad is not None]
    assert name == "floor"
    assert leaf.grad.abs().max() > 0
    steps.forget()
    assert leaf.grad is None


def test_plain_and_reused_steps_have_the_same_gradients(setup):
    shape = TINY["llava"]
    base, batch = build_base(shape, CPU), make_batch(shape, CPU)
    found = []
    for reuse in (False, True):
        steps = reft_steps(setup, base, shape, batch, {"reuse_prefix": reuse})
        found.append((steps.step(), [p.grad for p in steps.model.parameters() if p.grad is not None]))
    (loss, plain), (reused_loss, reused) = found
    torch.testing.assert_close(reused_loss, loss)
    assert len(plain) == len(reused) > 0
    for ours, theirs in zip(reused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_of_the_answer_give_the_whole_loss():
    shape = TINY["llava"]
    model, batch = build_base(shape, CPU).eval(), make_batch(shape, CPU)
    careful = model(**only_where_labels_are(batch, shape))
    assert careful.logits.shape[1] == shape.num_answer + 1
    torch.testing.assert_close(careful.loss, model(**batch).loss)


def test_images_are_all_different_or_all_the_same():
    shape = TINY["llava"]
    different, same = (make_batch(shape, CPU, one_image=one)["pixel_values"] for one in (False, True))
    assert different.shape == same.shape
    assert same[0].equal(same[1])
    assert not different[0].equal(different[1])


def test_generation_gives_the_bases_tokens(setup):
    shape = TINY["generate"]
    base, ours, lora = (side.run() for side in cell_named("generate").build(setup, shape))
    assert base.shape == (shape.num_rows, shape.num_question + shape.num_answer)
    assert base.equal(ours)
    assert base.equal(lora)


def test_orthonormal_sides_reach_all_rotations(setup):
    for side in cell_named("orthonormal").build(setup, TINY["orthonormal"]):
        side.prepare()
        assert side.run().isfinite()


# Measures ------------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_prepared():
    calls = []
    sides = [Side(name, lambda n=name: calls.append(n), lambda n=name: calls.append(f"({n})")) for name in "abc"]
    readings = time_rounds(sides, 2, CPU)
    assert calls == ["(a)", "a", "(b)", "b", "(c)", "c", "(b)", "b", "(c)", "c", "(a)", "a"]
    assert {name: len(rounds) for name, rounds in readings.items()} == {"a": 2, "b": 2, "c": 2}
    assert read_rounds([Side("x", lambda: 3)], 2) == {"x": [Reading(3.0)] * 2}


def test_ratios_are_taken_round_by_round():
    readings = {
        "a": [Reading(2, 1), Reading(30, 6), Reading(8, 8)],
        "b": [Reading(1, 1), Reading(10, 2), Reading(2, 1)],
    }
    found = ratio(readings, "a", "b")
    assert (found["of"], found["to"], found["median"], found["n"]) == ("a", "b", 3.0, 3)
    assert found["quartiles"] == [2.5, 3.5]
    assert found["cpu"]["median"] == 3.0
    assert summary([5.0]) == {"median": 5.0, "quartiles": [5.0, 5.0], "n": 1}


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    weight, x = nn.Parameter(torch.ones(10, 10)), torch.ones(1000, 10, requires_grad=True)

    def step():
        (x @ weight).exp().sum().backward()

    # x for the weight's gradient, the exponential for its own.
    assert saved_megabytes(step, [weight]) == 2 * 1000 * 10 * 4 / 1e6
    assert saved_megabytes(step, [weight, x]) == 1000 * 10 * 4 / 1e6


def test_arithmetic_counts_products_and_attention():
    a, q = torch.ones(20, 30), torch.ones(1, 2, 16, 8)
    assert gigaflops(lambda: a @ a.T) == 2 * 20 * 20 * 30 / 1e9
    attention = gigaflops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == 2 * 2 * 2 * 16 * 16 * 8 / 1e9


# Peers ---------------------------------------------------------------------------------------------------------------

# Takes what the worker gives to pyreft; edits as LoReFT does, on those positions.
STAND_IN = """
import torch
class LoreftIntervention(torch.nn.Module):
    def __init__(self, embed_dim, low_rank_dimension, dtype):
        super().__init__()
        self.source = torch.nn.Linear(embed_dim, low_rank_dimension, dtype=dtype)
        self.read = torch.nn.Linear(embed_dim, low_rank_dimension, bias=False, dtype=dtype)
class ReftConfig:
    def __init__(self, representations):
        self.representations = representations
class Model(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.model, self.items = model, config.representations
        self.edits = torch.nn.ModuleList(item["intervention"] for item in self.items)
        self.places = None
        for number, item in enumerate(self.items):
            model.model.layers[item["layer"]].register_forward_hook(lambda m, a, h, n=number: self.edit(n, h))
    def edit(self, number, h):
        positions = torch.tensor(self.places[number])
        if h.shape[1] == 1:
            return h
        rows, edit = torch.arange(len(h))[:, None], self.edits[number]
        chosen = h[rows, positions]
        delta = (edit.source(chosen) - edit.read(chosen)) @ edit.read.weight
        return h.index_put((rows, positions), chosen + delta)
    def get_trainable_parameters(self):
        return list(self.edits.parameters())
    def forward(self, base, unit_locations, labels):
        self.places = unit_locations["sources->base"][1]
        return None, self.model(**base, labels=labels)
    def generate(self, base, unit_locations, intervene_on_prompt, **more):
        assert intervene_on_prompt
        self.places = unit_locations["sources->base"][1]
        return None, self.model.generate(**base, **more)
def get_reft_model(model, config):
    return Model(model, config)
"""


@pytest.fixture
def peer_environment(tmp_path, monkeypatch):
    """An interpreter that finds a package called pyreft."""
    about = tmp_path / "pyreft-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pyreft\nVersion: 0.1.0\n")
    (tmp_path / "pyreft.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return sys.executable


def test_a_peer_without_an_interpreter_is_not_taken():
    record = run_peer(cell_named("step"), "pyreft", None, TINY)
    assert record["not_taken"] == "pyreft: no interpreter was given (`--pyreft PYTHON`)"


def test_a_peer_that_fails_says_why(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no pyreft' >&2\nexit 1\n")
    python.chmod(0o755)
    record = run_peer(cell_named("step"), "pyreft", str(python), TINY, num_rounds=1)
    assert record["not_taken"] == "pyreft failed: ModuleNotFoundError: no pyreft"
    with pytest.raises(ValueError, match="cannot be run"):
        run_peer(cell_named("step"), "pyreft", "no-such-python", TINY)


@pytest.mark.slow
def test_a_peer_runs_in_its_interpreter_beside_its_own_floor(peer_environment):
    record = run_peer(cell_named("step"), "pyreft", peer_environment, TINY, num_rounds=2)
    assert record["versions"]["pyreft"] == "0.1.0", record
    assert record["sides"].keys() == {"pyreft", FLOOR}
    assert [(one["of"], one["to"], one["n"]) for one in record["ratios"]] == [("pyreft", FLOOR, 2)]
    assert "pyreft 0.1.0" in as_markdown({"machine": {}, "versions": {}, "records": [record]})


@pytest.mark.parametrize(("name", "floors"), [("generate", {"base"}), ("attach", set()), ("import", set())])
def test_a_peer_runs_the_other_cells(peer_environment, monkeypatch, name, floors):
    monkeypatch.syspath_prepend(Path(os.environ["PYTHONPATH"]))

    def in_this_process(_python, order):
        order = json.loads(json.dumps(order))
        sides = measure_import("pyreft") if name == "import" else measure(order)
        return subprocess.CompletedProcess([], 0, json.dumps({"versions": {"pyreft": "0.1.0"}, "sides": sides}), "")

    monkeypatch.setattr(peers, "_run", in_this_process)
    record = run_peer(cell_named(name), "pyreft", peer_environment, TINY, num_rounds=2)
    monkeypatch.delitem(sys.modules, "pyreft")
    assert record["sides"].keys() == {"pyreft"} | floors
    assert all(side["n"] == 2 for side in record["sides"].values())
    assert [one["to"] for one in record["ratios"]] == [*floors]


def test_the_worker_edits_the_first_and_the_last_tokens_of_each_prompt():
    order = {"num_first": 2, "num_last": 1, "llama": {"num_hidden_layers": 2}}
    firsts, lasts = [[0, 1], [3, 4]], [[8], [8]]
    assert locations(order, [0, 3], 9) == {"sources->base": (None, [firsts, firsts, lasts, lasts])}


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_json_and_prints_tables(tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    threads = str(torch.get_num_threads())
    main(["--cells", "memory", "attach", "--tiny", "--rounds", "2", "--threads", threads, "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert results["machine"]["device"] in ("cpu", "cuda")
    assert results["is_tiny"]
    taken = [record["cell"] for record in results["records"] if "sides" in record]
    assert set(taken) == {"memory", "attach"}
    printed = capsys.readouterr().out
    assert printed.strip() == as_markdown(results).strip()
    for piece in ("| cell | workload | side |", "| cell | workload | ratio |", "| not taken |", "torch 2.", LORA):
        assert piece in printed
    widths = [[line.count("|") for line in table.splitlines()] for table in printed.split("\n\n")[1:]]
    assert all(len(set(table)) == 1 for table in widths)


def test_growth_is_drawn(tmp_path):
    side = {"median": 2.0, "quartiles": [1.0, 3.0], "n": 3}
    records = [
        {"sweep": sweep, "at": at, "sides": {"a": side, "b": side}} for sweep in ("rank", "num_rows") for at in (1, 4)
    ]
    draw(records, tmp_path / "new" / "growth.png")
    with Image.open(tmp_path / "new" / "growth.png") as picture:
        assert picture.width > picture.height
    with pytest.raises(ValueError, match="no cell that grows"):
        draw([{"cell": "step", "sides": {}}], tmp_path / "growth.png")


def test_what_grows_has_a_label():
    assert {cell.sweep for cell in CELLS} - {""} == LABELS.keys()


@pytest.mark.parametrize("wrong", [["--cells", "nothing"], ["--rounds", "0"]])
def test_the_command_refuses_what_it_does_not_know(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert "error" in capsys.readouterr().err
