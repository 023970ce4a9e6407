"""`describe` and its command: what they say is what `attach` finds and makes, and the model stays as it was."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import assert_clean
from torch import nn
from transformers import LlamaConfig, LlavaForConditionalGeneration, Mistral3Config, Qwen2Config
from zoo import FAMILIES

import vlreft
from vlreft.models.components import COMPONENTS
from vlreft.models.description import describe, main
from vlreft.models.empty import build_empty

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "assets" / "demo-llava"
FILES = ("rows", "packed", "special", "text", "dual", "open_clip")
TAIL = [row for name in FILES for row in importlib.import_module(f"families_{name}").ROWS]
LLAMA_70B = {
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "vocab_size": 128256},
}
TINY = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 64},
}

CONFIGS = {
    "untied": [vlreft.Intervention("loreft", positions="prompt:f2+l2", rank=4)],
    "tied": [vlreft.Intervention("noreft", positions="prompt:f2+l2", rank=4, tied=True)],
    "components": [
        vlreft.Intervention("lobireft", component=component, layers=[0, -1], rank=3)
        for component in COMPONENTS
        if component != "heads"
    ],
    "heads": [vlreft.Intervention("loreft", component="heads", heads="all", layers=1, rank=2)],
    "a head": [vlreft.Intervention("red", component="heads", heads=[0, 3])],
    "a path": [vlreft.Intervention("vector", site="lm_head", positions="all")],
}
PICTURE_CONFIGS = {
    "vision": [vlreft.Intervention("loreft", site="vision", positions="patches", rank=4)],
    "all": [
        vlreft.Intervention("loreft", positions="question:f1+l1", rank=4),
        vlreft.Intervention("vector", site="vision", layers=0, positions="patches:rows[0:1]cols[:]"),
        vlreft.Intervention("red", site="connector", positions="image"),
    ],
}
CASES = [
    pytest.param(name, items, id=f"{name}-{case}")
    for name, family in FAMILIES.items()
    for case, items in {**CONFIGS, **(PICTURE_CONFIGS if family.has_image else {})}.items()
]


def write(folder, config, **more):
    """Make a folder that holds a config and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    return str(folder)


