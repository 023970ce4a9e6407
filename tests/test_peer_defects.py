"""One test for each of the 31 defects that were found in other ReFT libraries: vlreft must not have them."""

import copy
import inspect
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from family import SAMPLES, TEXT_ONLY, Sample
from PIL import Image
from processors import pad_is_eos_tokenizer, tiny_llava_model, tiny_llava_processor, tiny_text_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification, TrainingArguments
from zoo import FAMILIES, INTERVENTIONS, Spy, intervention, plain_positions, plain_rotation, shake, token_loss

import vlreft
from vlreft.edit import orthonormal_rows
from vlreft.interventions import INTERVENTIONS as LIBRARY_INTERVENTIONS
from vlreft.running import streams

LLAMA, LLAVA, QWEN = FAMILIES["llama"], FAMILIES["llava"], FAMILIES["qwen2_5_vl"]
ROTATED = ("loreft", "direft", "consreft", "lobireft")
loreft = partial(intervention, "loreft", layers=1)


def edited_places(spy: Spy, call: int = 0) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in spy.edited(call)]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **more})


def numbers(reft: vlreft.Reft) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in reft.parameters()]


@pytest.mark.parametrize("decay", [0.01, 10.0])
@pytest.mark.parametrize("method", ROTATED)
def test_defect_01_weight_decay_keeps_rotation(method, decay, attached):
    """A parametrisation that reads the sign of a stored diagonal turns R into zero at the first decayed step."""
    model, reft = attached("llama", intervention(method, layers=1, positions="l1"))
    batch = LLAMA.batch(TEXT_ONLY)
    optimizer = torch.optim.AdamW(reft.parameters(), lr=1e-2, weight_decay=decay)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (edit,) = reft.edits.values()
    r_RD = orthonormal_rows(edit.rotation)
    torch.testing.assert_close(r_RD @ r_RD.T, torch.eye(3), rtol=0, atol=1e-5)
    with torch.no_grad():
        edited = model(**batch).logits
        with reft.disabled():
            assert (model(**batch).logits - edited).abs().max() > 1e-3


