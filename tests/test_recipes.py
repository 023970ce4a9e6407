"""Recipes: complete, read-only, true to the papers' numbers, and usable as they are."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import pytest
import torch
from test_counts import base, clip_l14
from tiny import IMAGE_ID, TEXT, llama, shared_llava, untouched
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    DataCollatorWithPadding,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    SiglipVisionConfig,
    TrainingArguments,
)

import vlreft
from vlreft.recipes import GLUE_TASKS, RECIPES, recipe

every = pytest.mark.parametrize("name", RECIPES)
GLUE = tuple(
    f"{method}-glue-{task}{size}" for method in ("loreft", "direft") for size in ("", "-large") for task in GLUE_TASKS
)
TEXT_ONLY = tuple(
    f"{method}-{data}" for method in ("loreft", "direft") for data in ("commonsense", "arithmetic", "instruct")
)
MULTIMODAL = ("mrt", "mores", "mores-task", "mores-connector", "mores-uniform")


def llava(tower, text, **settings):
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, **({"image_token_id": 31999} | settings))
    )


@functools.cache
def tiny_model(name):
    """The smallest model with as many blocks as the recipe names."""
    torch.manual_seed(0)
    if name in GLUE:
        sizes = {**TEXT, "pad_token_id": 1, "hidden_size": 16, "max_position_embeddings": 300}
        return RobertaForSequenceClassification(RobertaConfig(num_labels=2, **sizes)).eval()
    if name in TEXT_ONLY:
        return llama(num_hidden_layers=25)
    tower = CLIPVisionConfig(
        hidden_size=24, intermediate_size=24, num_hidden_layers=24, num_attention_heads=2, image_size=8, patch_size=4
    )
    return llava(tower, LlamaConfig(hidden_size=16, **TEXT), image_token_id=IMAGE_ID).eval()


def words(text):
    return " ".join(str(text).split())


def test_names():
    assert set(RECIPES) == {*GLUE, *TEXT_ONLY, *MULTIMODAL}
    assert all(recipe(name) is RECIPES[name] and RECIPES[name].name == name for name in RECIPES)
    with pytest.raises(
        ValueError, match=r"there is no recipe 'nonsense'; there are loreft-commonsense, .*mores-uniform"
    ):
        recipe("nonsense")


# Each is complete and fits the rest ----------------------------------------------------------------------------------


@every
def test_attaches(name):
    """Each block has an intervention for each part of the positions; the tiny models have 3 text blocks, LLaMA's 25."""
    model, blocks = tiny_model(name), 25 if name in TEXT_ONLY else 3
    expected = {"loreft-instruct": 4 * 2, "direft-instruct": 4 * 2, "mrt": 22 + 1 + 2 * blocks}
    expected |= {f"direft-{data}": 2 * blocks for data in ("commonsense", "arithmetic")}
    reft = vlreft.attach(model, recipe(name).config)
    try:
        assert len(reft.edits) == expected.get(name, blocks)
        assert reft.num_parameters() == sum(parameter.numel() for parameter in reft.edits.parameters())
    finally:
        reft.detach()


def test_blocks_that_a_tower_does_not_have_are_refused():
    with untouched(shared_llava()), pytest.raises(ValueError, match="layer"):
        vlreft.attach(shared_llava(), recipe("mrt").config)


@every
def test_json_both_ways(name):
    config = recipe(name).config
    assert vlreft.ReftConfig.from_dict(json.loads(config.to_json())) == config
    assert {item.init for item in config.interventions} == {"reference"}


@every
def test_training_arguments(name, tmp_path):
    """Warnings are errors here: no keyword is deprecated."""
    one = recipe(name)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", **one.training)
    for key, value in one.training.items():
        assert getattr(arguments, key) == value, key
    assert arguments.get_warmup_steps(1_000) == math.ceil(1_000 * one.arguments["warmup_steps"])
    assert arguments.train_batch_size * arguments.gradient_accumulation_steps == one.global_batch


