"""Generation agrees with the forward without a cache, in every mode that `generate` has, and edits the same tokens.

The reference is a loop written out here: one sample alone, the whole sequence run anew for each token, the prompt's end
said by `prompt_mask`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from family import PAD, SAMPLES, TEXT_ONLY, Family, Sample
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from zoo import FAMILIES, Spy, intervention, plain_positions

import vlreft
from vlreft.running.streams import Call, cache_in, cache_name

ROWS = tuple(FAMILIES.values())
MODES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks of 3": {"prefill_chunk_size": 3},
    "chunks, static cache": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}
POSITIONS = ("f2+l2", "question:l1", "all", "response", "response:f2")
NUM_TOKENS = 4

CASES = [
    pytest.param(family, positions, id=f"{family}-{positions}")
    for family in ROWS
    for positions in (*POSITIONS, *(("image:f1+l1",) if family.has_image else ()))
]


def items(family: Family, positions: str) -> list[vlreft.Intervention]:
    """Make a LoReFT at `positions` of two text blocks, and one at each other site."""
    others = {"vision": "patches", "connector": "image:f1+l1"}
    sites = [intervention("loreft", site=site, layers=0, positions=others[site]) for site in family.sites[1:]]
    return [intervention("loreft", layers=[0, 2], positions=positions), *sites]


@dataclass
class Greedy:
    """What the written-out loop gives for one sample: the answer's ids, and the logits each was chosen from."""

    ids: list[int]
    logits: list[Tensor]


def forced(family: Family, model: PreTrainedModel, sample: Sample, ids: Sequence[int]) -> Tensor:
    """Return the logits that precede each of `ids` after a prompt, by one forward without a cache."""
    numbers = tuple(token_id - family.first_id for token_id in ids)
    batch = family.batch([Sample(sample.prompt, numbers)])
    num_prompt = len(family.prompt_ids(sample))
    labels = batch.pop("labels")
    is_prompt = torch.arange(labels.shape[1])[None] < num_prompt
    with torch.no_grad():
        logits = model(**batch, prompt_mask=is_prompt, use_cache=False).logits
    return logits[0, num_prompt - 1 :]


def greedy_by_hand(family: Family, model: PreTrainedModel, sample: Sample, num_tokens: int = NUM_TOKENS) -> Greedy:
    found = Greedy([], [])
    for _ in range(num_tokens):
        logits = forced(family, model, sample, found.ids)[-1]
        allowed = logits.clone()
        allowed[list(family.image_tokens)] = -torch.inf
        found.logits.append(logits)
        found.ids.append(int(allowed.argmax()))
    return found


def generate(family: Family, model: PreTrainedModel, samples: Sequence[Sample], **options: Any) -> Any:
    """Generate from a left-padded batch, with the raw logits."""
    batch = family.batch(samples, side="left", answer=False, more_pads=options.pop("more_pads", 0))
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **family.generation(NUM_TOKENS, **wanted, **options))


def answers(output: Any) -> list[list[int]]:
    return output.sequences[:, -NUM_TOKENS:].tolist()


@pytest.mark.parametrize(("positions", "num_steps"), [("f2+l2", 1), ("response", NUM_TOKENS)])
def test_steps_behind_the_prompt_ask_for_no_tokens_unless_answers_are_edited(
    attached, monkeypatch, positions, num_steps
):
    family = FAMILIES["llama"]
    model, _ = attached(family, intervention("loreft", layers=[0, 2], positions=positions))
    calls, ask = [], Call.select

    def count(call, *args):
        calls.append(call)
        return ask(call, *args)

    monkeypatch.setattr(Call, "select", count)
    generate(family, model, TEXT_ONLY)
    assert len(set(map(id, calls))) == num_steps


# Modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "positions"), CASES)
def test_every_mode_agrees_with_the_forward_without_a_cache(family, positions, mode, attached):
    model, _ = attached(family, *items(family, positions))
    by_hand = [greedy_by_hand(family, model, sample) for sample in SAMPLES]
    output = generate(family, model, SAMPLES, **MODES[mode])
    assert answers(output) == [greedy.ids for greedy in by_hand]
    for step, logits_BV in enumerate(output.logits):
        wanted = torch.stack([greedy.logits[step] for greedy in by_hand])
        torch.testing.assert_close(logits_BV, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ROWS, ids=str)