def command(*arguments):
    """Run the command line in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "vlreft.describe", *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


# What it says of a model in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "items"), CASES)
def test_counts_are_those_that_attach_makes(lend, name, items):
    model, config = lend(name), vlreft.ReftConfig(items)
    found = describe(model, config)
    reft = vlreft.attach(model, config)
    try:
        assert found.num_trainable == reft.num_parameters()
        assert sum(item.num_edits for item in found.planned) == len(reft.edits)
        made = [sum(p.numel() for key, p in reft.edits.named_parameters() if key.startswith(f"{number}:"))
                for number in range(len(items))]  # fmt: skip
        assert [item.num_parameters for item in found.planned] == made
        assert describe(model, config) == found  # the adapter on it is no part of the base
    finally:
        reft.detach()
    assert found.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_and_the_generator_stay_as_they_were(lend, name):
    model = lend(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modules, state = [id(module) for module in model.modules()], torch.get_rng_state()
    str(describe(model, vlreft.ReftConfig(CONFIGS["untied"])))
    assert_clean(model, weights)
    assert [id(module) for module in model.modules()] == modules
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("family", [*FAMILIES.values(), *TAIL], ids=str)
def test_every_family_is_described(family):
    model = family.build()
    found = describe(model)
    assert {site.name for site in found.sites} == set(family.sites) - set(found.refused)
    assert set(found.refused) >= set(family.refused)
    for name, why in family.refused.items():
        assert re.search(why, found.refused[name])
    for site in found.sites:
        assert site.num_blocks == len(family.blocks(model, site.name)) or site.name == "connector"
        assert site.components.keys() <= set(COMPONENTS)
        assert site.components["output"] == site.num_live
        assert all(count <= site.num_live for count in site.components.values())
        if site.name != "connector":
            lacking = {name for name in COMPONENTS if site.components.get(name, 0) < site.num_live}
            assert set(site.no_component) == lacking
        if site.name == "vision":
            assert site.states.startswith("packed") == (family.states == "packed")
    text = str(found)
    assert max(map(len, text.splitlines())) <= 120
    assert all(part in text for part in [*(site.path for site in found.sites), *found.refused])
    json.dumps(asdict(found))


def test_every_claim_about_a_known_model():
    found = describe(FAMILIES["llava"].build())
    assert (found.model_class, found.model_type) == ("LlavaForConditionalGeneration", "llava")
    text, vision, connector = found.sites
    assert (text.path, text.num_blocks, text.width) == ("model.language_model.layers", 3, 32)
    assert (text.num_heads, text.head_width, text.states) == ((4,), (8,), "(batch, tokens, width)")
    assert (text.image_tokens, text.no_region) == ("id 60", "")
    assert text.components == dict.fromkeys(COMPONENTS, 3)
    assert (vision.num_live, vision.num_blocks, vision.width) == (2, 3, 24)
    assert vision.dead_because.endswith("reads the output of layer 1 (vision_feature_layer=-2)")
    assert vision.tokens == (
        "1 class token before the patches of 14 x 14 pixels; the model drops the class token behind the last live block"
    )
    assert (vision.segments, vision.image_tokens) == (("prompt", "cls", "patches"), "")
    assert (connector.segments, connector.components) == (("image",), {"output": 1})
    assert list(found.refused) == ["text_encoder"]
    vision = describe(FAMILIES["qwen2_5_vl"].build()).sites[1]
    assert vision.states == "packed, by `grid_thw`"
    assert "grouped by merge window, these sorted by attention window" in vision.tokens


def test_modules_that_are_trained_whole_are_counted_apart(lend):
    model, config = lend("llava"), vlreft.ReftConfig(CONFIGS["untied"], ["multi_modal_projector"])
    found, reft = describe(model, config), vlreft.attach(model, config)
    assert found.num_trainable == reft.num_parameters()
    assert sum(found.modules_to_save.values()) == reft.num_module_parameters() > 0
    assert "in multi_modal_projector" in str(found)
    reft.detach()


def test_stacks_beside_the_sites_are_listed():
    family = next(row for row in TAIL if row.name == "video_llava")
    found = describe(family.build())
    assert [(stack.path, stack.width) for stack in found.other_stacks] == [("model.video_tower.encoder.layers", 24)]
    assert "a tower for videos beside the one for images" in str(found)


def test_a_table_shows_positions_as_they_are_written(lend):
    """Brackets are rich's own language."""
    item = vlreft.Intervention("vector", site="vision", layers=0, positions="patches:rows[0:1]cols[1:]")
    text = str(describe(lend("llava"), vlreft.ReftConfig(item)))
    assert "patches:rows[0:1]cols[1:]" in text
    assert "trainable: 24 numbers" in text


MISFITS = {
    "site": ([vlreft.Intervention("vector", site="audio")], [], "has no site 'audio'"),
    "layer": ([vlreft.Intervention("vector", layers=99)], [], "layer 99 is out of range"),
    "dead": ([vlreft.Intervention("vector", site="vision", layers=2, positions="patches")], [], "can never matter"),
    "rank": ([vlreft.Intervention("loreft", rank=33)], [], "`rank`"),
    "segment": ([vlreft.Intervention("vector", positions="cls")], [], "has no segment 'cls'"),
    "head": ([vlreft.Intervention("vector", component="heads", heads=9)], [], "head 9 is out of range"),
    "module": ([vlreft.Intervention("vector")], ["nothing"], "has no module 'nothing'"),
}


@pytest.mark.parametrize(("items", "modules", "message"), MISFITS.values(), ids=MISFITS)
def test_a_config_that_does_not_fit_fails_as_attach_does(lend, items, modules, message):
    model, config, said = lend("llava"), vlreft.ReftConfig(items, modules), []
    for ask in (describe, vlreft.attach):
        with pytest.raises(ValueError, match=message) as caught:
            ask(model, config)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_saved_adapter_is_read(lend, tmp_path):
    model, config = lend("llava"), vlreft.ReftConfig(PICTURE_CONFIGS["all"])
    reft = vlreft.attach(model, config)
    reft.save_pretrained(tmp_path)
    reft.detach()
    expected = describe(model, config)
    assert describe(model, tmp_path) == describe(model, str(tmp_path / "reft_config.json")) == expected


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 4), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())], ids=["linear", "cnn"]
)
def test_what_is_no_transformer_is_refused(model):
    with pytest.raises(ValueError, match="cannot be edited: no list of transformer blocks"):
        describe(model)


