"""Keeping the features of pictures changes what a step costs and nothing else."""

import copy
import functools
import gc
import logging
import subprocess
import sys
from contextlib import contextmanager

import families_dual
import families_packed
import families_rows
import families_special
import pytest
import torch
from family import SAMPLES, WITH_IMAGES, noise
from PIL import Image
from processors import tiny_llava_model, tiny_llava_processor
from test_families import heard
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
from transformers import TrainingArguments
from zoo import FAMILIES, intervention, shake

import vlreft
from vlreft.reuse.features import FeatureCache
from vlreft.reuse.pieces import content_key, pack, unpack
from vlreft.reuse.stores import FolderStore, MemoryStore, bytes_of

TEXT = {"positions": "prompt:l2", "layers": "all"}
LONG_TAIL = {
    family.name: family for rows in (families_rows.ROWS, families_packed.ROWS, families_special.ROWS) for family in rows
}
# Of each kind: a row a picture, tiles, several pictures a row, packed, deepstack, a Q-Former that reads the question,
# whole calls, no `get_image_features`, no tower that was found.
NAMES = (
    *("llava_next", "llava_onevision", "gemma3", "paligemma", "idefics3", "internvl", "llama4", "ovis2", "blip2"),
    *("instructblip", "molmo2", "qwen3_vl", "glm4v", "granite_docling", "mllama", "blip", "chameleon", "gemma3n"),
)


@contextmanager
def tower_runs(model, family):
    """Yield a list that grows by the shape of what the first tower block is given, each time that it runs."""
    block, shapes = family.blocks(model, "vision")[0], []
    own = block.forward

    @functools.wraps(own)
    def counted(*args, **kwargs):
        shapes.append((args[0] if args else kwargs["hidden_states"]).shape)
        return own(*args, **kwargs)

    block.forward = counted
    try:
        yield shapes
    finally:
        del block.forward


def step(model, reft, batch):
    """Return logits, loss and gradients of a training step."""
    model.train()
    output = model(**batch)
    model.zero_grad()
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in reft.parameters()]
    model.zero_grad(set_to_none=True)
    model.eval()
    return [output.logits.detach(), output.loss.detach(), *gradients]


def same(ours, theirs):
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def left_on(model):
    """Return the functions that stand on a model's modules and not in their classes."""
    names = ("forward", "get_image_features")
    return [f"{path}.{name}" for path, module in model.named_modules() for name in names if name in module.__dict__]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_step_is_the_same_bit_for_bit(attached, name):
    family = FAMILIES[name]
    model, reft = attached(
        family, intervention("loreft", **TEXT), intervention("red", site="connector", positions="image")
    )
    batch, part, cache = family.batch(SAMPLES), family.batch([SAMPLES[2]]), FeatureCache()
    plain, plain_part = step(model, reft, batch), step(model, reft, part)
    with cache.on(model), tower_runs(model, family) as runs:
        assert same(step(model, reft, batch), plain)
        num_first = len(runs)
        assert same(step(model, reft, batch), plain)
        assert cache.num_hits == 3
        assert len(runs) == num_first
        assert same(step(model, reft, part), plain_part)  # known pictures in another batch
        assert (cache.num_hits, cache.num_misses) == (5, 3)
        assert len(runs) == num_first
    assert left_on(model) == []


@pytest.mark.parametrize("name", NAMES)
def test_families_hear_the_same(name):
    family = LONG_TAIL[name]
    model = family.build().requires_grad_(False)
    samples = family.samples
    mixed = [samples[-1], samples[0]]
    with torch.no_grad():
        batches = [family.batch(samples), family.batch(samples), family.batch(mixed)]
        plain = [heard(model(**batch)) for batch in batches]
        cache = FeatureCache()
        with cache.on(model):
            first, second, third = (heard(model(**batch)) for batch in batches)
    assert first.equal(plain[0])
    assert second.equal(plain[0])
    assert cache.num_hits > 0
    torch.testing.assert_close(third, plain[2], rtol=1e-5, atol=1e-5)  # pictures came in a batch of another size
    assert left_on(model) == []