class Largest(TorchDispatchMode):
    """Remember the most numbers that any operation's result held."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, tuple | list) else (result,)
        self.numel = max([self.numel, *(item.numel() for item in several if isinstance(item, Tensor))])
        return result


@pytest.mark.parametrize("method", ROTATED)
def test_defect_02_nothing_is_as_large_as_width_squared(method):
    """An orthogonal parametrisation keeps, and computes with, a matrix of the width squared for a thin R."""
    width, rank = 4096, 4
    init = INTERVENTIONS[method].fields.get("init", "identity")
    edit = LIBRARY_INTERVENTIONS[method](width, rank, init=init)
    assert list(edit.buffers()) == []
    assert sum(parameter.numel() for parameter in edit.parameters()) <= 32_772
    with Largest() as largest:
        edit(torch.randn(2, width)).sum().backward()
    assert largest.numel <= rank * width


@pytest.mark.parametrize("method", ROTATED)
def test_defect_03_checkpoint_holds_trained_numbers_only(method, attached, tmp_path):
    """The square buffer of the parametrisation went to disk for most kinds of intervention."""
    _, reft = attached("llama", intervention(method, layers=1, positions="l1"))
    reft.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "reft_model.safetensors")
    assert {name: tensor.numel() for name, tensor in stored.items()} == {
        name: parameter.numel() for name, parameter in reft.edits.named_parameters()
    }
    assert sum(tensor.numel() for tensor in stored.values()) <= 2 * 3 * 32 + 3


def test_defect_04_prefix_is_not_edited_at_decode_steps(attached):
    """With a cache each decode step looks like position 0, so a prefix edit fired at every generated token."""
    model, _ = attached("llama", loreft(positions="f1"))
    batch = LLAMA.batch(TEXT_ONLY[1:], answer=False)
    with Spy(LLAMA.blocks(model, "text")[1]) as spy:
        cached = model.generate(**batch, **LLAMA.generation(6))
    assert edited_places(spy, 0) == [[0]]
    assert all(edited_places(spy, call) == [[]] for call in range(1, 6))
    assert cached.equal(model.generate(**batch, **LLAMA.generation(6, use_cache=False)))


@pytest.mark.parametrize("positions", ["l4", "f4", "f4+l4"])
def test_defect_05_suffix_and_left_padded_prefix_generate(positions, attached):
    """Suffix positions were out of bounds at the first decode step, and so were prefixes behind left padding."""
    model, _ = attached("llama", loreft(positions=positions))
    batch = LLAMA.batch(TEXT_ONLY, side="left", answer=False)
    with Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model.generate(**batch, **LLAMA.generation())
    pads = (batch["attention_mask"] == 0).sum(1).tolist()
    rows = zip(TEXT_ONLY, pads, strict=True)
    wanted = [[pad + i for i in plain_positions(positions, LLAMA.tokens(sample, answer=False))] for sample, pad in rows]
    assert edited_places(spy) == wanted


def test_defect_06_suffix_is_of_the_prompt_not_of_the_answer(attached):
    """Training edited the last tokens of the whole sequence, the answer's, and generation the prompt's."""
    model, _ = attached("llama", loreft(positions="l2"))
    sample = TEXT_ONLY[1]
    with torch.no_grad(), Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model(**LLAMA.batch([sample]))
        model.generate(**LLAMA.batch([sample], answer=False), **LLAMA.generation(1))
    assert edited_places(spy, 0) == edited_places(spy, 1) == [[4, 5]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["f4", "l4", "f4+l4"])
def test_defect_07_short_samples_are_edited_whole_and_pads_never(positions, side, attached):
    """A sample shorter than the suffix crashed on a negative index; one shorter than the prefix had its pads edited."""
    model, _ = attached("llama", loreft(positions=positions))
    short = Sample(prompt=(9, 10), answer=(20,))
    batch = LLAMA.batch([short, TEXT_ONLY[1]], side=side)
    with torch.no_grad(), Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model(**batch)
    first = int((batch["attention_mask"][0] == 0).sum()) if side == "left" else 0
    assert edited_places(spy)[0] == [first, first + 1]


def test_defect_08_tower_and_text_have_positions_of_their_own(attached):
    """Indices cached by the text stack were used in the vision tower: other sizes crashed, equal ones were wrong."""
    sites = [loreft(positions="l1"), loreft(site="vision", positions="patches:f1+l1", layers=0)]
    model, _ = attached("llava", *sites)
    samples = (SAMPLES[0], *TEXT_ONLY, SAMPLES[1], SAMPLES[0])  # five rows, two pictures, other widths
    with torch.no_grad():
        with Spy(LLAVA.blocks(model, "text")[1]) as text, Spy(LLAVA.blocks(model, "vision")[0]) as vision:
            model(**LLAVA.batch(samples))
        assert edited_places(text) == [plain_positions("l1", LLAVA.tokens(sample)) for sample in samples]
        assert edited_places(vision) == [[1, 4], [1, 4]]
        with Spy(LLAVA.blocks(model, "vision")[0]) as alone:  # the tower by itself, outside of any forward
            model.get_image_features(pixel_values=LLAVA.batch(samples)["pixel_values"])
    assert alone.after[0].equal(vision.after[0])


@pytest.mark.parametrize("order", ["red vector", "vector red"])
def test_defect_09_all_attached_sets_act_in_order(order, attached):
    """Of a stack of adapters only the first ran, without an error."""
    model, refts = None, {}
    for method in order.split():
        item = intervention(method, layers=1, positions="f2")
        model, refts[method] = attached("llama", item, name=method)
    assert model is not None
    with torch.no_grad(), Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model(**LLAMA.batch(TEXT_ONLY))
        with refts["red"].disabled():
            model(**LLAMA.batch(TEXT_ONLY))
    parameters = {
        method: {name: p.detach() for edit in reft.edits.values() for name, p in edit.named_parameters()}
        for method, reft in refts.items()
    }
    h = spy.before[0][:, :2]
    for method in order.split():
        h = INTERVENTIONS[method].plain(h, parameters[method])
    torch.testing.assert_close(spy.after[0][:, :2], h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spy.after[1][:, :2], spy.before[1][:, :2] + parameters["vector"]["vector"])


def test_defect_10_eval_reaches_the_interventions(attached):
    """`eval()` of the wrapper reached the base only, so dropout stayed on, and it returned None."""
    model, reft = attached("llama", loreft(dropout=0.9))
    batch = LLAMA.batch(TEXT_ONLY, answer=False)
    assert model.train() is model
    assert all(edit.training for edit in reft.edits.values())
    assert model.eval() is model
    with torch.no_grad():
        assert model(**batch).logits.equal(model(**batch).logits)


def test_defect_11_dropout_spares_the_residual_stream():
    """Dropout was applied to the state with its edit, so that it dropped the state itself."""
    edit = LIBRARY_INTERVENTIONS["vector"](2000, None, dropout=0.5).train()
    with torch.no_grad():
        edit.vector.fill_(1.0)
        h = torch.full((2000,), 5.0)
        values = edit(h).unique().tolist()
    assert values == [5.0, 7.0]


def test_defect_12_forwards_keep_the_hooks_of_others(attached, lend):
    """Each call of the wrapper deleted every hook in the base, whoever had put it there."""
    model, calls = lend("llama"), []
    handles = [
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for module in model.modules()
        if not list(module.children())
    ]
    attached("llama", loreft())
    batch = LLAMA.batch(TEXT_ONLY, answer=False)
    model(**batch)
    first = list(calls)
    calls.clear()
    model.generate(**batch, **LLAMA.generation(1))
    model(**batch)
    assert len(first) >= len(handles)
    assert calls[-len(first) :] == first
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_defect_13_checkpointing_has_the_gradient(use_reentrant, attached, lend):
    """Hooks that were gone by the time of the backward pass gave no gradient, or none that could be recomputed."""
    model = copy.deepcopy(lend("llama"))
    _, reft = attached("llama", loreft(layers="all"), model=model)
    model.train()
    found = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**LLAMA.batch(TEXT_ONLY)).loss.backward()
        found.append([parameter.grad for parameter in reft.parameters()])
        model.zero_grad()
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain)


def test_defect_14_each_row_gets_its_own_edit_whatever_the_batch(attached):
    """Locations given for one batch were used for another: the first row's edited state was written into all rows."""
    model, reft = attached("llama", loreft(positions="l1"))
    one, two = LLAMA.batch(TEXT_ONLY[:1], answer=False), LLAMA.batch(TEXT_ONLY, answer=False)
    with torch.no_grad(), Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model(**one)
        model(**two)
        assert edited_places(spy, 1) == [[3], [5]]
        assert not spy.after[1][0, 3].equal(spy.after[1][1, 5])
        torch.testing.assert_close(spy.after[0][0, 3], spy.after[1][0, 3], rtol=1e-5, atol=1e-5)
        with reft.prompt(two["input_ids"], two["attention_mask"]), pytest.raises(ValueError, match="rows"):
            model(**LLAMA.batch((*TEXT_ONLY, TEXT_ONLY[0]), answer=False))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_defect_15_beams_and_several_sequences_need_no_help(options, attached):
    """Beam search and several sequences failed for batches unless locations were repeated by hand."""
    model, _ = attached("llama", loreft(positions="f1+l1"))
    batch = LLAMA.batch(TEXT_ONLY, side="left", answer=False)
    with Spy(LLAMA.blocks(model, "text")[1]) as spy:
        output = model.generate(**batch, **{**LLAMA.generation(num_return_sequences=2), **options})
    assert output.shape[0] == 4
    copies = options.get("num_beams", 2)
    assert edited_places(spy) == [[2, 5]] * copies + [[0, 5]] * copies


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_defect_16_generate_edits_the_prompt_by_itself(options, attached):
    """The prompt was whatever the first hook call saw, and editing it took an extra argument."""
    model, _ = attached("llama", loreft(positions="f1+l1"))
    batch = LLAMA.batch(TEXT_ONLY[1:], answer=False)
    with Spy(LLAMA.blocks(model, "text")[1]) as spy:
        got = model.generate(**batch, **LLAMA.generation(5, **options))
    first_calls = torch.cat([spy.edited(call)[0] for call in range(len(spy.after))])[:6]
    assert first_calls.nonzero()[:, 0].tolist() == [0, 5]
    assert got.equal(model.generate(**batch, **LLAMA.generation(5)))