def test_edits_change_what_is_generated(family, attached):
    """So that the agreements above are about something."""
    model, reft = attached(family, *items(family, "f2+l2"))
    edited = generate(family, model, SAMPLES)
    with reft.disabled():
        base = generate(family, model, SAMPLES)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(edited.logits[0], base.logits[0], strict=True))


@pytest.mark.parametrize(("family", "positions"), CASES)
def test_a_padded_batch_generates_what_its_rows_do_alone(family, positions, attached):
    model, _ = attached(family, *items(family, positions))
    together = generate(family, model, SAMPLES, more_pads=3)
    alone = [generate(family, model, [sample]) for sample in SAMPLES]
    assert answers(together) == [answers(one)[0] for one in alone]
    for step, logits_BV in enumerate(together.logits):
        torch.testing.assert_close(logits_BV, torch.cat([one.logits[step] for one in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dynamic cache", "no cache", "static cache"])
@pytest.mark.parametrize("positions", ["f2+l2", "response", "response:f2"])
@pytest.mark.parametrize("family", ROWS, ids=str)
def test_beams_score_as_the_forward_does(family, positions, mode, attached):
    model, _ = attached(family, *items(family, positions))
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 1.0, **MODES[mode]}
    output = generate(family, model, SAMPLES, output_scores=True, **options)
    rows = answers(output)
    assert rows == [row for s in SAMPLES for row in answers(generate(family, model, [s], **options))]
    for number, (ids, score) in enumerate(zip(rows, output.sequences_scores, strict=True)):
        logits = forced(family, model, SAMPLES[number // 2], ids)[:NUM_TOKENS]
        chosen = logits.log_softmax(-1)[range(NUM_TOKENS), ids]
        torch.testing.assert_close(score, chosen.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["f2+l2", "response:f2"])
@pytest.mark.parametrize("family", ROWS, ids=str)
def test_sampled_sequences_come_from_the_forwards_logits(family, positions, attached):
    model, _ = attached(family, *items(family, positions))
    output = generate(family, model, SAMPLES, num_return_sequences=3, **{"do_sample": True})
    for number, ids in enumerate(answers(output)):
        wanted = forced(family, model, SAMPLES[number // 3], ids)[:NUM_TOKENS]
        got = torch.stack([logits_BV[number] for logits_BV in output.logits])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["f2+l2", "question:l1", "response", "response:f2"])
@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "how"),
    [
        *((family, "prompt lookup") for family in ROWS),
        *((family, "assistant") for family in ROWS if not family.has_image),
    ],
    ids=str,
)
def test_assisted_decoding_changes_nothing(family, sample, positions, how, attached, lend):
    helps: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if how == "assistant":  # the base itself, whose guesses are often wrong
        helps = {"assistant_model": copy.deepcopy(lend(family))}
    model, _ = attached(family, *items(family, positions))
    wanted = greedy_by_hand(family, model, SAMPLES[sample], 8).ids
    batch = family.batch([SAMPLES[sample]], answer=False)
    got = model.generate(**batch, **family.generation(8, **helps))
    assert got[0, -8:].tolist() == wanted


@pytest.mark.parametrize("positions", ["f2+l2", "response:f2"])
@pytest.mark.parametrize(
    "family", [FAMILIES["llama"], pytest.param(FAMILIES["llava"], marks=pytest.mark.slow)], ids=str
)
def test_compiled_decoding_agrees(family, positions, attached, lend):
    """With a static cache `generate` compiles its decode steps on an accelerator; here it is made to on the CPU."""
    model, _ = attached(family, *items(family, positions), model=copy.deepcopy(lend(family)))
    wanted = generate(family, model, SAMPLES, cache_implementation="static")
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    got = generate(family, model, SAMPLES, cache_implementation="static", compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, torch._dynamo.utils.counters
    assert got.sequences.equal(wanted.sequences)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Which tokens ------------------------------------------------------------------------------------------------------


def edited_tokens(spy: Spy, row: int, first: int) -> set[int]:
    """Return the tokens edited in any call of a generation, counted from a row's first real one."""
    places, offset = set(), 0
    for call, after in enumerate(spy.after):
        places |= {offset + int(place) - first for place in spy.edited(call)[row].nonzero()}
        offset += after.shape[1]
    return places


@pytest.mark.parametrize("mode", ["dynamic cache", "static cache", "chunks of 3"])
@pytest.mark.parametrize(("family", "positions"), CASES)
def test_generation_edits_the_tokens_that_training_edits(family, positions, mode, attached):
    model, _ = attached(family, *items(family, positions))
    output = generate(family, model, SAMPLES)
    # Train on the very answers that it generates: then response tokens can be compared as well.
    samples = [
        Sample(sample.prompt, tuple(i - family.first_id for i in ids))
        for sample, ids in zip(SAMPLES, answers(output), strict=True)
    ]
    block = family.blocks(model, "text")[2]
    with Spy(block) as training:
        model.train()
        model(**family.batch(samples))
    model.eval()
    with Spy(block) as generation:
        generate(family, model, SAMPLES, **MODES[mode])
    width = max(len(family.prompt_ids(sample)) for sample in samples)
    for row, sample in enumerate(samples):
        num_prompt = len(family.prompt_ids(sample))
        trained = set(training.edited()[row].nonzero()[:, 0].tolist())
        assert trained == set(plain_positions(positions, family.tokens(sample)))
        # The last token is generated and never fed again.
        last = num_prompt + NUM_TOKENS - 1
        assert edited_tokens(generation, row, width - num_prompt) == trained - {last}


@pytest.mark.parametrize("family", ROWS, ids=str)
def test_decode_steps_are_left_alone_unless_response_is_selected(family, attached):
    for positions in ("all", "f2+l2", "response"):
        model, reft = attached(family, intervention("loreft", layers=2, positions=positions))
        with Spy(family.blocks(model, "text")[2]) as spy:
            generate(family, model, SAMPLES)
        assert len(spy.after) == NUM_TOKENS
        for call in range(1, NUM_TOKENS):
            assert spy.before[call].shape[1] == 1
            assert bool(spy.edited(call).all()) == (positions == "response")
            assert (spy.after[call] is spy.before[call]) == (positions != "response")
        assert bool(spy.edited(0).any()) == (positions != "response")
        reft.detach()


@pytest.mark.parametrize("positions", ["response", "response:f2", "f1+l1"])
@pytest.mark.parametrize("family", ROWS, ids=str)
def test_generated_logits_are_the_teacher_forced_ones_with_labels(family, positions, attached):
    model, _ = attached(family, *items(family, positions))
    output = generate(family, model, SAMPLES)
    ids = answers(output)
    samples = [Sample(s.prompt, tuple(i - family.first_id for i in row)) for s, row in zip(SAMPLES, ids, strict=True)]
    with torch.no_grad():
        logits = model(**family.batch(samples)).logits
    for row, sample in enumerate(samples):
        num_prompt = len(family.prompt_ids(sample))
        wanted = logits[row, num_prompt - 1 : num_prompt - 1 + NUM_TOKENS]
        got = torch.stack([logits_BV[row] for logits_BV in output.logits])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# Ways to call ------------------------------------------------------------------------------------------------------


def test_generate_takes_its_prompt_in_any_form(attached):
    family = FAMILIES["llama"]
    model, _ = attached(family, *items(family, "f2+l2"))
    batch, options = family.batch(TEXT_ONLY, side="left", answer=False), family.generation()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = model.generate(input_ids=ids, attention_mask=mask, **options)[:, -NUM_TOKENS:]
    embeds = model.get_input_embeddings()(ids)
    calls = (
        model.generate(ids, attention_mask=mask, **options),
        model.generate(inputs=ids, attention_mask=mask, **options),
        model.generate(inputs_embeds=embeds, attention_mask=mask, **options),
        model.generate(ids, **options),
    )
    for got in calls:
        assert got[:, -NUM_TOKENS:].equal(wanted)


@pytest.mark.parametrize("where", ["model", "call", "config of the call"])
@pytest.mark.parametrize("end", [None, 1, PAD, [1, PAD]], ids=str)
def test_without_a_mask_pads_are_what_generate_takes_for_pads(end, where, attached):
    family = FAMILIES["llama"]
    model, _ = attached(family, intervention("loreft", layers=2, positions="f2+l2"))
    own = copy.deepcopy(model.generation_config)
    ids = family.batch(TEXT_ONLY, side="left", answer=False)["input_ids"]
    settings = {"pad_token_id": PAD, "eos_token_id": end}
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
    if where == "model":
        model.generation_config.update(**settings)
    else:
        model.generation_config.update(pad_token_id=None, eos_token_id=None)
        if where == "call":
            options |= {name: value for name, value in settings.items() if value is not None}
        else:
            options = {"generation_config": copy.deepcopy(own)}
            options["generation_config"].update(max_new_tokens=1, do_sample=False, **settings)
    with Spy(family.blocks(model, "text")[2]) as spy:
        model.generate(ids, **options)
    model.generation_config = own
    pads_are_tokens = end == PAD or end == [1, PAD]
    for row in range(2):
        num_pads = 0 if pads_are_tokens else int((ids[row] == PAD).sum())
        real = ids.shape[1] - num_pads
        wanted = {num_pads, num_pads + 1, num_pads + real - 2, num_pads + real - 1}
        assert set(spy.edited()[row].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
def test_disabled_generation_is_the_bases(is_training, attached, lend):
    family = FAMILIES["llava"]
    model = lend(family)
    base = generate(family, model, SAMPLES)
    _, reft = attached(family, *items(family, "f2+l2"))
    model.train(is_training)
    with reft.disabled():
        output = generate(family, model, SAMPLES)
    for a, b in zip(output.logits, base.logits, strict=True):
        assert a.equal(b)
    assert not generate(family, model, SAMPLES).logits[0].equal(base.logits[0])


@pytest.mark.parametrize("positions", ["response:l2", "response:uniform3", "response:[-2:]"])
def test_generation_refuses_what_needs_the_answers_length(positions, attached):
    family = FAMILIES["llama"]
    model, reft = attached(family, *items(family, positions))
    with pytest.raises(ValueError, match="needs the answer's length"):
        generate(family, model, TEXT_ONLY)
    with reft.disabled():
        generate(family, model, TEXT_ONLY)


# Caches in the user's hands ------------------------------------------------------------------------------------------


def split(batch: Mapping[str, Tensor], at: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cut a batch in two along its tokens; the second part keeps the whole mask, as a cached forward wants it."""
    along = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids")
    first = {name: value[:, :at] if name in along else value for name, value in batch.items()}
    second = {name: batch[name][:, at:] for name in along if name in batch}
    return first, second | {"attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("positions", ["f2+l2", "question:l1", "response:f2"])
@pytest.mark.parametrize("family", [row for row in ROWS if row.name != "qwen2_5_vl"], ids=str)
def test_a_continued_cache_needs_to_be_told_the_prompt(family, positions, kind, attached):
    model, reft = attached(family, *items(family, positions))
    sample = SAMPLES[0]
    batch = family.batch([sample])
    labels = batch.pop("labels")
    num_prompt = len(family.prompt_ids(sample))
    with torch.no_grad():
        whole = model(**batch, prompt_mask=(labels != -100).cumsum(1) == 0).logits
        ids, mask = (batch[name][:, :num_prompt] for name in ("input_ids", "attention_mask"))
        for at in (num_prompt - 2, num_prompt, num_prompt + 1):
            first, second = split(batch, at)
            config = model.config.get_text_config()
            cache = (
                DynamicCache(config=config)
                if kind == "dynamic"
                else StaticCache(config, max_cache_len=2 * labels.shape[1])
            )
            with reft.prompt(ids, mask):
                before = model(**first, **{cache_name(model): cache}).logits
                after = model(**second, **{cache_name(model): cache}).logits
            torch.testing.assert_close(torch.cat([before, after], 1), whole, rtol=1e-5, atol=1e-5)
            with pytest.raises(ValueError, match="continues a cache"):
                model(**second, **{cache_name(model): cache})
            with reft.disabled():
                model(**second, **{cache_name(model): cache})


@pytest.mark.parametrize("family", [FAMILIES["llama"], FAMILIES["gpt2"]], ids=str)
def test_a_second_turn_continues_the_first_ones_cache(family, attached):
    """First tokens of the conversation stay what they were; the new turn is generated from the whole."""
    model, _ = attached(family, *items(family, "f2"))
    first = generate(family, model, SAMPLES[:1])
    more = torch.tensor([[31, 32, 33]])
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.ones_like(ids)
    options = family.generation(return_dict_in_generate=True, output_logits=True)
    anew = model.generate(ids, attention_mask=mask, **options)
    continued = model.generate(ids, attention_mask=mask, **{cache_name(model): cache_in(first.values())}, **options)
    assert continued.sequences.equal(anew.sequences)
    for a, b in zip(continued.logits, anew.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