def test_a_resnet_of_torchvision_is_refused():
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="cannot be edited: no list of transformer blocks"):
        describe(torchvision.models.resnet18())


# From a config alone -----------------------------------------------------------------------------------------------


def test_a_model_without_weights_is_described_like_the_one_with_them():
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the checkout lacks the demo model")
    empty = build_empty(str(DEMO))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    config = vlreft.ReftConfig(PICTURE_CONFIGS["all"])
    assert describe(empty, config) == describe(LlavaForConditionalGeneration.from_pretrained(DEMO), config)


def test_seventy_billion_parameters_take_seconds(tmp_path):
    """Measured on two shared cores: 0.1 to 0.6 s to build, under 10 ms to find the sites, 10 ms to describe."""
    from vlreft.models.sites import find_sites

    folder = write(tmp_path, LlamaConfig(**LLAMA_70B).to_dict(), architectures=["LlamaForCausalLM"])
    start = time.perf_counter()
    model = build_empty(folder)
    built = time.perf_counter()
    find_sites(model)
    found = time.perf_counter()
    described = describe(model, vlreft.ReftConfig(CONFIGS["untied"]))
    end = time.perf_counter()
    print(f"built in {built - start:.3f} s, sites in {found - built:.3f} s, described in {end - found:.3f} s")  # noqa: T201
    assert (described.num_parameters, described.num_trainable) == (70_553_706_496, 160 * (2 * 4 * 8192 + 4))
    assert found - built < 2
    assert end - start < 15


@pytest.mark.parametrize(
    ("config", "more", "class_name", "expected"),
    [
        pytest.param(Qwen2Config(**TINY), {}, None, "Qwen2ForCausalLM", id="no class named"),
        pytest.param(
            Mistral3Config(), {"architectures": None}, None, "Mistral3ForConditionalGeneration", id="pictures"
        ),
        pytest.param(LlamaConfig(**TINY), {"architectures": ["LlamaModel"]}, None, "LlamaModel", id="class named"),
        pytest.param(LlamaConfig(**TINY), {}, "LlamaForSequenceClassification", None, id="class given"),
        pytest.param(
            LlamaConfig(**TINY), {"_attn_implementation": "flash_attention_2"}, None, "LlamaForCausalLM", id="kernel"
        ),
        pytest.param(
            LlamaConfig(**TINY), {"auto_map": {"AutoConfig": "x.X"}}, None, "LlamaForCausalLM", id="code beside it"
        ),
        pytest.param(Mistral3Config(), {}, "PixtralVisionModel", None, id="part of it"),
    ],
)
def test_the_class_is_the_one_named_or_the_one_for_the_task(tmp_path, config, more, class_name, expected):
    folder = write(tmp_path, config.to_dict(), **more)
    assert describe(build_empty(folder, class_name)).model_class == (class_name or expected)