@every
def test_generation_and_collator(name):
    one = recipe(name)
    GenerationConfig(pad_token_id=0, **one.generation).validate(strict=True)
    tokenizer = AutoTokenizer.from_pretrained("assets/demo-lm")
    collator = vlreft.Collator(tokenizer, **one.collator)
    assert collator.max_length == one.collator.get("max_length")
    ids = tokenizer("there is a circle . " * 100, **one.tokenizer)["input_ids"]
    assert len(ids) == one.tokenizer["max_length"] if one.tokenizer else len(ids) > 400
    assert bool(one.tokenizer) == (not one.collator) == (not one.generation) == (name in GLUE)


@every
def test_prints_everything(name):
    one, shown = recipe(name), words(recipe(name))
    for item in one.config.interventions:
        for field, value in dataclasses.asdict(item).items():
            text = (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else value
            assert f"{field} {text}" in shown
    for part in (one.arguments, one.collator, one.tokenizer, one.generation, one.reported):
        for key, value in part.items():
            assert f"{key} {value}" in shown
    for model, count in one.num_trained.items():
        assert f"{model} {count:,}" in shown
    for text in (one.name, one.title, one.source, one.dtype, *one.config.modules_to_save, *one.differs):
        assert words(text) in shown
    assert f"global batch {one.global_batch}" in shown
    assert ", ".join(map(str, one.seeds)) in shown
    assert max(map(len, str(one).splitlines())) <= 120


@every
def test_nothing_can_be_changed(name):
    one = recipe(name)
    for field in dataclasses.fields(one):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, None)
        value = getattr(one, field.name)
        assert not isinstance(value, dict | list | set)
        if hasattr(value, "items"):
            with pytest.raises(TypeError):
                value["learning_rate"] = 1.0
    one.training["learning_rate"] = 1.0
    assert one.training["learning_rate"] == one.arguments["learning_rate"] != 1.0


def test_a_recipe_keeps_no_dict_of_its_maker():
    mine = {"learning_rate": 1.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    one = dataclasses.replace(recipe("mores"), arguments=mine)
    mine["learning_rate"] = 2.0
    assert one.training["learning_rate"] == 1.0
    assert one.global_batch == 6
    with pytest.raises(TypeError):
        RECIPES["mores"] = one


# What the papers say -------------------------------------------------------------------------------------------------


def roberta(size):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1} | (
        shape if size == "large" else {}
    )
    return RobertaForSequenceClassification(RobertaConfig(num_labels=2, **sizes))


def phi_3b():
    tower = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    text = PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
    )
    return llava(tower, text, vision_feature_select_strategy="full")


def llava_13b():
    text = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    return llava(clip_l14(336), text)


# The models of `num_trained` that test_counts.py has under another name, or not at all.
SHAPES = {
    "Llama-2-7B": lambda: base("LLaMA-7B"),
    "RoBERTa-base": lambda: roberta("base"),
    "RoBERTa-large": lambda: roberta("large"),
    "Phi-2 (3B)": phi_3b,
    "LLaVA-1.5-13B": llava_13b,
}


@functools.cache
def true_shape(model):
    with torch.device("meta"):
        return SHAPES[model]() if model in SHAPES else base(model)


@pytest.mark.parametrize(("name", "model"), [(name, model) for name in RECIPES for model in RECIPES[name].num_trained])
def test_counts(name, model):
    reft = vlreft.attach(true_shape(model), recipe(name).config)
    try:
        saved = sum(p.numel() for p in reft.parameters()) - reft.num_parameters()
        assert reft.num_parameters() == recipe(name).num_trained[model]
        assert (saved > 0) == bool(recipe(name).config.modules_to_save)
    finally:
        reft.detach()


