"""Laws of training in two processes: DDP and FSDP2 over gloo, on CPUs, through accelerate as on any machine."""

import json

import pytest
import torch
from distributed_worker import Ranks, answer, refusal, save_in_parts, train
from test_trainer import KINDS, same

import vlreft

# torch's name for activation checkpointing was another one until lately.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp"])
NAMES = pytest.mark.parametrize("name", [pytest.param("text", marks=pytest.mark.slow), "vqa"])
BOTH_WRAPPED = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"]}


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks()
    yield processes
    processes.close()


def assert_equal_ranks_and_one(results, alone, atol=2e-6, loss_atol=1e-5):
    """Both ranks hold the same numbers, bit for bit, and one process with their batches has them within rounding."""
    assert same(results[0]["numbers"], results[1]["numbers"])
    assert same(results[0]["lora"], results[1]["lora"])
    assert results[0]["numbers"].keys() == alone["numbers"].keys()
    for name, value in alone["numbers"].items():
        torch.testing.assert_close(results[0]["numbers"][name], value, rtol=0, atol=atol)
    for ours, theirs in zip(results[0]["lora"], alone["lora"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert results[0]["losses"] == pytest.approx(alone["losses"], abs=loss_atol)


@ENGINES
@NAMES
def test_two_ranks_train_as_one(name, engine, ranks, tmp_path):
    results = ranks(train, name, str(tmp_path / "two"), engine)
    assert_equal_ranks_and_one(results, train(name, str(tmp_path / "one"), None))
    assert results[0]["kinds"] == ["Parameter"]  # whole, whatever the base is


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@ENGINES
@NAMES
def test_two_ranks_with_activation_checkpointing_train_as_one(name, engine, use_reentrant, ranks, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    results = ranks(train, name, str(tmp_path / "two"), engine, **options)
    assert_equal_ranks_and_one(results, train(name, str(tmp_path / "one"), None))


@pytest.mark.slow
@ENGINES
@NAMES
def test_two_ranks_accumulate_as_one(name, engine, ranks, tmp_path):
    results = ranks(train, name, str(tmp_path / "two"), engine, gradient_accumulation_steps=2)
    assert_equal_ranks_and_one(results, train(name, str(tmp_path / "one"), None, gradient_accumulation_steps=2))


# On both ranks, on one, and on none.
ROWS = {"one rank has no picture": [0, 1, -2, -3, -4, -5, 6, 7], "no rank has one": [-2, -3, -4, -5, 0, 1, -6, -7]}
IN_ORDER = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_batches_without_a_picture_hang_no_rank(engine, rows, ranks, tmp_path):
    results = ranks(train, "vqa", str(tmp_path / "two"), engine, rows=rows, **IN_ORDER)
    assert_equal_ranks_and_one(results, train("vqa", str(tmp_path / "one"), None, rows=rows, **IN_ORDER))


def test_a_sharded_tower_that_one_rank_would_wait_for_is_refused_on_all(ranks, tmp_path):
    rows = ROWS["one rank has no picture"]
    told = ranks(refusal, "vqa", str(tmp_path), "fsdp", rows=rows, fsdp_config=BOTH_WRAPPED, **IN_ORDER)
    assert all("ranks without pictures do not run the vision tower" in text for text in told)


@pytest.mark.slow
def test_a_sharded_tower_trains_where_all_have_pictures(ranks, tmp_path):
    results = ranks(train, "vqa", str(tmp_path / "two"), "fsdp", fsdp_config=BOTH_WRAPPED)
    assert_equal_ranks_and_one(results, train("vqa", str(tmp_path / "one"), None))


@pytest.mark.parametrize("num_rows", [5, pytest.param(1, marks=pytest.mark.slow)])
@ENGINES
def test_answers_are_gathered_from_all_ranks(engine, num_rows, ranks, tmp_path):
    alone = answer("vqa", str(tmp_path / "one"), None, num_rows)
    for result in ranks(answer, "vqa", str(tmp_path / "two"), engine, num_rows):
        assert result["answers"] == alone["answers"]
    assert len(alone["answers"]) == num_rows


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_checkpoints_hold_the_adapter_alone_and_resume_under_any_engine(engine, ranks, tmp_path):
    options = {"attach": {"dropout": 0.0}, "save_strategy": "steps", "save_steps": 3}
    results = ranks(train, "vqa", str(tmp_path), engine, **options)
    folder = tmp_path / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"reft_config.json", "reft_model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    assert (
        json.loads((folder / "reft_config.json").read_text())["base"]["class_name"]
        == type(KINDS["vqa"].model()).__name__
    )
    assert not list(folder.rglob("*.tmp"))

    again = ranks(train, "vqa", str(tmp_path / "again"), engine, resume=str(folder), attach={"seed": 99})
    assert same(again[0]["numbers"], results[0]["numbers"])
    alone = train("vqa", str(tmp_path / "alone"), None, resume=str(folder), attach={"seed": 99})
    assert_equal_ranks_and_one(results, alone | {"losses": results[0]["losses"]})

    model = KINDS["vqa"].model()
    reft = vlreft.load(model, tmp_path / "checkpoint-6")
    assert same(dict(reft.edits.state_dict()), results[0]["numbers"])


def test_numbers_that_lie_in_parts_are_saved_and_loaded_whole(ranks, tmp_path):
    """Trainers of others shard interventions with everything else."""
    results = ranks(save_in_parts, "vqa", str(tmp_path))
    loaded = vlreft.load(KINDS["vqa"].model(), tmp_path / "adapter")
    for result in results:
        assert result["kinds"] == ["DTensor"]
        assert same(result["before"], result["after"])
        assert result["prints"] == (loaded.fingerprint(),) * 2
        assert same(dict(loaded.edits.state_dict()), result["before"])


@pytest.mark.slow
@ENGINES
@NAMES
def test_two_ranks_train_interventions_and_lora_as_one(name, engine, ranks, tmp_path):
    results = ranks(train, name, str(tmp_path / "two"), engine, lora=True)
    assert results[0]["lora"]
    assert_equal_ranks_and_one(results, train(name, str(tmp_path / "one"), None, lora=True), atol=1e-5)


@pytest.mark.slow
@ENGINES
def test_a_base_in_bfloat16(engine, ranks, tmp_path):
    options = {"attach": {"dtype": torch.bfloat16}}
    results = ranks(train, "vqa", str(tmp_path / "two"), engine, **options)
    assert {value.dtype for value in results[0]["numbers"].values()} == {torch.float32}
    # The base's kernels round to bfloat16 otherwise for half a batch than for all of it, on some processors.
    alone = train("vqa", str(tmp_path / "one"), None, **options)
    assert_equal_ranks_and_one(results, alone, atol=5e-4, loss_atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"version": 1, "sync_module_states": False}, "interventions train under FSDP2"),
        ({"version": 2, "cpu_ram_efficient_loading": True}, "leaves every process but the first without numbers"),
        ({"version": 2, "activation_checkpointing": True}, "runs whole blocks again, edits included"),
    ],
    ids=["FSDP1", "loading on one rank", "its own checkpointing"],
)
@pytest.mark.slow
def test_what_would_tear_interventions_apart_is_refused(settings, told, ranks, tmp_path):
    assert all(told in text for text in ranks(refusal, "text", str(tmp_path), "fsdp", fsdp_config=settings))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_trains_saves_and_resumes_as_one(engine, ranks, tmp_path):
    pytest.importorskip("deepspeed")
    results = ranks(train, "vqa", str(tmp_path), engine, save_strategy="steps", save_steps=3)
    alone = train("vqa", str(tmp_path / "one"), None)
    assert_equal_ranks_and_one(results, alone)
    loaded = vlreft.load(KINDS["vqa"].model(), tmp_path / "checkpoint-6")
    assert same(dict(loaded.edits.state_dict()), results[0]["numbers"])
    again = ranks(train, "vqa", str(tmp_path), engine, resume=str(tmp_path / "checkpoint-3"), attach={"seed": 99})
    assert_equal_ranks_and_one(again, alone | {"losses": again[0]["losses"]})


@pytest.mark.slow
def test_the_matrix_has_no_failure():
    import matrix

    with matrix.quiet():
        cells = matrix.table_of(["llava", "qwen2_5_vl"], ["loreft", "red", "vti", "das"], list(matrix.WAYS))
    assert len(cells) == 2 * 4 * 8
    assert {cell for cell in cells.values() if cell.outcome != "passed"} == set()