def test_only_unknown_pictures_run(lend):
    family = FAMILIES["llava"]
    model, cache = lend(family), FeatureCache()
    with torch.no_grad():
        both = heard(model(**family.batch(WITH_IMAGES)))
        with cache.on(model), tower_runs(model, family) as runs:
            model(**family.batch([SAMPLES[2]]))
            runs.clear()
            model(**family.batch([SAMPLES[0]]))  # another kind of call, one picture: run twice, and compared
            assert [shape[0] for shape in runs] == [1, 1]
            fresh = FeatureCache()
        with fresh.on(model), tower_runs(model, family) as runs:
            pictures = {"pixel_values": torch.stack([noise(picture, 3, 28, 28) for picture in (1, 2, 3, 4)])}
            two, four = {"pixel_values": pictures["pixel_values"][:2]}, pictures
            model.get_image_features(**two)
            runs.clear()
            features = model.get_image_features(**four).pooler_output
            assert [shape[0] for shape in runs] == [2]
            assert fresh.num_hits == 2
            twice = {"pixel_values": four["pixel_values"][[0, 0, 3, 0]]}
            runs.clear()
            again = model.get_image_features(**twice).pooler_output
            assert runs == []
        for got, place in zip(again, (0, 0, 3, 0), strict=True):
            assert got.equal(features[place])
        with cache.on(model):
            assert heard(model(**family.batch(WITH_IMAGES))).allclose(both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generates_the_same(attached, name, more):
    family = FAMILIES[name]
    model, reft = attached(family, intervention("loreft", **TEXT))
    samples = WITH_IMAGES if more == {} or name == "llava" else [SAMPLES[0]]
    batch = family.batch(samples, side="left", answer=False)
    arguments, cache = family.generation(**more), FeatureCache()
    plain = model.generate(**batch, **arguments)
    with reft.disabled():
        base = model.generate(**batch, **arguments)
    with cache.on(model), tower_runs(model, family) as runs:
        assert model.generate(**batch, **arguments).equal(plain)
        num_first = len(runs)
        assert model.generate(**batch, **arguments).equal(plain)
        with reft.disabled():
            assert model.generate(**batch, **arguments).equal(base)
        assert len(runs) == num_first
    assert left_on(model) == []


def test_training_finds_what_generation_kept(attached):
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", **TEXT))
    plain, cache = step(model, reft, family.batch(WITH_IMAGES)), FeatureCache()
    with cache.on(model), torch.inference_mode():
        model.generate(**family.batch(WITH_IMAGES, side="left", answer=False), **family.generation())
    with cache.on(model):
        step(model, reft, family.batch(WITH_IMAGES))  # of another kind, as it is in training mode
        cache.num_hits = cache.num_misses = 0
        assert same(step(model, reft, family.batch(WITH_IMAGES)), plain)
    assert (cache.num_hits, cache.num_misses) == (3, 0)


# What is refused -----------------------------------------------------------------------------------------------------

TOWER = "model.vision_tower.encoder.layers"


@pytest.mark.parametrize(
    "fields",
    [{"site": "vision", "positions": "patches"}, {"site": TOWER, "layers": [1]}, {"site": f"{TOWER}.0.mlp"}],
    ids=str,
)
def test_an_edit_in_the_tower_is_refused_with_the_reason(attached, fields, caplog):
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", **fields))
    batch, cache = family.batch(WITH_IMAGES), FeatureCache()
    with pytest.raises(ValueError, match=f"an intervention at site '{fields['site']}' layer"), cache.on(model):
        pass
    plain = heard(model(**batch))
    with caplog.at_level(logging.INFO, "vlreft"), cache.on(model, required=False):
        assert heard(model(**batch)).equal(plain)
        assert heard(model(**batch)).equal(plain)
        assert cache.num_bytes == 0
        with reft.disabled():
            base = heard(model(**batch))
            assert cache.num_misses == 3
            assert cache.num_bytes > 0
        assert heard(model(**batch)).equal(plain)  # what the base gives is not what it gives with the edit on
    assert caplog.text.count("are not kept: an intervention") == 1
    with reft.disabled(), torch.no_grad(), cache.on(model):
        assert heard(model(**batch)).equal(base)
        assert cache.num_hits == 3


@pytest.mark.parametrize("kind", ["module", "path"])
def test_behind_a_connector_that_learns_the_tower_is_kept(attached, kind):
    family = FAMILIES["llava"]
    if kind == "module":
        config = vlreft.ReftConfig(intervention("loreft", **TEXT), modules_to_save=["multi_modal_projector"])
        model = family.build()
        reft = shake(vlreft.attach(model, config))
    else:
        model, reft = attached(family, intervention("loreft", site="model.multi_modal_projector"))
    batch, cache = family.batch(SAMPLES), FeatureCache()
    plain = step(model, reft, batch)
    with cache.on(model), tower_runs(model, family) as runs:
        assert same(step(model, reft, batch), plain)
        num_first = len(runs)
        with torch.no_grad():
            for parameter in reft.parameters():
                parameter.mul_(1.5)
        moved = step(model, reft, batch)
        assert not same(moved, plain)
        assert len(runs) == num_first
        assert cache.num_hits == 3
    assert same(step(model, reft, batch), moved)


def test_what_may_change_is_refused_with_the_reason(lend):
    family = FAMILIES["llava"]
    model, batch = family.build().requires_grad_(False), family.batch(WITH_IMAGES)

    def refusal():
        cache = FeatureCache()
        message = "features of LlavaForConditionalGeneration cannot be kept"
        with pytest.raises(ValueError, match=message) as info, cache.on(model):
            model(**batch)
        assert cache.num_bytes == 0
        return str(info.value)

    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    assert "is trainable" in refusal()
    weight.requires_grad_(False)
    handle = model.model.vision_tower.encoder.layers[1].register_forward_hook(lambda *call: 2 * call[-1])
    assert "a forward hook of 'test_features'" in refusal()
    handle.remove()
    for layer in model.train().model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    assert "other features when they are run again" in refusal()
    model.eval()
    model.model.vision_tower.pre_layrnorm = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.LayerNorm(24))
    model.train().requires_grad_(False)
    assert "dropout" in refusal()
    model.eval()
    batch["pixel_values"].requires_grad_(True)
    assert "a gradient of the pixels" in refusal()
    batch["pixel_values"].requires_grad_(False)
    with pytest.raises(ValueError, match="no vision tower"), FeatureCache().on(lend("llama")):
        pass
    with pytest.raises(ValueError, match=r"more than the whole `budget`"), FeatureCache("0.5 KB").on(model):
        model(**batch)


