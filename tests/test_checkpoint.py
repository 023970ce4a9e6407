"""The checkpoint: bit for bit there and back, one clear error for whatever is wrong, atomic writing."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    half_frozen,
    image_batch,
    llama,
    llava,
    numbers,
    qwen2,
    shake,
    shared_llama,
    shared_llava,
    text_batch,
    untouched,
)

import vlreft
from vlreft.interventions import INTERVENTIONS
from vlreft.saving.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME

CONFIG = vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l2", rank=2))


def one_of_each(**settings):
    rank = {method: {"rank": 2} if cls.uses_rank else {} for method, cls in INTERVENTIONS.items()}
    methods = [method for method, cls in INTERVENTIONS.items() if not cls.uses_source]
    return [vlreft.Intervention(method, init="reference", **rank[method], **settings) for method in methods]


def save(folder, model=None, config=CONFIG, seed=1):
    """Save an adapter with random numbers, leave the model without it, return the numbers."""
    reft = shake(vlreft.attach(model or shared_llama(), config), seed)
    reft.save_pretrained(folder)
    reft.detach()
    return numbers(reft)


def assert_same_numbers(reft, saved):
    loaded = numbers(reft)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("make", "batch", "items"),
    [
        (llama, text_batch, one_of_each(positions="f2+l2")),
        (llama, text_batch, [vlreft.Intervention("loreft", positions="[1:-1]", rank=3, tied=True, layers=-1, scale=2)]),
        (llava, image_batch, one_of_each(site="vision", positions="patches", layers=[0, 2])),
        (
            llava,
            image_batch,
            [*one_of_each(site="connector", positions="image:f1+l2"), *one_of_each(positions="question")],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_bit_for_bit(make, batch, items, dtype, tmp_path):
    model, batch = make().to(dtype), batch()
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    base = model(**batch).logits
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(items)))
    logits, saved = model(**batch).logits, numbers(reft)
    reft.save_pretrained(tmp_path)
    reft.detach()
    assert torch.equal(model(**batch).logits, base)
    again = vlreft.load(model, str(tmp_path))
    assert again.config == vlreft.ReftConfig(items)
    assert_same_numbers(again, saved)
    assert torch.equal(model(**batch).logits, logits)
    assert not torch.equal(logits, base)


def test_what_a_checkpoint_holds(tmp_path):
    saved = save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    assert {CONFIG_NAME, WEIGHTS_NAME} == {"reft_config.json", "reft_model.safetensors"}
    data = json.loads((folder / CONFIG_NAME).read_text())
    assert data.pop("base") == {
        "model_type": "llama", "class_name": "LlamaForCausalLM", "name_or_path": "", "sites": {"text": [3, 16]},
    }  # fmt: skip
    content = (folder / WEIGHTS_NAME).read_bytes()
    assert data.pop("weights") == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert vlreft.ReftConfig.from_dict(data) == CONFIG
    tensors = load_file(folder / WEIGHTS_NAME)
    assert tensors.keys() == saved.keys()
    assert sum(tensor.numel() for tensor in tensors.values()) == 3 * 2 * (2 * 2 * 16 + 2)
    assert all("model." not in name for name in tensors)  # no module paths: those change with transformers' versions
    assert (folder / WEIGHTS_NAME).stat().st_size < 20_000
    card = (folder / CARD_NAME).read_text()
    assert "library_name: vlreft" in card
    assert "| loreft | text | all | `f2+l2` | 2 | False |" in card


def test_load_leaves_the_users_random_numbers_alone(tmp_path):
    save(tmp_path)
    model = shared_llama()
    with untouched(model):
        vlreft.load(model, tmp_path).detach()


def test_load_weights_keeps_the_parameters(tmp_path):
    """An optimiser holds the parameters: they must stay the same objects."""
    saved = save(tmp_path)
    reft = vlreft.attach(llama(), CONFIG)
    before = list(reft.parameters())
    reft.load_weights(tmp_path)
    assert all(old is new for old, new in zip(before, reft.parameters(), strict=True))
    assert_same_numbers(reft, saved)


def test_load_weights_refuses_another_config(tmp_path):
    save(tmp_path)
    reft = shake(vlreft.attach(llama(), vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l3", rank=2))))
    before = numbers(reft)
    with pytest.raises(ValueError, match=r"has another config: .*f2\+l2.*, not .*f2\+l3"):
        reft.load_weights(tmp_path)
    assert_same_numbers(reft, before)


# What can be wrong ---------------------------------------------------------------------------------------------------


def edit_json(change):
    def edit(folder):
        path = folder / CONFIG_NAME
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors, "0:text:1:f2.weight")
        save_file(tensors, folder / WEIGHTS_NAME)

    return edit


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(keep):
    def edit(folder):
        path = folder / WEIGHTS_NAME
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])

    return edit


def retype(dtype):
    return edit_tensors(lambda tensors, name: tensors.update({name: tensors[name].to(dtype)}))


def set_item(**changes):
    return edit_json(lambda data: data["interventions"][0].update(changes))


def set_base(**changes):
    return edit_json(lambda data: data["base"].update(changes))


NOT_A_CONFIG = r"reft_config.json is not a vlreft config: .*"
BROKEN = {
    "no config": (
        lambda folder: (folder / CONFIG_NAME).unlink(),
        "no vlreft checkpoint in .*: there is no reft_config.json",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS_NAME).unlink(),
        "no weights in .*: there is no reft_model.safetensors",
    ),
    "empty config": (put(CONFIG_NAME, b""), "reft_config.json is not JSON"),
    "broken JSON": (put(CONFIG_NAME, b'{"format_version": 1, "interv'), "reft_config.json is not JSON"),
    "not UTF-8": (put(CONFIG_NAME, b'{"a": "\xff"}'), "reft_config.json is not JSON"),
    "nested too deep": (put(CONFIG_NAME, b"[" * 200_000), "reft_config.json is not JSON"),
    "JSON of a list": (put(CONFIG_NAME, b"[1]"), "reft_config.json must hold a JSON object, got list"),
    "unknown version": (
        edit_json(lambda data: data.update(format_version=4)),
        NOT_A_CONFIG + r"`format_version` \(=4\) is none of 1 to 3",
    ),
    "surplus key": (edit_json(lambda data: data.update(more=2)), NOT_A_CONFIG + "more"),
    "no interventions": (edit_json(lambda data: data.pop("interventions")), NOT_A_CONFIG + "'interventions'"),
    "surplus field": (set_item(more=1), NOT_A_CONFIG + "intervention 0 .*more"),
    "unknown method": (
        set_item(method="os.system"),
        NOT_A_CONFIG + r"`method` \(='os.system'\) must be one of 'loreft'",
    ),
    "position typo": (set_item(positions="f2+g2"), "(?s)" + NOT_A_CONFIG + r"character 4\)\n    f2\+g2\n       \^\n"),
    "no rank": (set_item(rank=None), NOT_A_CONFIG + "method 'loreft' needs a `rank`"),
    "rank above the width": (set_item(rank=17), r"`rank` \(=17\) must be at most the hidden size \(=16\)"),
    "layer out of range": (set_item(layers=[0, 3]), "layer 3 is out of range: site 'text' has 3 layers, 0 to 2"),
    "no such site": (set_item(site="vision"), "LlamaForCausalLM has no site 'vision' .*it has 'text'"),
    "no base": (edit_json(lambda data: data.pop("base")), "reft_config.json does not say which base it is for"),
    "base of a list": (
        edit_json(lambda data: data.update(base=[1])),
        "reft_config.json does not say which base it is for",
    ),
    "base without sites": (edit_json(lambda data: data["base"].pop("sites")), NOT_A_CONFIG + "sites"),
    "base with more": (set_base(more=1), NOT_A_CONFIG + "more"),
    "base with bad sites": (set_base(sites=[3]), NOT_A_CONFIG + "'base'"),
    "base with a bad site": (set_base(sites={"text": [3]}), NOT_A_CONFIG + "'base'"),
    "base with a bad name": (set_base(model_type=3), NOT_A_CONFIG + "'base'"),
    "missing tensor": (edit_tensors(lambda t, name: t.pop(name)), r"missing \['0:text:1:f2.weight'\]$"),
    "surplus tensor": (edit_tensors(lambda t, _: t.update(more=torch.ones(1))), r"surplus \['more'\]$"),
    "renamed tensor": (
        edit_tensors(lambda t, name: t.update(other=t.pop(name))),
        r"missing \['0:text:1:f2.weight'\]; surplus \['other'\]$",
    ),
    "misshapen tensor": (
        edit_tensors(lambda t, name: t.update({name: t[name].mT.contiguous()})),
        r"'0:text:1:f2.weight' has shape \(16, 2\) in the file and \(2, 16\) by its config$",
    ),
    "half precision": (
        retype(torch.float16),
        "'0:text:1:f2.weight' is torch.float16 in the file, it must be torch.float32",
    ),
    "double precision": (retype(torch.float64), "is torch.float64 in the file, it must be torch.float32"),
    "whole numbers": (retype(torch.int32), "is torch.int32 in the file, it must be torch.float32"),
    "empty weights": (cut(0), "reft_model.safetensors is not a whole safetensors file"),
    "weights cut in the length": (cut(5), "reft_model.safetensors is not a whole safetensors file"),
    "weights cut in the header": (cut(100), "reft_model.safetensors is not a whole safetensors file"),
    "weights cut in half": (cut(0.5), "reft_model.safetensors is not a whole safetensors file"),
    "weights cut by a byte": (cut(-1), "reft_model.safetensors is not a whole safetensors file"),
    "a pickle": (put(WEIGHTS_NAME, pickle.dumps({"a": 1})), "reft_model.safetensors is not a whole safetensors file"),
    "a text": (put(WEIGHTS_NAME, b"version https://example.invalid/lfs\n"), "is not a whole safetensors file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_clear_error(name, tmp_path):
    breaks, text = BROKEN[name]
    model = shared_llama()
    save(tmp_path)
    breaks(tmp_path)
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=text) as caught:
        vlreft.load(model, tmp_path)
    if "layer" not in text and "rank" not in text and "no site" not in text:
        assert str(tmp_path) in str(caught.value)


def test_all_problems_of_the_tensors_are_named_at_once(tmp_path):
    save(tmp_path)
    edit_tensors(lambda t, name: t.update({"more": t.pop(name), "0:text:0:l2.bias": torch.ones(3)}))(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit its config: missing .*; surplus .*; '0:text:0:l2.bias' has shape"
    ):
        vlreft.load(shared_llama(), tmp_path)


def test_load_weights_copies_all_or_nothing(tmp_path):
    save(tmp_path)
    edit_tensors(lambda t, name: t.pop(name))(tmp_path)
    reft = shake(vlreft.attach(llama(), CONFIG), seed=2)
    before = numbers(reft)
    with pytest.raises(ValueError, match="missing"):
        reft.load_weights(tmp_path)
    assert_same_numbers(reft, before)


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_no_folder(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with untouched(shared_llama()), pytest.raises(ValueError, match=f"no vlreft checkpoint in .*{folder}"):
        vlreft.load(shared_llama(), tmp_path / folder)


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        (lambda: llama(width=24), r"llama: text 3 x 24"),
        (lambda: llama(num_hidden_layers=2), r"llama: text 2 x 16"),
        (qwen2, r"qwen2: text 3 x 16"),
        (llava, r"llava: text 3 x 16, vision 4 x 24, connector 1 x 16"),
    ],
)
def test_another_base_is_an_error_that_names_both(other, shape, tmp_path):
    made_for = llama()
    made_for.config.name_or_path = "acme/first"
    save(tmp_path, made_for)
    model = other()
    model.config.name_or_path = "acme/second"
    with untouched(model), pytest.raises(ValueError, match="was made for another base") as caught:
        vlreft.load(model, tmp_path)
    assert "for acme/first (llama: text 3 x 16)" in str(caught.value)
    assert f"not for acme/second ({shape})" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_name_in_use(tmp_path):
    save(tmp_path)
    model = llama()
    first = shake(vlreft.attach(model, CONFIG))
    with untouched(model), pytest.raises(ValueError, match=r"named 'default' are attached already; .*another `name`"):
        vlreft.load(model, tmp_path)
    assert first.is_attached
    assert vlreft.load(model, tmp_path, name="second").is_attached


# Atomic writing ------------------------------------------------------------------------------------------------------


def fail_at(call, function):
    """Return a function that raises OSError at its n-th call, from 0, and works otherwise."""
    calls = iter(range(1000))

    def failing(*args):
        if next(calls) == call:
            raise OSError(28, "no space left on device")
        return function(*args)

    return failing


@pytest.mark.parametrize(
    ("owner", "name", "call"), [(os, "fsync", 0), (os, "fsync", 1), (os, "fsync", 2), (Path, "replace", 0)]
)
@pytest.mark.parametrize("make", [shared_llama, shared_llava])
def test_a_failing_write_leaves_the_last_good_checkpoint(make, owner, name, call, tmp_path, monkeypatch):
    saved = save(tmp_path, make())
    other = vlreft.ReftConfig(vlreft.Intervention("red", positions="f1"))
    reft = vlreft.attach(make(), other)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at(call, getattr(owner, name)))
        with pytest.raises(OSError, match="no space left"):
            reft.save_pretrained(tmp_path)
    reft.detach()
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    loaded = vlreft.load(make(), tmp_path)
    loaded.detach()
    assert loaded.config == CONFIG
    assert_same_numbers(loaded, saved)
    reft = vlreft.attach(make(), other)
    reft.save_pretrained(tmp_path)
    reft.detach()
    again = vlreft.load(make(), tmp_path)
    again.detach()
    assert again.config == other


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_failing_first_write_is_no_checkpoint(call, tmp_path, monkeypatch):
    reft = vlreft.attach(llama(), CONFIG)
    monkeypatch.setattr(os, "fsync", fail_at(call, os.fsync))
    with pytest.raises(OSError, match="no space left"):
        reft.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no vlreft checkpoint"):
        vlreft.load(llama(), tmp_path)