def test_defect_17_tied_means_the_same_weights_on_each_own_state(attached):
    """Linked interventions fed the first place's output to the second one."""
    model, tied = attached("llama", loreft(positions="f1+l1", tied=True))
    assert [tuple(p.shape) for p in tied.parameters()] == [(3, 32), (3, 32), (3,)]
    batch = LLAMA.batch(TEXT_ONLY)
    with torch.no_grad():
        logits = model(**batch).logits
        values = numbers(tied)
        tied.detach()
        _, untied = attached("llama", loreft(positions="f1+l1"))
        for parameter, value in zip(untied.parameters(), values * 2, strict=True):
            parameter.copy_(value)
        torch.testing.assert_close(model(**batch).logits, logits)


def test_defect_18_indices_are_made_once_where_the_states_are(attached, lend, monkeypatch):
    """Index tensors went to the first device of a split model, anew at each layer, by way of Python lists."""
    model = copy.deepcopy(lend("llama"))
    start, calls, original = torch.random.get_rng_state(), [], streams.select
    monkeypatch.setattr(streams, "select", lambda *args: calls.append(args) or original(*args))
    _, reft = attached("llama", loreft(layers="all", positions="l2"), model=model)
    batch = LLAMA.batch(TEXT_ONLY)
    with torch.no_grad():
        logits = model(**batch).logits
    assert len(calls) == 1
    reft.detach()
    torch.random.set_rng_state(start)
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))  # the blocks' own parameters are on no device now
    attached("llama", loreft(layers="all", positions="l2"), model=offloaded)  # shaken to the same numbers again
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**batch).logits, logits)


