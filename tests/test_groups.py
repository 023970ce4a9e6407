"""Groups of a subspace: what each is, acting and training apart, that none disturbs another, and files with them."""

import copy
import json

import numpy as np
import pytest
import torch
from test_interventions import householder_rows
from tiny import image_batch, llama, llava, numbers, qwen2, shake, shared_llama, shared_llava, text_batch
from transformers import TrainingArguments

import vlreft
from vlreft.interventions import INTERVENTIONS
from vlreft.reuse.prefix import PrefixReuse

WIDTH = 24
METHODS = ["loreft", "direft", "noreft", "nodireft", "consreft", "lobireft", "das"]
TRAINED = [method for method in METHODS if method != "das"]  # das needs a source to act at all
FREE = ("noreft", "nodireft")
GROUPS = ("a", "b", "c")
ROWS = {"a": slice(0, 2), "b": slice(2, 4), "c": slice(4, 6)}


def edit_of(method, groups=GROUPS, *, width=WIDTH, seed=0, is_shaken=True, **settings):
    torch.manual_seed(seed)
    identity = "identity" if INTERVENTIONS[method].has_identity else "reference"
    edit = INTERVENTIONS[method](width, 6, groups=groups, **{"init": identity, **settings})
    if is_shaken:
        with torch.no_grad():
            for parameter in edit.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return edit


def states(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def item(method="loreft", groups=("a", "b"), rank=4, **fields):
    init = "identity" if INTERVENTIONS[method].has_identity else "reference"
    return vlreft.Intervention(method, rank=rank, groups=groups, **{"init": init, **fields})


def plain(edit, method, h, on):
    """Return the formula in NumPy with the rows of the groups that are `on` and no others."""
    p = {name: parameter.detach().double().numpy() for name, parameter in edit.named_parameters()}
    rows = np.concatenate([np.arange(6)[ROWS[name]] for name in on])
    basis = p["projection"] if method in FREE else householder_rows(torch.tensor(p["rotation"])).numpy()
    r, h = basis[rows], h.numpy()
    if method in ("loreft", "noreft"):
        return h + (h @ p["weight"][rows].T + p["bias"][rows] - h @ r.T) @ r
    if method in ("direft", "nodireft"):
        return h + (h @ p["weight"][rows].T + p["bias"][rows]) @ r
    if method == "consreft":
        return h + (p["bias"][rows] - h @ r.T) @ r
    return h + (p["bias"][rows] @ r if method == "lobireft" else (h @ r.T) @ r)  # das: of a source at 2h


def run(edit, method, h, groups, strength=1.0):
    return edit(h, strength, 2 * h if method == "das" else None, groups)


@pytest.fixture
def on():
    """Attach adapters, shaken; they go afterwards."""
    made = []

    def attach(model, *items, name="default", is_shaken=True):
        reft = vlreft.attach(model, vlreft.ReftConfig(items), name)
        made.append(shake(reft) if is_shaken else reft)
        return reft

    yield attach
    for reft in reversed(made):
        reft.detach()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def inputs(num_rows=2):
    return {"input_ids": text_batch(num_rows)["input_ids"]}


# What a group is -----------------------------------------------------------------------------------------------------


def test_every_method_of_a_rank_is_covered():
    assert set(METHODS) == {name for name, method in INTERVENTIONS.items() if method.uses_rank}


@pytest.mark.parametrize("method", METHODS)
def test_groups_that_are_all_on_are_no_groups(method):
    """Bit for bit, values and gradients: by default, and by name."""
    h = states(5, dtype=torch.float32)
    with_groups, without = edit_of(method), edit_of(method, groups=())
    for groups in (None, dict.fromkeys(GROUPS, 1.0)):
        with_groups.zero_grad(), without.zero_grad()
        ours, theirs = run(with_groups, method, h, groups), run(without, method, h, None)
        assert torch.equal(ours, theirs)
        ours.square().sum().backward(), theirs.square().sum().backward()
        for mine, other in zip(with_groups.parameters(), without.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)
            assert mine.grad.any()


@pytest.mark.parametrize("on_names", [("a",), ("b",), ("c",), ("a", "c"), GROUPS], ids="+".join)
@pytest.mark.parametrize("method", METHODS)
def test_a_group_is_the_formula_with_its_rows(method, on_names):
    edit, h = edit_of(method), states(5)
    ours = run(edit, method, h, dict.fromkeys(on_names, 1.0))
    expected = torch.from_numpy(plain(edit, method, h, on_names))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_strengths_multiply_each_groups_share(method):
    edit, h = edit_of(method), states(5)
    ours = run(edit, method, h, {"a": 0.5, "c": -2.0}, strength=3.0)
    shares = {name: plain(edit, method, h, (name,)) - h.numpy() for name in ("a", "c")}
    expected = torch.from_numpy(h.numpy() + 3.0 * (0.5 * shares["a"] - 2.0 * shares["c"]))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(run(edit, method, h, {}), h)
    assert torch.equal(run(edit, method, h, {"b": 0.0}), h)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("method", ["loreft", "direft", "noreft", "nodireft"])
def test_groups_with_an_activation_add_up(method, activation):
    edit, h = edit_of(method, activation=activation, init="reference"), states(5)
    parts = sum(run(edit, method, h, {name: 1.0}) - h for name in GROUPS)
    torch.testing.assert_close(h + parts, run(edit, method, h, None), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in FREE])
