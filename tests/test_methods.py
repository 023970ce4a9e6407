"""Ways to adapt a base: what is trained is what is saved, the base comes back bit for bit, refusals say why."""

import copy
import random
from functools import cache
from itertools import islice
from types import SimpleNamespace

import datasets
import families_packed
import pytest
import torch
from conftest import hooks_of_vlreft
from optuna.distributions import CategoricalDistribution, FloatDistribution
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from tasks.methods.adapters import PromptedLM, keep_weights, layers_of, regex, stacks_of
from tasks.methods.reft import OFF, ReftMethod
from tasks.methods.table import METHODS
from tasks.methods.weights import given_back
from tasks.setups import ClassesSetup, GenerateSetup, Options, SequenceSetup
from tasks.table import TASKS
from tasks.task import column
from tasks.training import Job, PlainTrainer, TaskTrainer, step_in_float32
from vlreft.models.sites import find_sites

# peft 0.21 calls two names that transformers 5.24 renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"),
]
OPTIONS = Options("cpu", torch.float32)
SETUPS = ("llava", "lm", "clip", "sequence")
NO_BIAS = "no bias terms"
AROUND = "this task's answers come from the model itself"
REFUSED = {
    ("bias", "lm"): NO_BIAS,
    ("bias", "sequence"): NO_BIAS,
    ("prompt", "clip"): AROUND,
    ("prefix", "clip"): AROUND,
    ("prompt", "sequence"): AROUND,
    ("prefix", "sequence"): AROUND,
}
PAIRS = [(method, setup) for method in METHODS for setup in SETUPS if (method, setup) not in REFUSED]
# Those that differ from another one by a setting alone wait for the slow run, and so do most on text alone.
TWINS = ("reft", "rslora", "norms")
FEW = ("loreft", "lora", "prompt", "head")


def _is_slow(method, name):
    return method in TWINS or (name in ("lm", "sequence") and method not in FEW)


pairs = pytest.mark.parametrize(
    ("method", "name"), [pytest.param(*pair, marks=pytest.mark.slow) if _is_slow(*pair) else pair for pair in PAIRS]
)