# Numbers of the base models (tests/test_counts.py); the papers divide by them and leave new heads out.
SIZES = {
    "LLaMA-7B": 6_738_415_616,
    "LLaMA-13B": 13_015_864_320,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "RoBERTa-base": 124_055_040,
    "RoBERTa-large": 354_310_144,
}
PERCENT = {
    **{"LLaMA-7B": "0.031 %", "LLaMA-13B": "0.025 %", "Llama-2-7B": "0.031 %", "Llama-3-8B": "0.026 %"},
    **{"RoBERTa-base": "0.015 %", "RoBERTa-large": "0.014 %"},
}


@pytest.mark.parametrize("name", [*TEXT_ONLY, *GLUE])
def test_counts_are_the_percentages_of_the_paper(name):
    one = recipe(name)
    for model, count in one.num_trained.items():
        percent = "0.0039 %" if name.endswith("instruct") else PERCENT[model]
        assert percent in one.reported.values()
        decimals = len(percent.removesuffix(" %").partition(".")[2])
        assert abs(100 * count / SIZES[model] - float(percent.removesuffix(" %"))) <= 0.5 * 10**-decimals


def test_counts_without_the_bias_are_those_of_mores():
    counts = recipe("mores").num_trained
    blocks = {"Phi-2 (3B)": 32, "LLaVA-1.5-7B": 32, "LLaVA-1.5-13B": 40}
    millions = {model: f"{(counts[model] - blocks[model]) / 1e6:.3f} M" for model in blocks}
    assert millions == {"Phi-2 (3B)": "0.164 M", "LLaVA-1.5-7B": "0.262 M", "LLaVA-1.5-13B": "0.410 M"}
    printed = {**recipe("mores").reported, **recipe("mores-task").reported}
    assert set(millions.values()) <= set(printed.values())


@every
def test_global_batches(name):
    special = {"direft-glue-rte": 8, "loreft-instruct": 128, "direft-instruct": 128}
    assert recipe(name).global_batch == special.get(name, 128 if name in MULTIMODAL else 32)