def test_what_a_group_writes_no_other_moves(method):
    """The states inside one group's subspace are the same with the others on and off."""
    edit, h = edit_of(method), states(5)
    r_RD = householder_rows(edit.rotation.detach().double())[ROWS["b"]]
    alone, all_on = run(edit, method, h, {"b": 1.0}), run(edit, method, h, None)
    torch.testing.assert_close(alone @ r_RD.T, all_on @ r_RD.T, atol=1e-12, rtol=1e-12)
    assert (alone - all_on).abs().max() > 1e-2


# In a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", TRAINED)
def test_all_on_are_no_groups_in_a_model(method, dtype):
    found = []
    for groups in ((), ("a", "b")):
        model = llama().to(dtype)
        reft = shake(vlreft.attach(model, vlreft.ReftConfig(item(method, groups))))
        found.append(logits(model, inputs()))
        if groups:
            with reft.groups(groups):
                found.append(logits(model, inputs()))
            with reft.groups("a"):
                assert not torch.equal(logits(model, inputs()), found[0])
            found.append(logits(model, inputs()))
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].dtype == dtype


def test_a_strength_for_each_row_is_each_row_alone(on):
    model = shared_llama()
    reft = on(model, item(layers=[0, 2]))
    batch = inputs(3)
    with reft.groups({"a": [0.0, 1.0, -0.5], "b": 2.0}):
        together = logits(model, batch)
    for row, strength in enumerate((0.0, 1.0, -0.5)):
        with reft.groups({"a": strength, "b": 2.0}):
            alone = logits(model, {"input_ids": batch["input_ids"][row : row + 1]})
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
    with reft.groups({"a": [0.0, 1.0], "b": 1.0}), pytest.raises(ValueError, match=r"2 strengths .* has 3 rows"):
        logits(model, batch)


def test_no_group_is_the_base_and_scaled_is_a_factor(on):
    model = shared_llama()
    base = logits(model, inputs())
    reft = on(model, item())
    with reft.groups([]):
        assert torch.equal(logits(model, inputs()), base)
    with reft.groups({"a": 0.5, "b": 0.25}):
        expected = logits(model, inputs())
    with reft.scaled(0.5), reft.groups({"a": 1.0, "b": 0.5}):
        assert torch.equal(logits(model, inputs()), expected)


def test_only_interventions_with_that_group_change(on):
    """Those without groups act as ever; those with others are off."""
    model = shared_llama()
    reft = on(model, item(groups=("a", "b"), layers=0), item(groups=("c", "d"), layers=1), item(groups=(), layers=2))
    with reft.groups("c"), reft.recording() as edits:
        logits(model, inputs())
    assert [float(edit.norm_BT.sum()) > 0 for edit in edits] == [False, True, True]