@cache
def rows_of(name):
    if name == "sequence":
        texts = ["red circle", "a large blue star", "no", "the small green square is here"]
        rows = [{"id": str(i), "text": text, "text_pair": "", "answer": ""} for i, text in enumerate(texts)]
        labels = TASKS["glue_sst2"].labels
        return datasets.Dataset.from_list([{**row, "answer": labels[i % 2]} for i, row in enumerate(rows)])
    task = {"llava": "demo_code", "lm": "demo_lm_code", "clip": "demo_clip"}[name]
    rows = TASKS[task].load("dev")
    return rows.select(range(0, len(rows), len(rows) // 4)).select(range(4))


@cache
def loaded(name):
    if name == "clip":
        return ClassesSetup(
            TASKS["demo_clip"], "assets/demo-clip", OPTIONS, sorted(set(column(rows_of("clip"), "answer")))
        )
    if name == "sequence":
        return SequenceSetup(TASKS["glue_sst2"], "assets/demo-lm", OPTIONS)
    task, model = {"llava": ("demo_code", "demo-llava"), "lm": ("demo_lm_code", "demo-lm")}[name]
    return GenerateSetup(TASKS[task], f"assets/{model}", OPTIONS)


@cache
def setup_of(name):
    """Return a base that has run once: transformers hangs hooks of its own into a tower then, and leaves them there."""
    setup = loaded(name)
    logits(setup.model, name)
    return setup


def batch_of(name):
    setup = loaded(name)
    batch = setup.collator(list(setup.examples(rows_of(name), training=True)))
    return {key: value for key, value in batch.items() if key != "labels" or name != "clip"}


@torch.no_grad()
def logits(model, name):
    model.eval()
    found = model(**batch_of(name))
    if name != "clip":
        return found.logits
    tensors = found.values() if isinstance(found, dict) else found
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def drawn(space, number):
    """Draw choices from a space, by a fixed seed."""
    rng = random.Random(0)

    def draw(distribution):
        if isinstance(distribution, CategoricalDistribution):
            return rng.choice(distribution.choices)
        assert isinstance(distribution, FloatDistribution)
        return rng.uniform(distribution.low, distribution.high)

    slots = [key for key, distribution in space.placement.items() if OFF in distribution.choices]
    while number:
        choice = {key: draw(distribution) for key, distribution in {**space.placement, **space.training}.items()}
        if not slots or any(choice[slot] != OFF for slot in slots):
            yield choice
            number -= 1


def choices_of(method, name, number=3):
    space = METHODS[method].space(setup_of(name))
    return [*({**start, "learning_rate": 1e-2} for start in space.starts), *drawn(space, number)]


def state_of(model):
    """Return all that a model must get back: tensors, which parameters are trainable, modules, the tensors' objects."""
    return (
        {key: value.detach().clone() for key, value in model.state_dict().items()},
        {
            name: (id(parameter), parameter.requires_grad, parameter.grad)
            for name, parameter in model.named_parameters()
        },
        [(path, id(module), module.training, sorted(vars(module))) for path, module in model.named_modules()],
        [
            (path, key)
            for path, module in model.named_modules()
            for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            for _ in getattr(module, key)
        ],
    )


def assert_same(model, before):
    now = state_of(model)
    assert list(now[0]) == list(before[0])
    assert [key for key in now[0] if not now[0][key].equal(before[0][key])] == []
    assert now[1:] == before[1:]
    assert hooks_of_vlreft(model) == []


def settle(method, model):
    """Take off what a trainer leaves on a base that interventions are in: they do not look at it."""
    if isinstance(METHODS[method], ReftMethod):
        model.eval()
        vars(model).pop("_is_accelerate_prepared", None)


# What is trained -----------------------------------------------------------------------------------------------------


@pairs
def test_what_is_trainable_is_what_is_named_and_the_base_comes_back(method, name):
    setup = setup_of(name)
    base = setup.model
    first = logits(base, name)
    before = state_of(base)
    for number, choice in enumerate(choices_of(method, name)):
        with METHODS[method].adapted(setup, choice) as adapted:
            inside = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
            assert inside.keys() == adapted.parameters.keys()
            assert all(inside[key] is adapted.parameters[key] for key in inside)
            assert adapted.num_trained > 0
            assert all(any(f"{head}." in key for key in inside) for head in setup.heads)
            if number == 0:
                torch.nn.init.constant_(next(iter(inside.values())), 0.5)
                logits(adapted.model, name)
        assert setup.model is base
        assert_same(base, before)
    assert logits(base, name).equal(first)


def trainer_of(method, name, adapted, folder):
    setup = setup_of(name)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    rows = rows_of(name)
    if isinstance(METHODS[method], ReftMethod):
        return TaskTrainer(Job(setup.task, setup, args, folder, rows, rows))
    return PlainTrainer(Job(setup.task, setup, args, folder, rows, rows), model=adapted.model)


@pairs
def test_a_step_changes_what_is_trained_and_answers_come_from_it(method, name, tmp_path):
    setup = setup_of(name)
    before = state_of(setup.model)
    choice = choices_of(method, name, 1)[-1]
    with METHODS[method].adapted(setup, choice) as adapted:
        start = {key: value.detach().clone() for key, value in adapted.model.state_dict().items()}
        trainer = trainer_of(method, name, adapted, tmp_path)
        loss = trainer.train().training_loss
        assert loss > 0
        assert loss < float("inf")
        now = adapted.model.state_dict()
        changed = {key for key in start if not now[key].equal(start[key])}
        assert now.keys() == start.keys()
        assert changed
        # A tied embedding is one parameter and two entries.
        trained = {p.data_ptr() for p in adapted.parameters.values()}
        assert {now[key].data_ptr() for key in changed} <= trained
        if method != "full":
            assert len(changed) <= len(adapted.parameters)
        answers = trainer.answer(rows_of(name), tmp_path / "answers.jsonl")
        assert len(answers) == 4
    settle(method, setup.model)
    assert_same(setup.model, before)


def test_steps_too_small_for_half_precision_add_up():
    whole, half = (nn.Linear(8, 8) for _ in range(2))
    half.load_state_dict(whole.state_dict())
    half.bfloat16()
    whole.load_state_dict(half.state_dict())
    optimizers = [torch.optim.AdamW(module.parameters(), 1e-4, weight_decay=0.0) for module in (whole, half)]
    step_in_float32(optimizers[1])
    before = half.weight.detach().clone()
    for number in range(100):
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(number)).bfloat16()
        for module, optimizer in zip((whole, half), optimizers, strict=True):
            module.weight.grad = gradient.to(module.weight.dtype)
            optimizer.step()
            optimizer.zero_grad()
    assert not half.weight.equal(before)
    assert half.weight.equal(whole.weight.bfloat16())
    assert half.bias.equal(whole.bias.bfloat16())


@pytest.mark.parametrize("method", ["full", "norms", "head"])
def test_a_base_in_half_precision_is_trained_in_float32(method, tmp_path, monkeypatch):
    setup = setup_of("lm")
    monkeypatch.setattr(setup, "model", copy.deepcopy(setup.model).bfloat16())
    choice = choices_of(method, "lm", 1)[0]
    with METHODS[method].adapted(setup, choice) as adapted:
        trainer = trainer_of(method, "lm", adapted, tmp_path)
        trainer.train()
        assert {parameter.dtype for parameter in adapted.parameters.values()} == {torch.bfloat16}
        stepped = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        assert {parameter.dtype for parameter in stepped} == {torch.float32}
        assert len(stepped) == len(adapted.parameters)


# What comes back -----------------------------------------------------------------------------------------------------


@pairs
def test_the_base_comes_back_after_an_error(method, name):
    setup = setup_of(name)
    before = state_of(setup.model)
    choice = choices_of(method, name, 1)[0]

    def fail():
        with METHODS[method].adapted(setup, choice) as adapted:
            adapted.model.train()
            adapted.model(**batch_of(name))
            for parameter in adapted.parameters.values():
                nn.init.normal_(parameter)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    settle(method, setup.model)
    assert_same(setup.model, before)


@pairs
def test_saved_numbers_give_the_same_logits_later(method, name, tmp_path):
    setup, choice = setup_of(name), choices_of(method, name, 1)[0]
    plain = logits(setup.model, name)
    with METHODS[method].adapted(setup, choice) as adapted:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        first = logits(adapted.model, name)
        num_bytes = adapted.save(tmp_path)
        least, names = 4 * adapted.num_trained, sum(len(key) for key in adapted.parameters)
        # safetensors' header: names (a file of interventions has each twice), and what each tensor is.
        assert least <= num_bytes <= least + 300 * len(adapted.parameters) + 2 * names + 1000
        again = logits(adapted.model, name)
        assert again.equal(first)
    assert not first.equal(plain)
    with METHODS[method].adapted(setup, choice) as adapted:
        adapted.load(tmp_path)
        assert logits(adapted.model, name).equal(first)


def test_given_back_undoes_more_than_peft_does():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = state_of(model)
    order = list(model[0]._parameters)
    with given_back(model):
        weight = model[0]._parameters.pop("weight")
        model[0].register_parameter("weight", nn.Parameter(weight * 2))
        model[0].bias.data = torch.ones(2)
        model[1](torch.randn(4, 2))
        model[0].register_forward_hook(lambda *_: None)
        model.eval()
        model.other, model[1] = 3, nn.Identity()
    assert_same(model, before)
    assert list(model[0]._parameters) == order


def test_an_attention_that_peft_merges_does_not_drift():
    name, choice = "clip", {"stacks": "vision", "modules": "attention", "rank": 2, "alpha": 4}
    setup = setup_of(name)
    before = [p.detach().clone() for n, p in setup.model.named_parameters() if n.endswith("in_proj_weight")]
    with METHODS["lora"].adapted(setup, choice) as adapted:
        for parameter in adapted.parameters.values():
            nn.init.normal_(parameter)
        logits(adapted.model, name)
        now = [p for n, p in setup.model.named_parameters() if n.endswith("in_proj_weight")]
        assert len(now) == len(before)
        assert all(any(weight.equal(other) for other in before) for weight in now)


def test_pefts_own_attention_drifts_so_that_it_has_to_be_kept():
    attention = nn.MultiheadAttention(16, 2)
    found = []
    for is_kept in (False, True):
        with given_back(attention):
            model = get_peft_model(nn.Sequential(attention), LoraConfig(r=2, target_modules="0"))  # pyright: ignore
            layer = model.base_model.model[0]
            if is_kept:
                keep_weights(layer)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter)
            before = attention.in_proj_weight.detach().clone()
            x = torch.randn(3, 1, 16)
            layer(x, x, x)
            found.append(attention.in_proj_weight.equal(before))
    assert found == [False, True]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_a_refusal_names_method_model_reason_and_another(method, name):
    setup = setup_of(name)
    before = state_of(setup.model)
    said = f"method '{method}' cannot adapt a {type(setup.model).__name__}: .*{REFUSED[method, name]}.*; use '"
    with pytest.raises(ValueError, match=said):
        METHODS[method].space(setup)
    choice = {"part": "all", "num_virtual_tokens": 4}
    with pytest.raises(ValueError, match=said), METHODS[method].adapted(setup, choice):
        pass
    assert_same(setup.model, before)