@pytest.mark.parametrize("site", ["text", "vision", "connector"])
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=str)
def test_defect_19_blocks_are_found_where_this_transformers_has_them(family, site, attached):
    """A table of module paths was written for another version of transformers and found nothing."""
    positions = {"text": "prompt", "vision": "patches", "connector": "image"}[site]
    model, reft = attached(family, loreft(site=site, layers=0, positions=positions))
    batch = family.batch(SAMPLES)
    model(**batch).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in reft.parameters())
    with torch.no_grad():
        edited = model(**batch).logits
        with reft.disabled():
            assert not model(**batch).logits.equal(edited)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_defect_20_last_token_of_the_prompt_is_among_the_last(num, attached):
    """An exclusive range that ended one too early never edited the token that the answer is read from."""
    model, _ = attached("llama", loreft(positions=f"l{num}"))
    with torch.no_grad(), Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model(**LLAMA.batch(TEXT_ONLY))
    assert [max(row) for row in edited_places(spy)] == [3, 5]


def test_defect_21_batches_have_no_sink_and_keep_real_ends():
    """A pad was put before each training sample, and masks made from ids hid real end tokens where pad is end."""
    tokenizer = pad_is_eos_tokenizer()
    model = tiny_text_model(tokenizer)
    collator = vlreft.Collator(tokenizer)
    rows = [{"question": "how many circles?", "answer": "two"}, {"question": "what is in the picture?", "answer": "a"}]
    training, prompts = collator(rows), collator.prompts(rows)
    shake(vlreft.attach(model, vlreft.ReftConfig(loreft(positions="f1+l1"))))
    with torch.no_grad(), Spy(model.model.layers[1]) as spy:
        model(**training)
        model(**prompts)
    for row in range(2):
        real = training["attention_mask"][row].bool()
        ids, labels = training["input_ids"][row][real], training["labels"][row][real]
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        assert ids[labels == -100].equal(prompt)
        assert ids[0] == tokenizer.bos_token_id
        num_pads = int((prompts["attention_mask"][row] == 0).sum())
        assert edited_places(spy, 0)[row] == [0, len(prompt) - 1]
        assert edited_places(spy, 1)[row] == [num_pads, num_pads + len(prompt) - 1]