def test_generation_in_a_group(on):
    """With and without a cache, and answers too, as the no-cache forwards of that group alone say."""
    model = shared_llama()
    reft = on(model, item(positions="prompt:l2"), item(positions="response", groups=("b", "c")))
    batch, told = inputs(), []
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(batch["input_ids"])}
    for names in ("a", "b", ("a", "c"), ()):
        with reft.groups(names):
            cached = model.generate(**batch, **settings)
            assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
            num_prompt = batch["input_ids"].shape[1]
            prompt_mask = torch.arange(cached.shape[1]).expand_as(cached) < num_prompt
            again = logits(model, {"input_ids": cached, "prompt_mask": prompt_mask}).argmax(-1)
        assert torch.equal(again[:, num_prompt - 1 : -1], cached[:, num_prompt:])
        told.append(tuple(cached.flatten().tolist()))
    assert len(set(told)) > 1


def test_they_come_back_as_they_were_after_an_exception(on):
    model = shared_llama()
    reft = on(model, item())
    before, print_before = logits(model, inputs()), reft.fingerprint()
    with pytest.raises(ValueError, match="2 strengths"), reft.groups("a"), reft.groups({"b": [0.5, 1.0]}):
        model(**inputs(3))
    with reft.groups("a"):
        assert reft.fingerprint() != print_before
    assert torch.equal(logits(model, inputs()), before)
    assert reft.fingerprint() == print_before


# Training ------------------------------------------------------------------------------------------------------------


def train(model, reft, names, *, steps=4, optimizer=None, **settings):
    """Train inside the groups `names` (None: all), the optimiser's steps too."""
    settings = {"lr": 3e-2, "weight_decay": 0.0, **settings}
    optimizer = torch.optim.AdamW(reft.parameters(), **settings) if optimizer is None else optimizer
    batch = text_batch()

    def go():
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    model.train()
    if names is None:
        go()
    else:
        with reft.groups(names):
            go()
    model.eval()
    return optimizer


def rotations(reft):
    return {key: edit.orthonormal_rotation(edit.rotation).detach() for key, edit in reft.edits.items()}


def assert_rows_equal(before, after, rows, *, is_other_changed=True):
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert torch.equal(old[rows], after[name][rows]), name
    if is_other_changed:
        others = [place for place in range(4) if place not in range(4)[rows]]
        assert any(not torch.equal(old[others], after[name][others]) for name, old in before.items())


@pytest.mark.parametrize("method", TRAINED)
def test_the_others_have_zero_gradients(method, on):
    model = llama()
    reft = on(model, item(method))
    with reft.groups("a"):
        model.train()(**text_batch()).loss.backward()
    for name, parameter in reft.edits.named_parameters():
        assert not parameter.grad[2:].any(), name
        assert parameter.grad[:2].any(), name


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3}], ids=["plain", "weight decay"])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("method", TRAINED)
def test_the_others_numbers_stay_bit_for_bit(method, name, settings, on):
    model = llama()
    reft = on(model, item(method))
    for edit in reft.edits.values():  # straight, as after an attach or another group's training
        if "rotation" in dict(edit.named_parameters()):
            edit.straighten()
    before = numbers(reft)
    train(model, reft, name, **settings)
    assert_rows_equal(before, numbers(reft), slice(2, 4) if name == "a" else slice(0, 2))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_momentum_of_earlier_steps_moves_none(optimizer, on):
    """One optimiser over tasks in turn: what it remembers of a group would go on moving it."""
    model = llama()
    reft = on(model, item())
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    ours = optimizer(reft.parameters(), lr=3e-2, weight_decay=0.1, **more)
    for name, held in (("a", slice(2, 4)), ("b", slice(0, 2)), ("a", slice(2, 4))):
        train(model, reft, name, steps=2, optimizer=ours)
        before = numbers(reft)
        train(model, reft, name, steps=2, optimizer=ours)
        assert_rows_equal(before, numbers(reft), held)


def test_later_groups_leave_the_subspaces_of_earlier_ones_bit_for_bit(on):
    model = llama()
    reft = on(model, item())
    train(model, reft, "a", steps=2)
    before = rotations(reft)
    train(model, reft, "b", steps=8, weight_decay=0.1)
    assert_rows_equal(before, rotations(reft), slice(0, 2))