def test_what_does_not_fit_is_said_once_and_costs_no_second_run(lend, caplog):
    family = FAMILIES["llava"]
    model, batch = lend(family), family.batch(WITH_IMAGES)
    with torch.no_grad(), caplog.at_level(logging.INFO, "vlreft"), tower_runs(model, family) as runs:
        plain = heard(model(**batch))
        with FeatureCache(500).on(model, required=False):
            heard(model(**batch))
            runs.clear()
            assert heard(model(**batch)).equal(plain)
    assert len(runs) == 1
    assert caplog.text.count("more than the whole `budget`") == 1


def test_a_family_that_never_asks_is_told_of(caplog):
    family = next(row for row in families_dual.ROWS if row.name == "groupvit")
    model = family.build().requires_grad_(False)
    with caplog.at_level(logging.INFO, "vlreft"), FeatureCache().on(model):
        model(**family.batch(family.samples))
    assert "`get_image_features` was never called in it" in caplog.text


# Nothing stale, nothing of others ------------------------------------------------------------------------------------


def test_other_numbers_of_the_tower_are_another_tower():
    family = FAMILIES["llava"]
    model, batch, cache = family.build().requires_grad_(False), family.batch(WITH_IMAGES), FeatureCache()
    with cache.on(model):
        model(**batch)
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(1.1)
        inside = heard(model(**batch))
    assert inside.equal(heard(model(**batch)))
    model.config.vision_feature_layer = -3
    with cache.on(model):
        changed = heard(model(**batch))
        assert changed.equal(heard(model(**batch)))
    assert changed.equal(heard(model(**batch)))
    assert not changed.equal(inside)
    assert cache.num_hits == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_trained_tower_is_another_tower_after_each_step(fused):
    """Fused optimizers write without torch's count of writes, and evaluation between steps has no gradient."""
    family = FAMILIES["llava"]
    model, batch, cache = family.build().eval(), family.batch(WITH_IMAGES), FeatureCache()
    tower = model.model.vision_tower
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1, fused=fused)

    def take_step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def look():
        with torch.no_grad():
            seen.append((copy.deepcopy(tower.state_dict()), heard(model(**batch)), heard(model(**batch))))

    seen = []
    for _ in range(2):  # steps inside of a scope, and between two
        with cache.on(model, required=False):
            for _ in range(2):
                look()
                take_step()
            look()
        take_step()
    assert cache.num_hits >= 6
    for numbers, found, again in seen:
        tower.load_state_dict(numbers)
        with torch.no_grad():
            assert found.equal(again)
            assert found.equal(heard(model(**batch)))