# (positions, rank, tied, layers, lr, epochs, warmup, weight decay, dropout) of the authors' command lines; the last one
# is from examples/loreft/original_code of pyreft.
COMMANDS = {
    "loreft-commonsense": ("f7+l7", 8, True, "all", 9e-4, 6, 0.1, 0.0, 0.0),
    "loreft-arithmetic": ("f7+l7", 8, True, "all", 9e-4, 12, 0.1, 0.0, 0.0),
    "loreft-instruct": ("f5+l5", 4, False, (3, 9, 18, 24), 9e-4, 9, 0.0, 0.0, 0.0),
    "direft-arithmetic": ("f7+l7", 4, False, "all", 9e-4, 12, 0.0, 0.06, 0.05),
    "mores": ("image:f4+l5", 1, True, "all", 2e-4, 1, 0.03, 0.0, 0.05),
    "mores-task": ("image:f4+l5", 1, True, "all", 2e-4, 10, 0.03, 0.0, 0.05),
    "loreft-glue-cola": ("f3", 1, False, "all", 4e-4, 60, 0.005, 0.0, 0.2),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_settings_are_those_of_the_commands(name):
    one = recipe(name)
    (edit,) = one.config.interventions
    names = ("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay")
    found = (edit.positions, edit.rank, edit.tied, edit.layers, *(one.arguments[key] for key in names), edit.dropout)
    assert found == COMMANDS[name]
    assert one.arguments["lr_scheduler_type"] == ("cosine" if name.startswith("mores") else "linear")


@every
def test_methods_and_positions(name):
    """The paper's DiReFT has a free projection; nothing but a response could be edited in decoding."""
    kinds = {item.method for item in recipe(name).config.interventions}
    assert kinds == ({"nodireft"} if name.startswith("direft") else {"loreft"})
    segments = {item.parsed_positions.segment for item in recipe(name).config.interventions}
    assert segments <= {"prompt", "image", "question"}


@pytest.mark.parametrize(
    ("method", "size", "mean"),
    [("loreft", "", 84.2), ("loreft", "-large", 88.2), ("direft", "", 83.2), ("direft", "-large", 87.4)],
)
def test_glue_scores_have_the_mean_that_is_printed_beside_them(method, size, mean):
    scores = [next(iter(recipe(f"{method}-glue-{task}{size}").reported.values())) for task in GLUE_TASKS]
    assert abs(sum(float(score.partition(" ")[0]) for score in scores) / 8 - mean) <= 0.06


def test_scores_have_the_means_that_are_printed_beside_them():
    """A printed mean may be that of unrounded scores."""
    commonsense = recipe("loreft-commonsense").reported
    tasks = [score for key, score in commonsense.items() if key.startswith("LLaMA-7B, ") and "mean" not in key]
    assert len(tasks) == 8
    assert abs(sum(tasks) / 8 - commonsense["LLaMA-7B, mean of 8 tasks"]) <= 0.06
    rows = [(recipe(name).reported, model) for name in ("loreft-arithmetic", "direft-arithmetic") for model in SIZES]
    rows += [(recipe("mores").reported, "Phi-2 (3B)")]
    for reported, model in rows:
        scores = {key: score for key, score in reported.items() if key.startswith(f"{model}, ")}
        if mean := scores.pop(f"{model}, mean", None):
            scores = [score for score in scores.values() if isinstance(score, float)]
            assert abs(sum(scores) / len(scores) - mean) <= 0.1


# In use --------------------------------------------------------------------------------------------------------------


def test_importing_brings_nothing_but_data():
    code = (
        "import json, sys, vlreft.config; before = set(sys.modules); import vlreft.recipes as r; "
        "print(json.dumps([sorted(set(sys.modules) - before), str(r.recipe('mores'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["vlreft.published", "vlreft.recipes"], str(recipe("mores"))]


def test_two_steps_on_the_demo_lm(tmp_path):
    one = recipe("loreft-commonsense")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("assets/demo-lm", dtype="float32")
    reft = vlreft.attach(model, one.config)
    before = [parameter.detach().clone() for parameter in reft.parameters()]
    collator = vlreft.Collator(AutoTokenizer.from_pretrained("assets/demo-lm"), **one.collator)
    colours = ("red", "blue")
    rows = [
        {"question": f"there is a small {colour} circle . what is the color of the circle ?", "answer": colour}
        for colour in colours * 32
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, **one.training
    )
    trainer = vlreft.ReftTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    # One step of warming up (0.1 of 2, rounded up): the first has no rate, the second the full one.
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [0.0, one.arguments["learning_rate"]]
    assert all(not torch.equal(*pair) for pair in zip(before, reft.parameters(), strict=True))
    assert trainer.state.epoch == 2 * one.global_batch / len(rows)
    inputs = collator.prompts(rows[:2])
    answers = model.generate(**inputs, **one.generation)
    width = inputs["input_ids"].shape[1]
    assert width < answers.shape[1] <= width + one.generation["max_new_tokens"]


def test_the_best_epoch_of_a_glue_recipe(tmp_path):
    """The best epoch is put back at the end: the scores are made to fall, so it is the first."""
    one, model = recipe("direft-glue-rte"), tiny_model("direft-glue-rte")
    reft, seen = vlreft.attach(model, one.config), []

    def score(_):
        seen.append([parameter.detach().clone() for parameter in reft.parameters()])
        return {one.arguments["metric_for_best_model"]: 1 / len(seen)}

    rows = [{"input_ids": [5 + i, 6, 7, 8], "labels": i % 2} for i in range(16)]
    trainer = vlreft.ReftTrainer(
        model=model,
        args=TrainingArguments(tmp_path, use_cpu=True, report_to="none", **one.training | {"num_train_epochs": 2}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained("assets/demo-lm")),
        compute_metrics=score,
    )
    trainer.train()
    end = list(reft.parameters())
    reft.detach()
    assert trainer.state.global_step == 2 * 16 / one.global_batch
    assert trainer.state.best_metric == 1.0
    first, second = seen
    assert all(map(torch.equal, end, first))
    assert not any(map(torch.equal, end, second))