@pytest.mark.parametrize("name", ["llava", "lm"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:Both `past_key_values` and `cache`")
def test_a_generation_that_loses_its_virtual_tokens_is_refused(method, name, monkeypatch):
    setup = setup_of(name)
    before = state_of(setup.model)
    monkeypatch.setattr(PromptedLM, "generate", PeftModelForCausalLM.generate)
    with pytest.raises(ValueError, match=f"'{method}' cannot adapt a {type(setup.model).__name__}: .*; use 'lora'"):
        METHODS[method].space(setup)
    assert_same(setup.model, before)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_peft_itself_refuses_the_attention_that_is_not_offered(options):
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.raises((ValueError, AttributeError)):
        get_peft_model(model, LoraConfig(r=2, target_modules="0", **options))  # pyright: ignore
    for method in ("dora", "pissa", "ia3"):
        assert METHODS[method].space(setup_of("clip")).placement["modules"].choices == ("mlp",)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_layers_that_peft_swaps_are_refused():
    """Of a mixture of experts peft takes the experts where the dense layers beside them were asked for."""
    (family,) = (family for family in families_packed.ROWS if family.name == "glm4v_moe")
    setup = SimpleNamespace(model=family.build(), heads=(), task=TASKS["demo_code"])
    before = state_of(setup.model)
    choice = METHODS["lora"].space(setup).starts[0]
    said = "'lora' cannot adapt a Glm4vMoe.*: peft takes other layers than the chosen ones .*layers.*mlp.*; use 'norms'"
    with pytest.raises(ValueError, match=said), METHODS["lora"].adapted(setup, choice):
        pass
    assert_same(setup.model, before)


# What is counted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("name", SETUPS)
def test_lora_starts_as_the_base(method, name):
    setup = setup_of(name)
    first = logits(setup.model, name)
    for choice in choices_of(method, name):
        with METHODS[method].adapted(setup, {**choice, "dropout": 0.1}) as adapted:
            assert logits(adapted.model, name).equal(first)


@pytest.mark.parametrize("name", SETUPS)
def test_virtual_tokens_scales_and_updates_are_as_many_as_their_formulas_say(name):
    # The demo models' blocks: width 128, MLP 384; the text of Llama's kind, towers and CLIP's text of CLIP's kind.
    llama, tower = 4 * (128 + 128) + 2 * (128 + 384) + (384 + 128), 4 * (128 + 128) + 2 * (128 + 384)
    text, vision = {"llava": (4 * llama, 4 * tower), "lm": (4 * llama, 0), "clip": (3 * tower, 4 * tower)}.get(
        name, (4 * llama, 0)
    )
    if name == "clip":  # queries, keys and values are one matrix with one update
        less = 3 * (128 + 128) - (128 + 3 * 128)
        text, vision = text - 3 * less, vision - 4 * less
    setup = setup_of(name)
    head = 2 * 128 if name == "sequence" else 0
    for stacks in stacks_of(setup):
        numbers = ("text" in stacks) * text + ("vision" in stacks) * vision
        choice = {"stacks": stacks, "modules": "attention+mlp", "rank": 3, "alpha": 2}
        with METHODS["lora"].adapted(setup, choice) as adapted:
            assert adapted.num_trained == 3 * numbers + head
        blocks = ("text" in stacks) * (3 if name == "clip" else 4) + ("vision" in stacks) * 4
        modules = "mlp" if name == "clip" else "attention+mlp"
        scales = 384 if name == "clip" else 2 * 128 + 384
        with METHODS["ia3"].adapted(setup, {"stacks": stacks, "modules": modules}) as adapted:
            assert adapted.num_trained == blocks * scales + head


@pytest.mark.parametrize("name", ["llava", "lm"])
@pytest.mark.parametrize(("method", "numbers"), [("prompt", 128), ("prefix", 2 * 4 * 128)])
def test_virtual_tokens_are_a_state_or_a_key_and_value_of_each_layer(method, numbers, name):
    with METHODS[method].adapted(setup_of(name), {"num_virtual_tokens": 5}) as adapted:
        assert adapted.num_trained == 5 * numbers


def test_a_prompt_starts_as_words_and_never_as_an_image():
    setup = setup_of("llava")
    words = setup.model.get_input_embeddings().weight
    with METHODS["prompt"].adapted(setup, {"num_virtual_tokens": 400}) as adapted:
        (start,) = adapted.parameters.values()
        drawn = {int((words == row).all(1).nonzero()) for row in start}
    assert drawn.isdisjoint(setup.collator.tokenizer.all_special_ids)
    assert len(drawn) > 100


def test_a_start_of_pissa_is_the_base_nearly_and_its_weights_are_not():
    setup = setup_of("lm")
    first, weight = logits(setup.model, "lm"), setup.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with METHODS["pissa"].adapted(setup, {"stacks": "text", "modules": "mlp", "rank": 4, "alpha": 1}) as adapted:
        torch.testing.assert_close(logits(adapted.model, "lm"), first, atol=1e-3, rtol=1e-3)
        assert not setup.model.model.layers[0].mlp.up_proj.base_layer.weight.equal(weight)


def test_the_last_layer_of_a_model_that_generates_is_untied():
    setup = setup_of("lm")
    base = setup.model
    assert base.lm_head.weight is base.model.embed_tokens.weight
    first = logits(base, "lm")
    with METHODS["head"].adapted(setup, {}) as adapted:
        assert logits(base, "lm").equal(first)
        nn.init.zeros_(*adapted.parameters.values())
        assert base.model.embed_tokens.weight.any()
        assert not logits(base, "lm").any()
    assert base.lm_head.weight is base.model.embed_tokens.weight


# Where it sits -------------------------------------------------------------------------------------------------------


def test_names_are_whole_names():
    """In open_clip a name of the text's blocks is the end of a name of the tower's."""
    setup = setup_of("clip")
    with METHODS["lora"].adapted(setup, {"stacks": "text", "modules": "mlp", "rank": 1, "alpha": 1}) as adapted:
        assert not [name for name in adapted.parameters if name.startswith("visual")]
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    get_peft_model(model, LoraConfig(r=1, target_modules=regex(["a"])))  # pyright: ignore[reportArgumentType]
    assert not isinstance(model["a"], nn.Linear)
    assert isinstance(model["b"]["a"], nn.Linear)


@pytest.fixture
def bert(tmp_path):
    config = BertConfig(
        vocab_size=204, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained("assets/demo-lm").save_pretrained(tmp_path)
    return SequenceSetup(TASKS["glue_sst2"], str(tmp_path), OPTIONS)


def test_an_encoders_layers_are_found_by_structure(bert):
    assert isinstance(bert.model, BertForSequenceClassification)
    groups = layers_of(bert.model, find_sites(bert.model).by_name["text"])
    assert len(groups["attention"]) == 2 * 4
    assert len(groups["mlp"]) == 2 * 2
    head = 16 * 16 + 16 + 2 * 16 + 2
    with METHODS["ia3"].adapted(bert, {"stacks": "text", "modules": "attention+mlp"}) as adapted:
        assert adapted.num_trained == 2 * (2 * 16 + 32) + head
        assert [name for name in adapted.parameters if "intermediate" in name] == []
    with METHODS["head"].adapted(bert, {}) as adapted:
        assert adapted.num_trained == head
    with METHODS["bias"].adapted(bert, {"part": "all"}) as adapted:
        biases = [p for n, p in bert.model.named_parameters() if n.endswith("bias") and "pooler" not in n]
        assert adapted.num_trained == sum(p.numel() for p in biases if p.shape != (2,)) + head


def test_methods_are_named_as_they_are_asked_for():
    assert list(islice(METHODS, 2)) == ["loreft", "reft"]
    assert all(name == method.name and method.title for name, method in METHODS.items())