def test_what_counts_steps_goes_with_its_cache():
    gc.collect()  # what earlier tests have left
    before = len(hooks)
    caches = [FeatureCache(), vlreft.KeptPrefixes("1GB")]
    assert len(hooks) == before + 2
    del caches
    gc.collect()
    assert len(hooks) == before


def test_each_precision_has_its_own():
    family = FAMILIES["llava"]
    model, batch, cache = family.build().requires_grad_(False), family.batch(WITH_IMAGES), FeatureCache()

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    plain, plain_autocast = heard(model(**batch)), autocast()
    with cache.on(model):
        assert heard(model(**batch)).equal(plain)
        for output in (autocast(), autocast()):
            assert output.logits.equal(plain_autocast.logits)
            assert output.image_hidden_states[0].dtype == plain_autocast.image_hidden_states[0].dtype
        assert heard(model(**batch)).equal(plain)
        assert (cache.num_hits, cache.num_misses) == (6, 6)
        model.to(torch.bfloat16)
        half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
        kept = [model(**half) for _ in range(2)]
    assert cache.num_misses == 9
    for output in kept:
        assert output.logits.equal(model(**half).logits)
        assert output.image_hidden_states[0].dtype == torch.bfloat16


def test_the_model_is_left_as_it_was_also_after_an_exception(lend):
    family = FAMILIES["llava"]
    model = lend(family)
    inner = model.model
    with pytest.raises(RuntimeError, match="stop"), FeatureCache().on(model):  # noqa: PT012
        assert left_on(model) != []
        raise RuntimeError("stop")
    assert left_on(model) == []
    own, called = inner.get_image_features, []

    def theirs(*args, **kwargs):
        called.append(1)
        return own(*args, **kwargs)

    inner.get_image_features = theirs
    try:
        with torch.no_grad(), FeatureCache().on(model):
            model(**family.batch(WITH_IMAGES))
            assert called
        assert inner.__dict__["get_image_features"] is theirs
        with torch.no_grad(), FeatureCache().on(model) as _, tower_runs(model, family) as runs:
            answer = inner.get_image_features

            def later(*args, **kwargs):
                return answer(*args, **kwargs)

            inner.get_image_features = later
            model(**family.batch(WITH_IMAGES))
        assert inner.__dict__["get_image_features"] is later
        runs.clear()
        with torch.no_grad(), tower_runs(model, family) as runs:
            for _ in range(2):
                model(**family.batch(WITH_IMAGES))  # the answer that they kept is the model's own again
        assert len(runs) == 2
    finally:
        del inner.get_image_features