def test_models_of_open_clip_are_made_from_their_names(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    found = describe(build_empty("open_clip:ViT-B-32"))
    assert (found.model_class, found.model_type, found.num_parameters) == ("CLIP", "", 151_277_313)
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert describe(build_empty(f"open_clip:local-dir:{tmp_path}")) == found


def test_a_model_that_cannot_be_made_on_meta_is_made_on_the_cpu(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    create, devices = open_clip.create_model, []

    def reads_values(*args, device="cpu", **options):
        devices.append(device)
        torch.zeros(()).item()  # as constructors do that space out dropout rates
        return create(*args, device=device, **options)

    monkeypatch.setattr(open_clip, "create_model", reads_values)
    model = build_empty("open_clip:ViT-B-32")
    assert devices == ["meta", "cpu"]
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# The command -------------------------------------------------------------------------------------------------------


def test_the_command_describes_a_folder(tmp_path):
    if not (DEMO / "config.json").is_file():
        pytest.skip("the checkout lacks the demo model")
    config = tmp_path / "reft_config.json"
    config.write_text(vlreft.ReftConfig(PICTURE_CONFIGS["all"]).to_json())
    done = command(str(DEMO), "--config", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    expected = str(describe(build_empty(str(DEMO)), config))
    assert [line.rstrip() for line in done.stdout.splitlines()] == expected.splitlines()


@pytest.mark.slow
def test_the_command_fails_with_a_sentence(tmp_path):
    folder = write(tmp_path, {"model_type": "shiny"})
    done = command(folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("transformers ")
    assert done.stderr.count("\n") == 1


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY}
RESNET = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
REMOTE = {"model_type": "shiny", "auto_map": {"AutoConfig": "shiny.Shiny"}}
ERRORS = {
    "no folder": (None, ("org/there-is-no-such-model",), "is neither a folder nor a model in the cache"),
    "a path": (None, ("/there/is/no/such/folder",), "is neither a folder nor a model in the cache"),
    "model type": ({"model_type": "shiny"}, (), r"has no model type 'shiny', which the config of '.*' names"),
    "code": (REMOTE, (), r"has no model type 'shiny', which the config of '.*' names"),
    "no model type": ({"hidden_size": 4}, (), "names no model type"),
    "class": ({**LLAMA, "architectures": ["LlavaLlama"]}, (), "has no model class 'LlavaLlama', which the config"),
    "no model class": ({**LLAMA, "architectures": ["LlamaConfig"]}, (), "has no model class 'LlamaConfig'"),
    "class given": (LLAMA, ("--class", "Nope"), "has no model class 'Nope'$"),
    "other class": (LLAMA, ("--class", "BertModel"), r"BertModel is made from a BertConfig, '.*' holds a LlamaConfig"),
    "wrong value": ({**LLAMA, "hidden_size": "big"}, (), "is no config of 'llama': .* expected int, got str"),
    "no fit": ({**LLAMA, "pad_token_id": 99}, (), "no LlamaForCausalLM can be made from the config"),
    "no transformer": (RESNET, (), "ResNetForImageClassification cannot be edited: no list of transformer blocks"),
    "no adapter": (LLAMA, ("--config", "/there/is/none.json"), "is not to be read as a vlreft config"),
    "open_clip": (None, ("open_clip:nope",), "open_clip has no model 'nope'"),
    "open_clip class": (None, ("open_clip:ViT-B-32", "--class", "CLIPModel"), "has no class to choose"),
    "open_clip folder": (None, ("open_clip:local-dir:/there/is/none",), "open_clip makes no model of 'local-dir:"),
    "open_clip hub": (None, ("open_clip:hf-hub:org/there-is-none",), "open_clip makes no model of 'hf-hub:org/there"),
}


@pytest.mark.parametrize(("config", "arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_each_error_is_one_sentence(tmp_path, capsys, config, arguments, message):
    if "open_clip:" in arguments[:1]:
        pytest.importorskip("open_clip")
    folder = [] if config is None else [write(tmp_path, config)]
    assert main([*folder, *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    with pytest.raises(ValueError, match=message):
        raise ValueError(err.rstrip("\n"))


@pytest.mark.parametrize(
    ("file", "message"),
    [("", r"has no config\.json$"), ("reft_config.json", "describe its base"), ("open_clip_config.json", "local-dir:")],
)
def test_a_folder_without_a_config(tmp_path, file, message):
    if file:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        build_empty(str(tmp_path))


def test_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ValueError, match=r"is not to be read: .* valid JSON"):
        build_empty(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 99, "interventions": []}'])
def test_an_adapter_that_is_none(lend, tmp_path, content):
    (tmp_path / "reft_config.json").write_text(content)
    with pytest.raises(ValueError, match="is not to be read as a vlreft config"):
        describe(lend("llama"), tmp_path)
