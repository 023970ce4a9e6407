"""Modules trained whole beside the interventions: a head or a connector, as a copy that stands in for the base's."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hooks_of_vlreft
from processors import text_tokenizer
from safetensors.torch import load_file, save_file
from tiny import TEXT, image_batch, llama, llava, numbers, shake, untouched
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    TrainingArguments,
)

import vlreft
from vlreft.reft import find_reft
from vlreft.saving.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME

IDS_BL = torch.randint(2, 29, (4, 7), generator=torch.Generator().manual_seed(0))
CLASSES_B = torch.tensor([0, 1, 1, 0])
EDIT = vlreft.Intervention("loreft", positions="f3", rank=1)
LAST = vlreft.Intervention("loreft", layers=[0, 1], positions="l2", rank=2)


def roberta(num_labels=2, model=RobertaForSequenceClassification, **settings):
    torch.manual_seed(0)
    sizes = {**TEXT, "pad_token_id": 1, "hidden_size": 16, **settings}
    return model(RobertaConfig(num_labels=num_labels, **sizes)).eval()


def llama_classifier(num_labels=2, **settings):
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(num_labels=num_labels, **{**TEXT, "hidden_size": 16, **settings})
    ).eval()


KINDS = {"roberta": (roberta, EDIT, "classifier"), "llama": (llama_classifier, LAST, "score")}
both = pytest.mark.parametrize("kind", KINDS)


def attached(kind, name="default", model=None, **settings):
    build, edit, head = KINDS[kind]
    model = build(**settings) if model is None else model
    return model, vlreft.attach(model, vlreft.ReftConfig(edit, modules_to_save=[head]), name)


def copy_in(model, kind, name="default"):
    return model.vlreft[name]["modules_to_save"][KINDS[kind][2]]


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS_BL).logits


def gradients(reft):
    found = [parameter.grad for parameter in reft.parameters()]
    for parameter in reft.parameters():
        parameter.grad = None
    return found


def learn(model, reft):
    model(input_ids=IDS_BL, labels=CLASSES_B).loss.backward()
    return gradients(reft)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


# The base ------------------------------------------------------------------------------------------------------------


@both
def test_the_base_is_untouched_and_comes_back(kind):
    model = KINDS[kind][0]()
    base = logits_of(model)
    with untouched(model), torch.random.fork_rng():
        _, reft = attached(kind, model=model)
        assert logits_of(model).equal(base)  # a copy, and edits that start as the identity
        shake(reft)
        edited = logits_of(model)
        assert not edited.equal(base)
        with reft.disabled():
            assert logits_of(model).equal(base)
        assert logits_of(model).equal(edited)
        reft.detach()
        assert logits_of(model).equal(base)
    assert hooks_of_vlreft(model) == []


@both
def test_only_the_copy_and_the_interventions_train(kind):
    model, reft = attached(kind)
    head = KINDS[kind][2]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_head = {
        f"vlreft.default.modules_to_save.{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()
    }
    assert in_head < trainable
    assert all(name.startswith("vlreft.default.") for name in trainable)
    assert {id(p) for p in reft.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in learn(model, reft))
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


@both
@pytest.mark.parametrize("edits_train", [True, False])
def test_gradients_are_those_of_training_the_head_itself(kind, edits_train):
    build, _, head = KINDS[kind]
    plain = build()
    plain(input_ids=IDS_BL, labels=CLASSES_B).loss.backward()
    model, reft = attached(kind)
    reft.edits.requires_grad_(edits_train)
    model(input_ids=IDS_BL, labels=CLASSES_B).loss.backward()
    wanted = [parameter.grad for parameter in plain.get_submodule(head).parameters()]
    assert_same([parameter.grad for parameter in copy_in(model, kind).parameters()], wanted)
    assert all((parameter.grad is not None) == edits_train for parameter in reft.edits.parameters())


@both
def test_modes_reach_the_copy(kind):
    model, _ = attached(kind, model=KINDS[kind][0]().train())
    assert all(module.training for module in copy_in(model, kind).modules())
    model.eval()
    assert not any(module.training for module in copy_in(model, kind).modules())


def test_counts_are_apart_and_those_of_the_paper(capsys):
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        model = RobertaForSequenceClassification(config)
    reft = vlreft.attach(model, vlreft.ReftConfig(EDIT, modules_to_save=["classifier"]))
    assert (reft.num_parameters(), reft.num_module_parameters()) == (18_444, 592_130)
    reft.print_trainable_parameters()
    assert capsys.readouterr().out == (
        "trainable: 18,444 numbers in interventions, 0.0148 % of the base's 124,647,170; 592,130 in classifier\n"
    )
    reft.detach()
    assert vlreft.attach(model, vlreft.ReftConfig(EDIT)).num_module_parameters() == 0


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bfloat16", "moved later", "autocast"])
def test_the_copy_is_float32(how):
    model = llama_classifier()
    model = model.bfloat16() if how == "bfloat16" else model
    _, reft = attached("llama", model=model)
    model = model.bfloat16() if how == "moved later" else model
    shake(reft)
    seen = []
    model.score.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits_of(model)
    states, output = seen
    weight = copy_in(model, "llama").weight
    assert (weight.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    assert output.equal(F.linear(states.float(), weight).bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert {gradient.dtype for gradient in learn(model, reft)} == {torch.float32}


def test_a_float64_base_has_a_float64_copy():
    model, reft = attached("roberta", model=roberta().double())
    assert {parameter.dtype for parameter in copy_in(model, "roberta").parameters()} == {torch.float64}
    shake(reft)
    assert logits_of(model).dtype == torch.float64


# Several, copies, recomputation --------------------------------------------------------------------------------------


@both
def test_the_last_one_switched_on_wins(kind):
    model, first = attached(kind, "first")
    base = logits_of(model)
    shake(first, 1)
    one = logits_of(model)
    _, second = attached(kind, "second", model)
    assert not logits_of(model).equal(one)  # its copy is of the base's head, not of the first's
    with first.disabled():
        assert logits_of(model).equal(base)
    with second.disabled():
        assert logits_of(model).equal(one)
        with first.disabled():
            assert logits_of(model).equal(base)
    shake(second, 2)
    with first.disabled():
        two = logits_of(model)
    first.detach()
    assert logits_of(model).equal(two)
    second.detach()
    assert logits_of(model).equal(base)
    assert hooks_of_vlreft(model) == []


def test_an_adapter_without_a_head_goes_on_with_anothers():
    model, reft = attached("roberta")
    shake(reft)
    before = logits_of(model)
    other = vlreft.attach(model, vlreft.ReftConfig(EDIT), "other")
    assert logits_of(model).equal(before)
    other.detach()
    assert logits_of(model).equal(before)


@both
def test_copies_of_the_model_are_independent(kind):
    model, reft = attached(kind)
    base = logits_of(model)
    shake(reft)
    edited = logits_of(model)
    twin = copy.deepcopy(model)
    twin_reft = find_reft(twin)
    assert twin_reft is not None
    assert logits_of(twin).equal(edited)
    assert not {id(p) for p in twin_reft.parameters()} & {id(p) for p in model.parameters()}
    shake(twin_reft, 9)
    assert not logits_of(twin).equal(edited)
    assert logits_of(model).equal(edited)
    reft.detach()
    assert not logits_of(twin).equal(base)
    twin_reft.detach()
    assert logits_of(twin).equal(base)
    assert hooks_of_vlreft(twin) == []


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_keeps_the_gradients(kind, use_reentrant):
    model, reft = attached(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.train()
    plain = learn(model, shake(reft))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(learn(model, reft), plain)


@both
def test_accumulated_gradients_are_the_sum(kind):
    model, reft = attached(kind)
    singles = []
    for row in (slice(0, 2), slice(2, 4)):
        model(input_ids=IDS_BL[row], labels=CLASSES_B[row]).loss.backward()
        singles.append(gradients(reft))
    for row in (slice(0, 2), slice(2, 4)):
        model(input_ids=IDS_BL[row], labels=CLASSES_B[row]).loss.backward()
    assert_same(gradients(reft), [a + b for a, b in zip(*singles, strict=True)])


@pytest.mark.slow
@both
def test_compiled_models_follow(kind):
    model, reft = attached(kind)
    compiled = torch.compile(model, backend="eager")
    base = logits_of(model)
    plain = learn(model, shake(reft))
    edited = logits_of(model)
    assert logits_of(compiled).equal(edited)
    assert_same(learn(compiled, reft), plain)
    with reft.disabled():
        assert logits_of(compiled).equal(base)
    reft.detach()
    assert logits_of(compiled).equal(base)


def test_hooks_of_others_see_the_copys_output_and_do_not_ride_on_it():
    model, seen = roberta(), []
    model.classifier.register_forward_hook(lambda *call: seen.append(call[2]))
    _, reft = attached("roberta", model=model)
    shake(reft)
    logits = logits_of(model)
    assert len(seen) == 1
    assert seen[0].equal(logits)


def test_tied_parameters_inside_stay_tied(tmp_path):
    model = roberta(model=RobertaForMaskedLM, tie_word_embeddings=False)
    model.lm_head.decoder.bias = model.lm_head.bias
    reft = vlreft.attach(model, vlreft.ReftConfig(EDIT, "lm_head"))
    twin = model.vlreft["default"]["modules_to_save"]["lm_head"]
    assert twin.decoder.bias is twin.bias
    shake(reft).save_pretrained(tmp_path)
    logits = logits_of(model)
    reft.detach()
    vlreft.load(model, tmp_path)
    assert logits_of(model).equal(logits)


def test_an_edit_of_the_heads_input_reaches_the_copy():
    model = llama_classifier(num_labels=16)
    at_head = vlreft.Intervention("red", site="score", component="input", positions="prompt:all", init="reference")
    reft = vlreft.attach(model, vlreft.ReftConfig(at_head, "score"))
    seen = []
    model.score.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    logits_of(model)
    with reft.disabled():
        logits_of(model)
    with torch.no_grad():
        shake(reft)
        logits_of(model)
    assert not seen[4].equal(seen[2])
    assert seen[5].equal(copy_in(model, "llama")(seen[4]))


# A connector ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multi_modal_projector", "model.multi_modal_projector"])
def test_a_connector_is_trained_whole(name, tmp_path):
    model, batch = llava(), image_batch()
    base = model(**batch).logits
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("red", positions="question"), name))
    assert model(**batch).logits.equal(base)
    model.train()
    batch["labels"] = batch["input_ids"].where(batch["input_ids"] != 30, -100)
    batch["labels"][:, :-1] = -100
    model(**batch).loss.backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(reft)[2 * 3 :])
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[-100, -100, 5]])).loss.backward()
    assert all(gradient.abs().max() == 0 for gradient in gradients(reft)[2 * 3 :])
    model.eval()
    shake(reft).save_pretrained(tmp_path)
    edited, tokens = model(**batch).logits, model.generate(**image_batch(), max_new_tokens=2, do_sample=False)
    reft.detach()
    again = vlreft.load(model, tmp_path)
    assert model(**batch).logits.equal(edited)
    assert model.generate(**image_batch(), max_new_tokens=2, do_sample=False).equal(tokens)
    again.detach()
    del batch["labels"]
    assert model(**batch).logits.equal(base)


def test_the_prefix_is_not_reused_where_a_connector_is_trained(tmp_path):
    model = llava()
    vlreft.attach(model, vlreft.ReftConfig(LAST, "multi_modal_projector"))
    for reuse, text in (("auto", ""), (True, "goes with neither .* nor `modules_to_save`")):
        trainer = vlreft.ReftTrainer(model, arguments(tmp_path), reuse_prefix=reuse)
        if not text:
            assert trainer._prefix_reuse() is None
            continue
        with pytest.raises(ValueError, match=text):
            trainer._prefix_reuse()


# Refused -------------------------------------------------------------------------------------------------------------


def with_norm(model):
    model.classifier.dropout = nn.BatchNorm1d(16)
    return model


def quantised(model):
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)
    model.classifier.dense.weight.data = model.classifier.dense.weight.data.to(torch.int8)
    return model


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model.classifier, execution_device=torch.device("cpu"))
    return model


def the_same(model):
    return model


REFUSED = [
    (
        roberta, "score", the_same,
        r"RobertaForSequenceClassification has no module 'score'; it has 'roberta.embeddings', 'classifier', and every",
    ),
    (roberta, "dense", the_same, r"'dense' is 10 modules of .*'roberta.encoder.layer.0.output.dense', .* 2 more"),
    (roberta, "layer", the_same, "is a ModuleList, which is never called"),
    (roberta, "classifier.dropout", the_same, r"\(a Dropout\) has no parameters to train"),
    (roberta, "encoder", the_same, r"\(a RobertaEncoder\) contains site 'text' layer 0, which an intervention edits"),
    (roberta, "roberta.encoder.layer.1", the_same, r"\(a RobertaLayer\) contains site 'text' layer 1"),
    (roberta, ["classifier", "classifier.dense"], the_same, "and 'classifier' lie one inside the other"),
    (roberta, ["classifier.dense", "classifier"], the_same, "only the outer one would be heard"),
    (roberta, "classifier", with_norm, r"keeps more than parameters \('dropout.running_mean', .*batch normalisation"),
    (roberta, "classifier", quantised, r"is quantised: its 'dense.weight' is torch.int8"),
    (
        lambda: roberta(model=RobertaForMaskedLM), "lm_head", the_same,
        r"shares its 'decoder.weight' with 'roberta.embeddings.word_embeddings.weight'.*untie them",
    ),
    (lambda: llama(tie_word_embeddings=True), "embed_tokens", the_same, "shares its 'weight' with 'lm_head.weight'"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "modules", "change", "text"), REFUSED)
def test_refused(build, modules, change, text):
    model = change(build())
    with untouched(model), pytest.raises(ValueError, match=text):
        vlreft.attach(model, vlreft.ReftConfig(EDIT, modules))


def test_two_names_for_one_module_are_refused():
    model = llava()
    config = vlreft.ReftConfig(LAST, ["multi_modal_projector", "model.multi_modal_projector"])
    with untouched(model), pytest.raises(ValueError, match="is the module that 'multi_modal_projector' names too"):
        vlreft.attach(model, config)


def test_an_offloaded_module_is_refused():
    model = offloaded(roberta())
    with pytest.raises(ValueError, match="is offloaded, so there is nothing to copy"):
        attached("roberta", model=model)
    assert hooks_of_vlreft(model) == []


def test_refused_beside_other_adapters():
    model = roberta()
    vlreft.attach(model, vlreft.ReftConfig(EDIT, "classifier.dense"), "first")
    for config, text in (
        (vlreft.ReftConfig(EDIT, "classifier"), "and 'classifier.dense' lie one inside the other"),
        (
            vlreft.ReftConfig(vlreft.Intervention("red", site="classifier.dense", positions="prompt:all")),
            r"'classifier.dense' \(a Linear\) contains site 'classifier.dense' layer 0, which an intervention edits",
        ),
        (vlreft.ReftConfig(EDIT, "encoder"), "contains site 'text' layer 0"),
    ):
        with untouched(model), pytest.raises(ValueError, match=text):
            vlreft.attach(model, config, "second")


# The config and the checkpoint ---------------------------------------------------------------------------------------


def test_config_json_both_ways():
    config = vlreft.ReftConfig(EDIT, modules_to_save=["classifier", "model.multi_modal_projector"])
    assert vlreft.ReftConfig.from_dict(json.loads(config.to_json())) == config
    assert vlreft.ReftConfig(EDIT, "classifier").modules_to_save == ("classifier",)
    assert vlreft.ReftConfig(EDIT, "classifier") != vlreft.ReftConfig(EDIT)
    old = {"format_version": 1, "interventions": []}
    old["interventions"] = [
        {name: value for name, value in item.items() if name not in ("component", "heads", "groups")}
        for item in vlreft.ReftConfig(EDIT).to_dict()["interventions"]
    ]
    assert vlreft.ReftConfig.from_dict(old) == vlreft.ReftConfig(EDIT)
    with pytest.raises(ValueError, match=r"no keys \['modules_to_save'\]"):
        vlreft.ReftConfig.from_dict(old | {"modules_to_save": []})


@pytest.mark.parametrize("modules", [None, 3, [""], "", ["classifier", 3], [None]])
def test_config_refuses_what_is_no_name(modules):
    with pytest.raises(TypeError, match="`modules_to_save` must be names or paths of modules"):
        vlreft.ReftConfig(EDIT, modules)


def test_config_refuses_a_name_given_twice():
    with pytest.raises(ValueError, match=r"`modules_to_save` \(=\['a', 'a'\]\) names one twice"):
        vlreft.ReftConfig(EDIT, ["a", "a"])


@pytest.mark.parametrize("modules", ["classifier", None, {}])
def test_config_data_needs_a_list(modules):
    with pytest.raises(ValueError, match="needs a list under 'modules_to_save'"):
        vlreft.ReftConfig.from_dict(vlreft.ReftConfig(EDIT).to_dict() | {"modules_to_save": modules})


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_into_a_fresh_base(kind, dtype, tmp_path):
    build, _, head = KINDS[kind]
    model, reft = attached(kind, model=build().to(dtype))
    shake(reft).save_pretrained(tmp_path)
    fresh = build().to(dtype)
    assert not logits_of(fresh).equal(logits_of(model))
    again = vlreft.load(fresh, tmp_path)
    assert logits_of(fresh).equal(logits_of(model))
    assert again.config == reft.config
    own = {f"modules_to_save.{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()}
    assert load_file(tmp_path / WEIGHTS_NAME).keys() == own | set(numbers(reft))
    card = (tmp_path / CARD_NAME).read_text()
    assert f"{reft.num_parameters():,} numbers were trained." in card
    assert f"`{head}` was trained whole: {reft.num_module_parameters():,} numbers." in card


def test_paths_are_spelt_without_dots_in_the_checkpoint(tmp_path):
    model = llava()
    reft = vlreft.attach(model, vlreft.ReftConfig(LAST, "model.multi_modal_projector"))
    reft.save_pretrained(tmp_path)
    assert "modules_to_save.model/multi_modal_projector.linear_1.weight" in load_file(tmp_path / WEIGHTS_NAME)
    assert f"trained whole: {reft.num_module_parameters():,} numbers" in (tmp_path / CARD_NAME).read_text()


def rename(tensors):
    tensors["modules_to_save.classifier.other"] = tensors.pop("modules_to_save.classifier.dense.bias")


def reshape(tensors):
    tensors["modules_to_save.classifier.out_proj.bias"] = torch.zeros(3)


@pytest.mark.parametrize("how", ["load", "load_weights"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            rename,
            r"missing \['modules_to_save.classifier.dense.bias'\]; surplus \['modules_to_save.classifier.other'\]",
        ),
        (reshape, r"'modules_to_save.classifier.out_proj.bias' has shape \(3,\) in the file and \(2,\) in the base$"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, text, how, tmp_path):
    model, reft = attached("roberta")
    reft.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    fresh = roberta()
    with pytest.raises(ValueError, match=text), untouched(model if how == "load_weights" else fresh):
        reft.load_weights(tmp_path) if how == "load_weights" else vlreft.load(fresh, tmp_path)
    assert not hasattr(fresh, "vlreft")


def test_another_number_of_classes_is_refused_before_anything_is_attached(tmp_path):
    attached("roberta")[1].save_pretrained(tmp_path)
    fresh = roberta(num_labels=3)
    with (
        untouched(fresh),
        pytest.raises(ValueError, match=r"has shape \(2, 16\) in the file and \(3, 16\) in the base"),
    ):
        vlreft.load(fresh, tmp_path)


def test_a_base_without_the_head_is_refused(tmp_path):
    attached("roberta")[1].save_pretrained(tmp_path)
    fresh = roberta(model=RobertaForMaskedLM)
    with untouched(fresh), pytest.raises(ValueError, match="RobertaForMaskedLM has no module 'classifier'"):
        vlreft.load(fresh, tmp_path)


def test_a_head_counts_for_the_config_of_load_weights(tmp_path):
    attached("roberta")[1].save_pretrained(tmp_path)
    assert "classifier" in (tmp_path / CONFIG_NAME).read_text()
    reft = vlreft.attach(roberta(), vlreft.ReftConfig(EDIT))
    with pytest.raises(ValueError, match="has another config"):
        reft.load_weights(tmp_path)


# The trainer ---------------------------------------------------------------------------------------------------------

WORDS = ("a red circle", "the blue square", "circles", "is the square left of it?")


def arguments(folder, **options):
    defaults = {
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 7, "logging_steps": 1},
        **{
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
        },
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def accuracy(predicted):
    return {"accuracy": float((np.argmax(predicted.predictions, -1) == predicted.label_ids).mean())}


def error(predicted):
    return {"error": float(np.abs(predicted.predictions.squeeze(-1) - predicted.label_ids).max())}


def rows_of(kind, is_regression):
    """Label texts by their first word; in a decoder the last word has it, and the head reads that."""
    rows = []
    for i in range(16):
        mark = ("yes", "no")[i % 2]
        text = f"{mark} {WORDS[i // 2 % 4]}" if kind == "roberta" else f"{WORDS[i // 2 % 4]} {mark}"
        rows.append({"text": text, "label": float(i % 2) if is_regression else i % 2})
    tokenizer = text_tokenizer()
    rows = datasets.Dataset.from_list(rows).map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    return tokenizer, rows


def trainer_for(kind, folder, is_regression=False, **options):
    tokenizer, rows = rows_of(kind, is_regression)
    build, edit, head = KINDS[kind]

    def base():
        # RoBERTa counts positions from its pad token's id.
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": 512}
        return build(1 if is_regression else 2, pad_token_id=tokenizer.pad_token_id, **sizes)

    model = base()
    reft = vlreft.attach(model, vlreft.ReftConfig(edit, modules_to_save=[head]))
    trainer = vlreft.ReftTrainer(
        model,
        arguments(folder, **options),
        DataCollatorWithPadding(tokenizer),
        rows,
        rows,
        compute_metrics=error if is_regression else accuracy,
    )
    return base, reft, trainer


@pytest.mark.parametrize("is_regression", [False, True], ids=["classes", "numbers"])
@both
def test_a_head_learns_is_saved_and_loaded(kind, is_regression, tmp_path):
    base, reft, trainer = trainer_for(kind, tmp_path / "run", is_regression, num_train_epochs=40)
    head, before = KINDS[kind][2], base()
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_loss"] < 0.1 * first["eval_loss"]
    assert last["eval_error"] < 0.5 if is_regression else last["eval_accuracy"] == 1.0
    model = reft.model
    for name, tensor in before.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    assert not any(
        a.equal(b)
        for a, b in zip(copy_in(model, kind).parameters(), model.get_submodule(head).parameters(), strict=True)
    )
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = base()
    vlreft.load(fresh, tmp_path / "adapter")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.eval()
    with torch.no_grad():
        assert fresh(**batch).logits.equal(model(**batch).logits)
    reft.detach()
    with torch.no_grad():
        assert model(**batch).logits.equal(before(**batch).logits)


@both
def test_resumed_training_is_the_same_training(kind, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    _, whole, trainer = trainer_for(kind, tmp_path / "whole", **options)
    trainer.train()
    _, resumed, trainer = trainer_for(kind, tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert one.equal(other)


def test_the_best_head_comes_back(tmp_path):
    _, reft, trainer = trainer_for(
        "roberta", tmp_path, num_train_epochs=3, learning_rate=3.0, save_strategy="epoch", eval_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=3,
    )  # fmt: skip
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/{WEIGHTS_NAME}")
    for name, parameter in copy_in(reft.model, "roberta").named_parameters():
        assert parameter.equal(best[f"modules_to_save.classifier.{name}"])


def test_a_head_of_the_base_unfrozen_by_hand_is_refused(tmp_path):
    _, reft, trainer = trainer_for("roberta", tmp_path)
    reft.model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match=r"\(classifier.dense.weight, ...\).* name their module in `ReftConfig"):
        trainer.train()