def test_features_cannot_be_written_into(lend):
    model, cache = lend("llava"), FeatureCache()
    pictures = {"pixel_values": noise(1, 1, 3, 28, 28)}
    with torch.no_grad(), cache.on(model):
        first = model.get_image_features(**pictures).pooler_output[0].clone()
        for _ in range(3):
            features = model.get_image_features(**pictures).pooler_output[0]
            assert features.equal(first)
            features.zero_()


def test_pictures_are_told_apart_by_every_bit():
    picture = noise(1, 3, 28, 28)
    other = picture.clone()
    other[-1, -1, -1] = torch.nextafter(other[-1, -1, -1], torch.tensor(torch.inf))
    keys = {
        content_key(picture),
        content_key(other),
        content_key(picture.reshape(3, 784)),
        content_key(picture.view(torch.int32)),
        content_key({"a": picture}),
        content_key({"b": picture}),
        content_key([picture], []),
        content_key([picture, []]),
        *(content_key(value) for value in (1, True, "1", None, 1.0, [1], (1,), [1, 1], [[1], 1], "", "1;")),
    }
    assert len(keys) == 19
    assert content_key(picture) == content_key(picture.transpose(0, 2).contiguous().transpose(0, 2))  # strides are none


# Under other machinery -----------------------------------------------------------------------------------------------


def test_a_checkpointed_model_does_the_same(attached):
    family = FAMILIES["llava"]
    # Of its own: transformers leaves hooks behind that make inputs require gradients.
    model, reft = attached(family, intervention("loreft", **TEXT), model=family.build())
    batch, cache = family.batch(WITH_IMAGES), FeatureCache()
    for use_reentrant in (False, True):
        model.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        checkpointed = step(model, reft, batch)
        with cache.on(model):
            for _ in range(2):
                assert same(step(model, reft, batch), checkpointed)
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
    assert cache.num_hits == 9


@pytest.mark.slow
def test_a_compiled_model_does_the_same(lend):
    family = FAMILIES["llava"]
    model, batch, cache = lend(family), family.batch(WITH_IMAGES), FeatureCache()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = model(**batch).logits
        with cache.on(model), tower_runs(model, family) as runs:
            model(**batch)
            runs.clear()
            assert compiled(**batch).logits.equal(logits)
            assert compiled(**batch).logits.equal(logits)
            assert runs == []
        assert cache.num_hits == 6
        assert compiled(**batch).logits.equal(logits)
    torch._dynamo.reset()


def train(tmp_path, cache, **more):
    processor = tiny_llava_processor(image_size=28)
    model = tiny_llava_model(processor)
    torch.manual_seed(0)
    reft = vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="question:l3", init="reference")))
    rows = [
        {"image": Image.new("RGB", (28, 28), (20 * i, 0, 9)), "question": "what is it", "answer": "ab" * (i % 3 + 1)}
        for i in range(6)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", eval_strategy="steps", eval_steps=2, disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = vlreft.ReftTrainer(
        model, arguments, vlreft.Collator(processor), rows, rows, answer_metrics=lambda answers, _: {"n": len(answers)}
    )
    if cache is None:
        loss = trainer.train().training_loss
    else:
        with cache.on(model):
            loss = trainer.train().training_loss
    return loss, [parameter.detach().clone() for parameter in reft.parameters()]


def test_a_training_run_with_evaluation_learns_the_same(tmp_path):
    cache = FeatureCache()
    loss, plain = train(tmp_path / "plain", None)
    kept_loss, kept = train(tmp_path / "kept", cache)
    assert kept_loss == pytest.approx(loss, rel=1e-5)
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert cache.num_hits + cache.num_misses == 6 * 3 + 3 * (6 + 6)
    assert cache.num_misses == 3 + 3 + 6  # the first batch of each kind runs, known or not


# Where they are kept -------------------------------------------------------------------------------------------------