@pytest.mark.parametrize("positions", ["f2", "l2", "f2+l2", "l1+f3", "f1+l1+uniform2", "l3+uniform3", "[1:4]+f2"])
def test_defect_22_groups_are_named_not_counted(positions, attached):
    """The first half of the interventions was taken for the prefix's and the second for the suffix's."""
    model, reft = attached("llama", intervention("vector", layers=[0, 1], positions=positions), is_shaken=False)
    parts = positions.split("+")
    assert list(reft.edits) == [f"0:text:{layer}:{part}" for layer in (0, 1) for part in parts]
    taken: set[int] = set()
    sample = TEXT_ONLY[1]
    for part in parts:
        with torch.no_grad():
            for name, edit in reft.edits.items():
                edit.vector.fill_(1.0 if name.endswith(f":{part}") else 0.0)
            with Spy(LLAMA.blocks(model, "text")[1]) as spy:
                model(**LLAMA.batch([sample]))
        # Six tokens are enough for all: nothing has to be shared.
        wanted = set(plain_positions(part, LLAMA.tokens(sample))) - taken
        assert set(edited_places(spy)[0]) == wanted
        taken |= wanted


def test_defect_23_training_sees_the_pictures(tmp_path):
    """The trainer handed on the ids and the mask and dropped the pixels."""
    processor = tiny_llava_processor()
    model = tiny_llava_model(processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    sites = [loreft(positions="question:l1"), loreft(site="vision", positions="patches")]
    reft = vlreft.attach(model, vlreft.ReftConfig(sites))
    before = numbers(reft)
    rows = [
        {"question": "what is in the picture?", "answer": colour, "image": Image.new("RGB", (28, 28), colour)}
        for colour in ("red", "blue")
    ]
    trainer = vlreft.ReftTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows, data_collator=vlreft.Collator(processor)
    )
    trainer.train()
    # The first step moves the bias and W off the identity, the second one R.
    assert all(not now.equal(then) for now, then in zip(reft.parameters(), before, strict=True))


def test_defect_24_trainer_trains_and_evaluates_a_classifier(tmp_path, lend):
    """A loss function without the trainer's newer arguments, and an evaluation that no longer ran."""
    config = copy.deepcopy(lend("llama").config)
    config.num_labels = 2
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    reft = vlreft.attach(model, vlreft.ReftConfig(loreft(positions="l1")))
    before = numbers(reft)
    rows = [
        {
            "input_ids": torch.tensor([5, 6, 7, number]),
            "attention_mask": torch.ones(4, dtype=torch.long),
            "labels": number % 2,
        }
        for number in range(8, 12)
    ]
    settings = arguments(tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False)
    trainer = vlreft.ReftTrainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert any(not now.equal(then) for now, then in zip(reft.parameters(), before, strict=True))
    assert trainer.evaluate()["eval_loss"] > 0
    assert "num_items_in_batch" in inspect.signature(trainer.compute_loss).parameters