def test_no_group_turns_another_whatever_the_order(on):
    """What a group does alone is the same after the others' training, to float32 rounding; R stays orthonormal."""
    model, h = llama(), torch.randn(50, 16)
    reft = on(model, item(rank=6, groups=GROUPS, layers=1))
    (edit,) = reft.edits.values()
    for name in ("b", "c", "a", "c", "b"):
        train(model, reft, name, steps=8, weight_decay=0.1)
        others = [other for other in GROUPS if other != name]
        before = {other: edit(h, groups={other: 1.0}) for other in others}
        rows_before = rotations(reft)
        train(model, reft, name, steps=8, weight_decay=0.1)
        rows_after = rotations(reft)
        (key,) = rows_before
        for other in others:
            torch.testing.assert_close(edit(h, groups={other: 1.0}), before[other], atol=2e-6, rtol=0)
            torch.testing.assert_close(rows_before[key][ROWS[other]], rows_after[key][ROWS[other]], atol=1e-6, rtol=0)
        assert (rows_before[key][ROWS[name]] - rows_after[key][ROWS[name]]).abs().max() > 1e-3
        r_RD = rows_after[key]
        torch.testing.assert_close(r_RD @ r_RD.T, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(edit.rotation.detach(), r_RD, atol=1e-5, rtol=0)


def test_an_untrained_group_stays_the_identity(on):
    model, h = llama(), torch.randn(50, 16)
    reft = on(model, item(groups=("a", "b"), layers=1), is_shaken=False)
    (edit,) = reft.edits.values()
    train(model, reft, "a", steps=20)
    with torch.no_grad():
        assert (edit(h, groups={"a": 1.0}) - h).norm() > 0.05 * h.norm()
        assert (edit(h, groups={"b": 1.0}) - h).norm() < 1e-6 * h.norm()


def test_a_group_after_training_all_together(on):
    """Joint training leaves `rotation` with other numbers than R; then too, the other group stays what it was."""
    model, h = llama(), torch.randn(50, 16)
    reft = on(model, item(layers=1))
    (edit,) = reft.edits.values()
    train(model, reft, None, steps=8)
    gram_RR = (edit.rotation @ edit.rotation.T).detach()
    assert (gram_RR - torch.eye(4)).abs().max() > 0.1
    before = edit(h, groups={"b": 1.0}).detach()
    train(model, reft, "a", steps=8)
    torch.testing.assert_close(edit(h, groups={"b": 1.0}).detach(), before, atol=5e-6, rtol=0)


def test_acting_apart_changes_no_number(on):
    model = llama()
    reft = on(model, item())
    before = numbers(reft)
    with reft.groups("b"):
        logits(model, inputs())
        other = torch.nn.Parameter(torch.zeros(1))  # an optimiser of somebody else's
        other.grad = torch.ones(1)
        torch.optim.SGD([other], lr=1.0).step()
    assert float(other.detach()) == -1.0
    assert_rows_equal(before, numbers(reft), slice(0, 4), is_other_changed=False)


def test_the_innermost_groups_are_trained(on):
    """An evaluation, or another task's step, inside a training of one group."""
    model = llama()
    reft = on(model, item())
    train(model, reft, "a", steps=1)
    with reft.groups("a"):
        before = numbers(reft)
        train(model, reft, "b")
        assert_rows_equal(before, numbers(reft), slice(0, 2))
        before = numbers(reft)
        train(model, reft, "a")
        assert_rows_equal(before, numbers(reft), slice(2, 4))
    before = numbers(reft)
    train(model, reft, None)
    after = numbers(reft)
    assert all(not torch.equal(old[:2], after[name][:2]) for name, old in before.items())
    assert all(not torch.equal(old[2:], after[name][2:]) for name, old in before.items())


def test_strengths_of_zero_are_off_in_training_too(on):
    model = llama()
    reft = on(model, item())
    for edit in reft.edits.values():
        edit.straighten()
    before = numbers(reft)
    train(model, reft, {"a": [0.0, 1.0], "b": [0.0, 0.0]}, weight_decay=0.1)
    assert_rows_equal(before, numbers(reft), slice(2, 4))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_a_groups_gradients(use_reentrant, on):
    found = []
    for is_on in (False, True):
        model = llama()
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        reft = on(model, item())
        with reft.groups({"a": 1.0, "b": 0.0}):
            model.train()(**text_batch()).loss.backward()
        found.append([parameter.grad for parameter in reft.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        assert not theirs[2:].any()
        assert theirs.any()


@pytest.mark.parametrize("name", ["a", "b"])
def test_prefix_reuse_gives_a_groups_gradients(name, on):
    model = llava().train()
    reft = on(model, item(positions="question:l2"))
    batch = image_batch()
    batch["labels"] = batch["input_ids"].where(torch.arange(7) >= 6, -100)
    batch["prompt_mask"] = batch["labels"] == -100
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = []
    for reuses in (False, True):
        reft.edits.zero_grad()
        with reft.groups(name):
            if reuses:
                with PrefixReuse(reft, required=True).cut(dict(batch)) as rest:
                    assert rest["input_ids"].shape[1] < 7
                    model(**rest).loss.backward()
            else:
                model(**batch).loss.backward()
        found.append([parameter.grad.clone() for parameter in reft.parameters()])
    off = slice(2, 4) if name == "a" else slice(0, 2)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        assert not ours[off].any()
        assert not theirs[off].any()
        assert theirs.any()


def rows_of_data(num_rows=8):
    batch = text_batch(num_rows)
    return [{name: tensor[row] for name, tensor in batch.items()} for row in range(num_rows)]


def trainer_of(model, folder, **settings):
    fields = {
        **{"max_steps": 4, "learning_rate": 3e-2, "per_device_train_batch_size": 4, "report_to": "none"},
        **{"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 0},
        **settings,
    }
    args = TrainingArguments(str(folder), **fields)
    return vlreft.ReftTrainer(model=model, args=args, train_dataset=rows_of_data(), reuse_prefix="auto")


def test_the_trainer_trains_one_group_with_weight_decay(on, tmp_path):
    model = llama()
    reft = on(model, item(), is_shaken=False)
    before = numbers(reft)
    with reft.groups("a"):
        trainer_of(model, tmp_path, weight_decay=0.5).train()
    assert_rows_equal(before, numbers(reft), slice(2, 4))
    middle = rotations(reft), numbers(reft)
    with reft.groups("b"):
        trainer_of(model, tmp_path, weight_decay=0.5, optim="sgd").train()
    assert_rows_equal(middle[1], numbers(reft), slice(0, 2))
    assert_rows_equal(middle[0], rotations(reft), slice(0, 2))


def test_a_checkpoint_from_within_says_what_the_end_says(on, tmp_path):
    """It reads the same outside of the training, and a training resumed from it ends at the same numbers."""
    model = llama()
    reft = on(model, item(), is_shaken=False)
    with reft.groups("a"):
        trainer_of(model, tmp_path, save_strategy="steps", save_steps=2).train()
    ended = numbers(reft)
    reft.load_weights(tmp_path / "checkpoint-2")
    assert not torch.equal(numbers(reft)["0:text:0:l1.weight"], ended["0:text:0:l1.weight"])
    r_RD, rotation_RD = rotations(reft)["0:text:0:l1"], reft.edits["0:text:0:l1"].rotation.detach()
    torch.testing.assert_close(rotation_RD, r_RD, atol=1e-6, rtol=0)
    with reft.groups("a"):
        trainer_of(model, tmp_path, save_strategy="steps", save_steps=2).train(tmp_path / "checkpoint-2")
    for name, number in numbers(reft).items():
        assert torch.equal(number, ended[name]), name


def test_the_trainer_refuses_what_holds_nothing(on, tmp_path, monkeypatch):
    model = llama()
    reft = on(model, item())
    trainer = trainer_of(model, tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with reft.groups("a"), pytest.raises(ValueError, match=r"inside `reft.groups\(...\)` .* FSDP and DeepSpeed"):
        trainer.create_optimizer()
    trainer.create_optimizer()


# Files and configs ---------------------------------------------------------------------------------------------------


def test_save_and_load(on, tmp_path):
    model = shared_llava()
    reft = on(
        model, item(positions="image:f1+l1"), item("noreft", groups=("x", "b"), site="vision", positions="patches")
    )
    batch = image_batch()
    expected = {}
    for names in ("a", "b", ("x", "a")):
        with reft.groups(names):
            expected[names] = logits(model, batch)
    reft.save_pretrained(tmp_path)
    fresh = llava()
    loaded = vlreft.load(fresh, tmp_path)
    assert loaded.config == reft.config
    assert loaded.config.interventions[0].groups == ("a", "b")
    for names, theirs in expected.items():
        with loaded.groups(names):
            assert torch.equal(logits(fresh, batch), theirs)


@pytest.mark.parametrize("version", [1, 2])
def test_files_from_before_groups_are_read(version, on, tmp_path):
    model = shared_llama()
    reft = on(model, item(groups=()))
    expected = logits(model, inputs())
    reft.save_pretrained(tmp_path)
    path = tmp_path / "reft_config.json"
    data = json.loads(path.read_text())
    gone = ["groups"] + ["component", "heads"] * (version == 1)
    data["format_version"] = version
    for entry in data["interventions"]:
        assert [entry.pop(name) for name in gone] == [[], "output", None][: len(gone)]
    if version == 1:
        del data["modules_to_save"]
    path.write_text(json.dumps(data))
    fresh = llama()
    loaded = vlreft.load(fresh, tmp_path)
    assert loaded.config.interventions[0].groups == ()
    assert torch.equal(logits(fresh, inputs()), expected)
    data["interventions"][0]["groups"] = ["a", "b"]  # which no file of that version can have
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="must have the keys"):
        vlreft.load(llama(), tmp_path)


def test_a_config_with_groups_goes_through_json():
    config = vlreft.ReftConfig([item(groups=["a", "b"]), item(groups="c")])
    again = vlreft.ReftConfig.from_dict(json.loads(config.to_json()))
    assert again == config
    assert [one.groups for one in again.interventions] == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"rank": 5}, ValueError, r"`groups` \(=\['a', 'b'\]\) share `rank` \(=5\) equally: .* multiple of 2"),
        ({"groups": ("a", "a")}, ValueError, r"`groups` \(=\['a', 'a'\]\) names one twice"),
        ({"groups": ("a", "")}, TypeError, r"`groups` must be names, got \('a', ''\)"),
        ({"groups": ("a", 3)}, TypeError, r"`groups` must be names, got \('a', 3\)"),
        ({"groups": 2}, TypeError, "`groups` must be names, got 2"),
        ({"method": "red", "rank": None}, ValueError, r"share `rank` \(=None\) equally: give a low-rank method"),
        ({"method": "vector", "rank": None}, ValueError, r"share `rank` \(=None\) equally"),
    ],
)
def test_configs_that_are_refused(fields, error, says):
    with pytest.raises(error, match=says):
        item(**fields)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("c", ValueError, r"`groups` names \['c'\], which the adapter does not have; its groups are \['a', 'b'\]"),
        (["a", "c", "d"], ValueError, r"names \['c', 'd'\]"),
        ({"a": "much"}, TypeError, "the strength must be a number, or one for each row of the batch, got 'much'"),
        ({"a": float("nan")}, ValueError, "the strength must be finite"),
        ({"a": [1.0, float("inf")]}, ValueError, "the strength must be finite"),
        ({"a": [[1.0]]}, ValueError, r"must be one for each row of the batch, got shape \(1, 1\)"),
    ],
)
def test_groups_that_are_refused(given, error, says, on):
    model = shared_llama()
    reft = on(model, item())
    before = logits(model, inputs())
    with pytest.raises(error, match=says), reft.groups(given):
        pass
    assert torch.equal(logits(model, inputs()), before)


def test_an_adapter_without_groups_says_so(on):
    reft = on(shared_llama(), item(groups=()))
    with (
        pytest.raises(ValueError, match=r"it has no groups; set `Intervention\(..., groups=\(...\)\)`"),
        reft.groups("a"),
    ):
        pass


def test_two_adapters_have_groups_of_their_own(on):
    """Names are an adapter's own: what acts in one says nothing of another's."""
    model = qwen2()
    first, second = on(model, item(layers=0), name="first"), on(model, item(layers=2), name="second")
    with first.groups("a"), second.disabled():
        first_alone = logits(model, inputs())
    with second.disabled():
        both_of_first = logits(model, inputs())
    with first.groups("a"):
        with_second = logits(model, inputs())
        with second.groups([]):
            assert torch.equal(logits(model, inputs()), first_alone)
    assert not torch.equal(first_alone, both_of_first)
    assert not torch.equal(first_alone, with_second)


def test_a_copied_model_keeps_its_groups(on):
    reft = on(llama(), item())
    (config,) = copy.deepcopy(reft.config).interventions
    assert config.build(16).groups == ("a", "b")