def packed(number, num_floats=100):
    return pack({"a": [torch.full((num_floats,), float(number))], "b": (None, 3, "x"), "c": torch.tensor(number)})


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_the_least_recently_used_goes_first_and_the_budget_holds(tmp_path, kind):
    size = packed(0).num_bytes
    budget = 4 * size + size // 2 if kind == "memory" else 6 * size
    store = MemoryStore(budget) if kind == "memory" else FolderStore(tmp_path, budget)
    assert not store.put("large", packed(0, 10_000))
    for number in range(12):
        assert store.put(f"k{number}", packed(number))
        assert store.get("k0") is not None  # asked for all the time
        assert store.num_bytes() <= budget
    kept = [number for number in range(12) if store.get(f"k{number}") is not None]
    assert kept[0] == 0
    assert kept[1:] == list(range(12 - len(kept[1:]), 12))
    assert len(kept) >= 3
    tree = unpack(store.get("k11"), torch.device("cpu"))
    assert tree["a"][0].equal(torch.full((100,), 11.0))
    assert tree["b"] == (None, 3, "x")
    assert tree["c"].shape == ()


def test_budgets_are_numbers_of_bytes():
    assert [bytes_of(b) for b in (7, "2GB", "500 MiB", "1.5 kB", "10")] == [7, 2 * 10**9, 500 * 2**20, 1500, 10]
    for wrong in (0, -1, "", "GB", "2 XB", "1 I", True):
        with pytest.raises(ValueError, match="`budget`"):
            FeatureCache(wrong)


def test_a_folder_serves_later_runs(tmp_path):
    family = FAMILIES["llava"]
    batch = family.batch(WITH_IMAGES)
    with torch.no_grad():
        first = family.build()
        plain = heard(first(**batch))
        with FeatureCache(folder=tmp_path).on(first):
            first(**batch)
        later, cache = family.build(), FeatureCache(folder=tmp_path)
        later.load_state_dict(first.state_dict())
        with cache.on(later), tower_runs(later, family) as runs:
            assert heard(later(**batch)).equal(plain)
            runs.clear()
            assert heard(later(**batch)).equal(plain)
            assert (runs, cache.num_hits) == ([], 3)
    files = sorted(tmp_path.iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 3
    files[0].write_bytes(files[0].read_bytes()[:-10])
    with pytest.raises(ValueError, match="is no whole file of features"), torch.no_grad(), cache.on(later):
        later(**batch)


PROCESS = """
import sys, torch
from vlreft.reuse.pieces import pack, unpack
from vlreft.reuse.stores import FolderStore
from pathlib import Path
who, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
store = FolderStore(folder, 60 * 40_000)
print("ready", flush=True)
sys.stdin.readline()
found = 0
for turn in range(150):
    number = (turn * (7 if who else 11)) % 100
    store.put(f"k{number}", pack([torch.full((10_000,), float(number))]))
    packed = store.get(f"k{(number + 1 + who) % 100}")
    if packed is not None:
        found += 1
        tensor = unpack(packed, torch.device("cpu"))[0]
        assert tensor.shape == (10_000,) and bool((tensor == (number + 1 + who) % 100).all())
print(found)
"""


def test_a_file_that_goes_while_it_is_opened_is_not_there(tmp_path, monkeypatch):
    """safetensors looks at it, and torch opens it again by its name."""
    store = FolderStore(tmp_path, 10_000)
    store.put("a", packed(1))
    opened = torch.UntypedStorage.from_file

    def dropped_before(*args, **kwargs):
        (tmp_path / "a.safetensors").unlink()
        return opened(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", dropped_before)
    assert store.get("a") is None


def test_two_processes_share_a_folder(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(who), str(tmp_path)], **pipes) for who in (0, 1)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # off at once
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out) > 0
    assert not list(tmp_path.glob("*.tmp"))
    assert 0 < FolderStore(tmp_path, 1).num_bytes() <= 60 * 40_000 * (1 + 2 / 32) + 2 * 41_000