def test_defect_25_loaded_numbers_go_into_the_same_parameters(attached, tmp_path):
    """Loading made new parameters, so that an optimiser made before it trained dead ones."""
    model, reft = attached("llama", loreft())
    optimizer = torch.optim.AdamW(reft.parameters(), lr=1e-2)
    reft.save_pretrained(tmp_path)
    saved = numbers(reft)
    shake(reft, seed=11)
    reft.load_weights(tmp_path)
    assert all(now.equal(then) for now, then in zip(reft.parameters(), saved, strict=True))
    model(**LLAMA.batch(TEXT_ONLY)).loss.backward()
    optimizer.step()
    assert all(not now.equal(then) for now, then in zip(reft.parameters(), saved, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in reft.parameters())


def test_defect_26_training_starts_from_the_base(attached, lend):
    """LoReFT began with a change of a third of the state's length."""
    batch = LLAVA.batch(SAMPLES)
    with torch.no_grad():
        base = lend("llava")(**batch).logits
        model, _ = attached("llava", loreft(layers="all", positions="all"), is_shaken=False)
        assert model(**batch).logits.equal(base)


def test_defect_27_training_and_generation_edit_the_same_tokens_and_see_pictures(attached):
    """Training edited every token, generation only the generated ones, both without the picture."""
    model, reft = attached("llava", loreft(positions="question:f1+l1"))
    sample = SAMPLES[0]
    batch, other = LLAVA.batch([sample]), LLAVA.batch([sample])
    other["pixel_values"] = other["pixel_values"] + 1.0
    with torch.no_grad(), Spy(LLAVA.blocks(model, "text")[1]) as spy:
        loss = model(**batch).loss
        model.generate(**LLAVA.batch([sample], answer=False), **LLAVA.generation(2))
        assert (
            edited_places(spy, 0) == edited_places(spy, 1) == [plain_positions("question:f1+l1", LLAVA.tokens(sample))]
        )
        assert not model(**other).loss.equal(loss)
        with reft.disabled():
            assert not model(**batch).loss.equal(loss)
        assert model(**batch).loss.equal(loss)


def test_defect_28_no_prompt_has_a_length_of_its_own(attached):
    """Offsets of the prompt and the picture were constants, and a prompt's length was the whole conversation's."""
    model, _ = attached("llava", loreft(positions="question:f1+l1"))
    longer = Sample((9, 8, 7, *SAMPLES[0].prompt, 18, 19), SAMPLES[0].answer)
    with torch.no_grad(), Spy(LLAVA.blocks(model, "text")[1]) as spy:
        model(**LLAVA.batch((*SAMPLES, longer)))
    # One picture of four tokens after two of text; none; two pictures; the first again, three tokens later.
    assert edited_places(spy) == [[6, 11], [0, 3], [10, 12], [9, 16]]


def test_defect_29_edit_reads_the_state_and_misfits_are_errors(attached):
    """W was applied to Rh rather than to h; where shapes did not fit all tokens were edited without a word."""
    model, reft = attached("llama", loreft(positions="f1"))
    batch = LLAMA.batch(TEXT_ONLY)
    with torch.no_grad(), Spy(LLAMA.blocks(model, "text")[1]) as spy:
        model(**batch)
    (edit,) = reft.edits.values()
    r_RD, h = plain_rotation(edit.rotation.detach()), spy.before[0][:, 0]
    source = h @ edit.weight.detach().T + edit.bias.detach()
    torch.testing.assert_close(spy.after[0][:, 0], h + (source - h @ r_RD.T) @ r_RD, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, :-1]})
    model.train()
    del batch["labels"]
    with pytest.raises(ValueError, match="where the prompt ends"):
        token_loss(model(**batch).logits, batch["input_ids"])


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_defect_30_every_field_is_saved(method, attached, tmp_path):
    """A switch that was no field was lost in saving, and the reloaded adapter was of another kind, with no error."""
    can_act = LIBRARY_INTERVENTIONS[method].uses_activation
    special = (
        {"init": "reference", "activation": "tanh"}
        if can_act
        else {"init": INTERVENTIONS[method].fields.get("init", "identity")}
    )
    item = intervention(method, positions="prompt:f1+l1", tied=True, dropout=0.25, scale=0.5, layers=(0, 2), **special)
    defaults = vlreft.Intervention("loreft", rank=1)
    unlike = {name for name, value in vars(item).items() if value != getattr(defaults, name)}
    assert unlike >= {"positions", "tied", "dropout", "scale", "layers"}
    model, reft = attached("llama", item)
    reft.save_pretrained(tmp_path)
    batch = LLAMA.batch(TEXT_ONLY)
    with torch.no_grad():
        logits = model(**batch).logits
        reft.detach()
        loaded = vlreft.load(model, tmp_path)
        assert loaded.config == vlreft.ReftConfig(item)
        assert model(**batch).logits.equal(logits)
    loaded.detach()


def test_defect_31_loading_runs_no_code_from_the_file(attached, lend, tmp_path, monkeypatch):
    """Weights were pickles, and a class named in the config was imported and made."""
    _, reft = attached("llama", loreft())
    reft.save_pretrained(tmp_path)
    reft.detach()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "reft_config.json",
        "reft_model.safetensors",
    ]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    vlreft.load(lend("llama"), tmp_path).detach()
    path = tmp_path / "reft_config.json"
    data = json.loads(path.read_text())
    data["interventions"][0]["method"] = "os.system"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="method"):
        vlreft.load(lend("llama"), tmp_path)
    (tmp_path / "reft_model.safetensors").rename(tmp_path / "reft_model.bin")
    data["interventions"][0]["method"] = "loreft"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"reft_model\.safetensors"):
        vlreft.load(lend("llama"), tmp_path)
