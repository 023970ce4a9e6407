"""Interchange, DAS and boundless DAS: laws of the edits and their sources, accuracy and the grid, pyvene's numbers."""

import gzip
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import hooks_of_vlreft
from family import SAMPLES, TEXT_ONLY, WITH_IMAGES, Sample
from PIL import Image
from processors import text_tokenizer, tiny_llava_model, tiny_llava_processor, tiny_text_model
from test_laws import DEFAULT_POSITIONS, LAYER, SITES, expected, indices
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zoo import FAMILIES, Spy, plain_rotation

import vlreft
from vlreft.causal import DAS, BoundlessDAS, Interchange
from vlreft.causes.interchange import InterchangeCollator, PatchGrid, interchange_accuracy, patch_grid
from vlreft.models.sites import find_sites

METHODS = ("interchange", "das", "boundless_das")
TEXTS = (Sample((5, 8, 11, 12, 13, 14), (20, 21)), Sample((6, 17, 18, 9), (22, 23, 24)))
OTHERS = (Sample((7, 9, 12, 11, 15), (20,)), Sample((6, 19, 10, 9, 8, 7, 5), (20,)))  # of other lengths
IMAGE_FAMILIES = [FAMILIES["llava"], FAMILIES["qwen2_5_vl"]]


def sourced(method="interchange", site="text", positions=None, **fields):
    """Make an intervention at the site's usual layer and positions."""
    positions = DEFAULT_POSITIONS[site] if positions is None else positions
    rank = fields.pop("rank", 3)
    layers = fields.pop("layers", LAYER[site])
    if method == "das":
        fields["rank"] = rank
    return vlreft.Intervention(method, site=site, layers=layers, positions=positions, init="reference", **fields)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def prompts(family, samples, **options):
    return family.batch(samples, answer=False, **options)


def others(samples):
    """Return other runs of the same form: another first word, other pictures."""
    return tuple(Sample((sample.prompt[0] + 3, *sample.prompt[1:]), sample.answer) for sample in samples)


def ends(batch):
    """Return each row's last real token."""
    places_BL = torch.arange(batch["attention_mask"].shape[1]) * batch["attention_mask"]
    return torch.arange(len(places_BL)), places_BL.argmax(1)


# The edits -----------------------------------------------------------------------------------------------------------


def states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    h_BTD, s_BTD = (100.0 * torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    return h_BTD.to(dtype), s_BTD.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_interchange_gives_the_sources_very_numbers(dtype):
    h_BTD, s_BTD = states(dtype)
    s_BTD[0] *= 1e-6  # which h + (s - h) would lose
    edit = Interchange(8, None, init="reference")
    assert edit(h_BTD, 1.0, s_BTD).equal(s_BTD)
    assert edit(h_BTD, 0.0, s_BTD).equal(h_BTD)
    half = edit(h_BTD, torch.tensor([[[0.5]], [[0.0]]]), s_BTD)
    torch.testing.assert_close(half[0], (h_BTD[0] + s_BTD[0]) / 2)
    assert half[1].equal(h_BTD[1])
    torch.testing.assert_close(Interchange(8, None, scale=0.5)(h_BTD, 1.0, s_BTD), (h_BTD + s_BTD) / 2)
    assert list(edit.parameters()) == []


def test_das_is_its_formula():
    h_BTD, s_BTD = states()
    edit = DAS(8, 3, init="reference")
    with torch.no_grad():
        edit.rotation.mul_(3.0).add_(0.1 * torch.randn(3, 8))
    r = plain_rotation(edit.rotation.detach())
    by_hand = h_BTD + (s_BTD @ r.T - h_BTD @ r.T) @ r
    torch.testing.assert_close(edit(h_BTD, 1.0, s_BTD), by_hand, atol=1e-3, rtol=1e-4)  # states are in the hundreds
    outside = torch.eye(8) - r.T @ r
    edited = edit(h_BTD, 1.0, s_BTD)
    torch.testing.assert_close(edited @ r.T, s_BTD @ r.T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(edited @ outside, h_BTD @ outside, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("boundary", [-0.5, 0.0, 0.3, 0.5, 1.0, 1.7])
def test_boundless_das_is_its_formula(boundary):
    h_BTD, s_BTD = states()
    edit = BoundlessDAS(8, None, init="reference")
    with torch.no_grad():
        edit.boundary.fill_(boundary)
    edit.temperature = 0.7
    q = plain_rotation(edit.rotation.detach())
    end = 8 * min(1.0, max(0.0, boundary))
    middles = torch.arange(8) + 0.5
    soft = torch.sigmoid((end - middles) / 0.7)
    hard = (torch.arange(8) < max(1, round(end))).float()
    for is_training, mask in ((True, soft), (False, hard)):
        edit.train(is_training)
        change = (((s_BTD - h_BTD) @ q.T) * mask) @ q
        torch.testing.assert_close(edit(h_BTD, 1.0, s_BTD), h_BTD + change, atol=1e-3, rtol=1e-4)
    assert edit.num_dimensions == int(hard.sum())


def test_the_soft_width_becomes_the_hard_one():
    h_BTD, s_BTD = states()
    edit = BoundlessDAS(8, None, init="reference")
    with torch.no_grad():
        edit.boundary.fill_(0.5)
    hard = edit.eval()(h_BTD, 1.0, s_BTD)
    edit.temperature = 0.02
    torch.testing.assert_close(edit.train()(h_BTD, 1.0, s_BTD), hard, atol=1e-3, rtol=1e-4)


def test_a_wider_subspace_gives_the_boundary_a_gradient():
    h_BTD, s_BTD = states(torch.float64)
    edit = BoundlessDAS(8, None, init="reference").double().train()
    edit.temperature = 2.0
    edit(h_BTD, 1.0, s_BTD).sum().backward()
    analytic, step = edit.boundary.grad.clone(), 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            edit.boundary.add_(sign * step)
            values.append(edit(h_BTD, 1.0, s_BTD).sum())
            edit.boundary.sub_(sign * step)
    torch.testing.assert_close(analytic, ((values[0] - values[1]) / (2 * step))[None], rtol=1e-5, atol=1e-6)
    assert analytic.abs() > 1e-3
    assert edit.rotation.grad.abs().max() > 1e-3


# Sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "site"), SITES)
@pytest.mark.parametrize("method", METHODS)
def test_the_base_as_its_own_source_changes_nothing(method, family, site, attached):
    batch = prompts(family, SAMPLES)
    model, reft = attached(family, sourced(method, site, layers="all" if site == "text" else LAYER[site]))
    with reft.disabled():
        base = logits(model, batch)
    with reft.sources(batch):
        found = logits(model, batch)
    assert found.equal(base)  # of das too: what is added is R of an exact zero


@pytest.mark.parametrize(("family", "site"), SITES)
def test_the_whole_basis_is_the_whole_state(family, site, lend, attached):
    base, source = prompts(family, SAMPLES), prompts(family, others(SAMPLES))
    width, found = find_sites(lend(family))[site].width, []
    for method in METHODS:
        model, reft = attached(family, sourced(method, site, rank=width))
        with torch.no_grad():
            for edit in reft.edits.values():
                if isinstance(edit, BoundlessDAS):
                    edit.boundary.fill_(1.0)
        with reft.sources(source):
            found.append(logits(model, base))
        with reft.disabled():
            assert (logits(model, base) - found[-1]).abs().max() > 1e-2
        reft.detach()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "site"), SITES)
def test_only_selected_tokens_change_and_become_the_sources(family, site, attached):
    base, source = prompts(family, SAMPLES), prompts(family, others(SAMPLES))
    model, reft = attached(family, sourced("interchange", site))
    block = family.blocks(model, site)[LAYER[site]]
    spied = {"of_input": site == "connector"}
    with Spy(block, **spied) as spy, reft.sources(source):
        logits(model, base)
    read, edited = spy.kept_after  # the source's run comes first, and nothing is edited in it
    assert spy.kept_after[0].equal(spy.kept[0])
    changed = (edited != spy.kept[1]).any(-1)
    places = changed if changed.dim() == 2 else changed[None]
    assert indices(places) == expected(family, site, DEFAULT_POSITIONS[site], SAMPLES)
    assert edited[changed].equal(read[changed])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_two_routes_to_the_sources_logits(family, lend, attached):
    """The last block's states are all that the head reads: exchanged there, a token says what the source's says."""
    base, source = prompts(family, SAMPLES), prompts(family, others(SAMPLES))
    last = len(family.blocks(lend(family), "text")) - 1
    model, reft = attached(family, sourced(layers=last, positions="prompt:l2"))
    with reft.disabled():
        plain, theirs = logits(model, base), logits(model, source)
    with reft.sources(source):
        found = logits(model, base)
    rows_B, ends_B = ends(base)
    for back in (0, 1):
        torch.testing.assert_close(found[rows_B, ends_B - back], theirs[rows_B, ends_B - back], atol=1e-6, rtol=1e-6)
    assert found[rows_B, ends_B - 2].equal(plain[rows_B, ends_B - 2])


@pytest.mark.parametrize("family", [FAMILIES["llama"], FAMILIES["gpt2"], FAMILIES["llava"]], ids=str)
@pytest.mark.parametrize("method", ["interchange", "das"])
def test_padding_and_company_do_not_matter(method, family, attached):
    """Sides of base and source, more pads, and rows one by one: the same answers."""
    samples, sources = (SAMPLES, others(SAMPLES)) if family.has_image else (TEXTS, OTHERS)
    model, reft = attached(family, sourced(method, positions="prompt:f1+l2"))
    found = []
    for side, source_side, pads in (("right", "right", 0), ("left", "right", 2), ("right", "left", 1)):
        base = prompts(family, samples, side=side)
        with reft.sources(prompts(family, sources, side=source_side, more_pads=pads)):
            found.append(logits(model, base)[ends(base)])
    for sample, source, row in zip(samples, sources, range(len(samples)), strict=True):
        with reft.sources(prompts(family, [source])):
            alone = logits(model, prompts(family, [sample]))[0, -1]
        for together in found:
            torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-5)


def test_sources_of_other_positions_and_one_for_each_intervention(attached):
    """The first selected token of the source goes to the first of the base."""
    family = FAMILIES["llama"]
    base, one, two = (prompts(family, samples) for samples in (TEXTS, OTHERS, others(TEXTS)))
    model, reft = attached(family, sourced(positions="f1"), sourced(positions="l1", layers=2))
    with Spy(family.blocks(model, "text")[1]) as first, reft.sources(one, "[2:3]"):
        logits(model, base)
    assert first.kept_after[1][:, 0].equal(first.kept[0][:, 2])
    with (
        Spy(family.blocks(model, "text")[1]) as first,
        Spy(family.blocks(model, "text")[2]) as last,
        reft.sources([one, two]),
    ):
        logits(model, base)
    assert first.kept_after[2][:, 0].equal(first.kept[0][:, 0])
    assert last.kept_after[2][ends(base)].equal(last.kept[1][ends(two)])


@pytest.mark.parametrize("family", IMAGE_FAMILIES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_picture_speaks_in_a_run_of_text(method, family, attached):
    """Sources have pictures and the base has none; what the model keeps between calls (M-RoPE) is no trouble."""
    base, source = prompts(family, TEXT_ONLY), prompts(family, WITH_IMAGES)
    model, reft = attached(family, sourced(method, layers=2, rank=32))
    with torch.no_grad():
        for edit in reft.edits.values():
            if isinstance(edit, BoundlessDAS):
                edit.boundary.fill_(1.0)
    with reft.disabled():
        plain, theirs = logits(model, base), logits(model, source)
    with reft.sources(source):
        with reft.scaled(0.0):
            assert logits(model, base).equal(plain)
        found = logits(model, base)
    torch.testing.assert_close(found[ends(base)], theirs[ends(source)], atol=1e-4, rtol=1e-4)
    assert logits_without(reft, model, base).equal(plain)


def logits_without(reft, model, batch):
    with reft.disabled():
        return logits(model, batch)


# Generation ----------------------------------------------------------------------------------------------------------

MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks of 3": {"prefill_chunk_size": 3},
    "two of each": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "base", "source"),
    [
        (FAMILIES["llama"], TEXTS, OTHERS),
        (FAMILIES["llava"], SAMPLES, others(SAMPLES)),
        (FAMILIES["qwen2_5_vl"], TEXT_ONLY, WITH_IMAGES),
    ],
    ids=["llama", "llava", "qwen2_5_vl"],
)
def test_generation_gives_what_forwards_give(mode, family, base, source, attached):
    """Against forwards of each sample alone, over everything said so far; of beams, their scores."""
    model, reft = attached(family, sourced(positions="prompt:l2"))
    settings = family.generation(3, return_dict_in_generate=True, output_scores=True) | MODES[mode]
    with reft.sources(prompts(family, source)):
        found = model.generate(**prompts(family, base, side="left"), **settings)
    copies = MODES[mode].get("num_return_sequences", 1)
    answers = found.sequences[:, -3:].reshape(len(base), copies, 3)
    for number, (sample, other) in enumerate(zip(base, source, strict=True)):
        for ids in answers[number].tolist():
            logp = answer_logp(family, model, reft, sample, other, ids)
            if mode == "beams":
                torch.testing.assert_close(logp.sum() / 3, found.sequences_scores[number], atol=1e-4, rtol=1e-4)
            else:
                assert all(logp == logp_of_best(family, model, reft, sample, other, ids))
    with reft.disabled():
        plain = model.generate(**prompts(family, base, side="left"), **settings)
    assert not plain.sequences.equal(found.sequences)


def _answer(family, model, reft, sample, other, ids):
    """Return the log-probabilities of all words behind a prompt and each of the ids but the last."""
    batch = family.batch([Sample(sample.prompt, tuple(token - family.first_id for token in ids))])
    with reft.sources(prompts(family, [other])):
        scores_TV = logits(model, batch)[0, -len(ids) - 1 : -1].clone()
    logp_TV = scores_TV.log_softmax(-1)
    for token in family.generation().get("suppress_tokens", []):
        logp_TV[:, token] = -torch.inf
    return logp_TV


def answer_logp(family, model, reft, sample, other, ids):
    scores_TV = _answer(family, model, reft, sample, other, ids)
    return scores_TV.gather(1, torch.tensor(ids)[:, None])[:, 0]


def logp_of_best(family, model, reft, sample, other, ids):
    return _answer(family, model, reft, sample, other, ids).amax(1)


# What is no source ---------------------------------------------------------------------------------------------------


def test_no_source(attached):
    family = FAMILIES["llama"]
    model, reft = attached(family, sourced("das"))
    with pytest.raises(ValueError, match=r"site 'text' layer 1 .* `with reft.sources\(batch\)`"):
        logits(model, prompts(family, TEXTS))
    with reft.disabled():
        logits(model, prompts(family, TEXTS))
    with pytest.raises(ValueError, match="needs the states of a source"):
        Interchange(4, None)(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("source", "positions", "told"),
    [
        (OTHERS[:1], None, "the source has 1 rows at site 'text' layer 1 and the base 2"),
        ((*OTHERS, OTHERS[0]), None, "the source has 3 rows"),
        (
            OTHERS,
            "l1",
            "row 0: positions 'f2\\+l1' at site 'text' .* 3 tokens of the base and 1 of the source",
        ),
        ((Sample((5, 9), ()), OTHERS[1]), None, "row 0: .* 3 tokens of the base and 2 of the source"),
        (OTHERS, "nothing:l1", "'nothing' is no segment"),
    ],
)
def test_what_is_no_source(source, positions, told, attached):
    family = FAMILIES["llama"]
    model, reft = attached(family, sourced(positions="f2+l1", tied=True))
    base = prompts(family, TEXTS)
    before = logits_without(reft, model, base)
    with pytest.raises(ValueError, match=told), reft.sources(prompts(family, source), positions):
        logits(model, base)
    assert logits_without(reft, model, base).equal(before)


def test_as_many_sources_as_interventions(attached):
    _, reft = attached("llama", sourced(), sourced(layers=2))
    batch = prompts(FAMILIES["llama"], TEXTS)
    with pytest.raises(ValueError, match="3 sources were given for 2 interventions"), reft.sources([batch] * 3):
        pass


def test_sources_are_undone_after_an_exception(attached):
    family = FAMILIES["llama"]
    model, reft = attached(family, sourced())
    with pytest.raises(KeyError), reft.sources(prompts(family, OTHERS)):
        raise KeyError
    with pytest.raises(ValueError, match="there is none"):
        logits(model, prompts(family, TEXTS))


# Rows ----------------------------------------------------------------------------------------------------------------

WORDS = ("yes", "no", "red", "a blue square")


def text_rows(num_rows=5):
    return [
        {
            "question": f"is the circle {WORDS[i % 3]}?",
            "answer": WORDS[(i + 1) % 4],
            "source": {"question": f"what is in the picture{' today' * (i % 2)}?", "answer": "nothing"},
        }
        for i in range(num_rows)
    ]


def text_model():
    tokenizer = text_tokenizer(chat=True)
    model = tiny_text_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval(), InterchangeCollator(vlreft.Collator(tokenizer))


def test_batches_have_the_sources_prompts():
    _, collator = text_model()
    rows = text_rows(3)
    batch, prompt_batch = collator(rows), collator.prompts(rows)
    plain = collator.collator
    for made, whole in ((batch, plain(rows)), (prompt_batch, plain.prompts(rows))):
        sources = made.pop("sources")
        assert made.keys() == whole.keys()
        assert all(made[name].equal(whole[name]) for name in whole)
        expected_ids = plain.prompts([row["source"] for row in rows])
        for i, mask in enumerate(expected_ids["attention_mask"].bool()):
            count = int(mask.sum())
            assert sources["input_ids"][i, :count].equal(expected_ids["input_ids"][i][mask])
            assert sources["attention_mask"][i].tolist() == [1] * count + [0] * (len(mask) - count)
    assert collator.decode(prompt_batch["input_ids"], 0) == plain.decode(prompt_batch["input_ids"], 0)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a", "answer": "b"}, "row 1 of the batch has no mapping under `source`"),
        ({"question": "a", "answer": "b", "source": "c"}, "row 1 of the batch has no mapping under `source`"),
        ({"question": "a", "answer": "b", "source": {"answer": "c"}}, "the source of row 1 of the batch has the keys"),
    ],
)
def test_rows_without_a_source(row, told):
    _, collator = text_model()
    with pytest.raises(ValueError, match=told):
        collator([text_rows(1)[0], row])
    with pytest.raises(TypeError, match=r"must be a vlreft\.Collator, got InterchangeCollator"):
        InterchangeCollator(collator)


# Accuracy and the grid -----------------------------------------------------------------------------------------------


def test_accuracy_counts_what_greedy_generation_says():
    model, collator = text_model()
    reft = vlreft.attach(model, vlreft.ReftConfig(sourced(layers=1, positions="prompt:l3")))
    rows = text_rows(8)
    said = []
    for row in rows:
        batch = collator.prompts([row])
        with reft.sources(batch.pop("sources")):
            ids = model.generate(**batch, max_new_tokens=6, do_sample=False)
        said.append(collator.decode(ids, batch["input_ids"].shape[1])[0])
    assert interchange_accuracy(model, rows, collator) == 0.0
    heard = [row | {"answer": answer} for row, answer in zip(rows, said, strict=True)]
    ended = [len(collator.collator._bare_ids(answer)) < 6 for answer in said]
    for i in range(0, 8, 2):
        heard[i] = rows[i]
    right = sum(ended[1::2])
    for batch_size in (1, 3, 100):
        assert interchange_accuracy(model, heard, collator, batch_size=batch_size) == right / 8
    assert not model.training


def test_what_accuracy_refuses():
    model, collator = text_model()
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=2)))
    with pytest.raises(ValueError, match="'default' put in no states of a source"):
        interchange_accuracy(model, text_rows(), collator)
    reft.detach()
    with pytest.raises(ValueError, match="none are attached"):
        interchange_accuracy(model, text_rows(), collator)
    vlreft.attach(model, vlreft.ReftConfig(sourced()))
    with pytest.raises(TypeError, match=r"must be a vlreft\.InterchangeCollator, got Collator"):
        interchange_accuracy(model, text_rows(), collator.collator)
    with pytest.raises(ValueError, match="at least one row"):
        interchange_accuracy(model, [], collator)
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\)"):
        interchange_accuracy(model, text_rows(), collator, batch_size=0)


def heard_rows(model, collator, site="text", **fields):
    """Return rows whose answers one place of the model says, so that accuracies are neither all 0 nor all 1."""
    reft = vlreft.attach(model, vlreft.ReftConfig(sourced(site=site, **fields)))
    rows = []
    for row in text_rows(6):
        batch = collator.prompts([row])
        with reft.sources(batch.pop("sources")):
            ids = model.generate(**batch, max_new_tokens=1, do_sample=False)
        text = collator.decode(ids, batch["input_ids"].shape[1])[0]
        rows.append(row | {"answer": text or "yes"})
    reft.detach()
    return rows


def test_each_cell_of_the_grid_is_a_run_of_its_own():
    model, collator = text_model()
    rows, positions = heard_rows(model, collator, layers=1, positions="prompt:l1"), ["f1", "question:l2", "prompt:l1"]
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    grid = patch_grid(model, collator, rows, positions=positions, batch_size=4)
    handle.remove()
    num_layers = len(grid.layers)
    assert len(calls) == 2 * (1 + 1 + len(positions) * num_layers)
    assert hooks_of_vlreft(model) == []
    assert "vlreft" not in dict(model.named_children())
    assert grid.positions == tuple(positions)
    assert grid.num_rows == 6
    for row, text in enumerate(positions):
        for column, layer in enumerate(grid.layers):
            reft = vlreft.attach(model, vlreft.ReftConfig(sourced(layers=layer, positions=text, tied=True)))
            assert interchange_accuracy(model, rows, collator) == pytest.approx(float(grid.accuracy_PN[row, column]))
            effects = [logp(model, collator, reft, one) - logp(model, collator, None, one) for one in rows]
            assert sum(effects) / 6 == pytest.approx(float(grid.effect_PN[row, column]), abs=1e-4)
            reft.detach()
    assert grid.base_logp == pytest.approx(sum(logp(model, collator, None, one) for one in rows) / 6, abs=1e-4)
    assert grid.effect_PN.abs().max() > 0.02


def logp(model, collator, reft, row):
    batch = collator([row])
    labels, sources = batch.pop("labels"), batch.pop("sources")
    with ExitStack() as scopes:
        if reft is not None:
            scopes.enter_context(reft.sources(sources))
            batch["prompt_mask"] = labels < 0
        elif hooks_of_vlreft(model):
            from vlreft.reft import find_only_reft

            scopes.enter_context(find_only_reft(model).disabled())
        scores = logits(model, batch)[0, :-1].log_softmax(-1)
    places = (labels[0, 1:] >= 0).nonzero()[:, 0]
    return sum(float(scores[place, labels[0, place + 1]]) for place in places)


def test_the_grid_of_a_tower_and_its_picture():
    processor = tiny_llava_processor()
    model, collator = tiny_llava_model(processor), InterchangeCollator(vlreft.Collator(processor))
    rows = [
        {
            "image": Image.new("RGB", (40, 40), color),
            "question": "what is it?",
            "answer": "red",
            "source": {"image": Image.new("RGB", (40, 40), "red"), "question": "what is it?"},
        }
        for color in ("blue", "green")
    ]
    grid = patch_grid(model, collator, rows, positions=["cls", "patches"], site="vision")
    assert grid.layers == (0, 1)  # of three blocks, the last of which nobody reads
    assert grid.accuracy_PN.isnan().tolist() == [[False, True], [False, False]]  # nor the second's class token
    assert grid.effect_PN[1].abs().min() > 0.0
    figure = grid.plot()
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cls", "patches"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(layer) for layer in grid.layers]
    assert "accuracy" in bar.get_ylabel()
    assert "log-probability" in grid.plot("effect").axes[1].get_ylabel()
    with pytest.raises(ValueError, match=r"`what` \(='loss'\)"):
        grid.plot("loss")


def test_the_best_cell():
    tensors = {"accuracy_PN": [[0.5, 0.75], [0.75, torch.nan]], "effect_PN": [[9.0, 1.0], [2.0, torch.nan]]}
    grid = PatchGrid(
        site="text",
        component="output",
        layers=(3, 7),
        positions=("f1", "l1"),
        base_accuracy=0.0,
        base_logp=-1.0,
        num_rows=4,
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in tensors.items()},
    )
    assert grid.best == (3, "l1")
    assert len(grid.plot().axes[0].texts) == 3


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"positions": "l1"}, ValueError, "must be a list of position strings"),
        ({"positions": []}, ValueError, "must be a list of position strings"),
        ({"positions": ["l1"], "layers": 9}, ValueError, "9"),
        ({"positions": ["l1"], "site": "vision"}, ValueError, "vision"),
        ({"positions": ["patches"]}, ValueError, "patches"),
    ],
)
def test_what_the_grid_refuses(fields, error, told):
    model, collator = text_model()
    with pytest.raises(error, match=told):
        patch_grid(model, collator, text_rows(), **fields)
    with pytest.raises(ValueError, match="tokens of the base"):
        patch_grid(model, collator, text_rows(), positions=["prompt"])  # prompts of other lengths
    assert hooks_of_vlreft(model) == []
    assert "vlreft" not in dict(model.named_children())


# pyvene --------------------------------------------------------------------------------------------------------------

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "interchange.json.gz").read_bytes()))
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "gpt2": (GPT2LMHeadModel, GPT2Config)}


@pytest.mark.parametrize("name", KINDS)
def test_pyvenes_numbers(name):
    """Interchange and DAS at four components, several tokens, and tokens that stand elsewhere in the source."""
    recorded = GOLDEN["models"][name]
    kind, config = KINDS[name]
    model = kind(config(**recorded["config"])).eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in recorded["state"].items()})
    base, source = ({"input_ids": torch.tensor(GOLDEN[run])} for run in ("base", "source"))
    plain = torch.tensor(recorded["logits"])
    torch.testing.assert_close(logits(model, base), plain, atol=1e-5, rtol=0)  # another processor's kernels
    assert {case["method"] for case in recorded["cases"].values()} == {"interchange", "das"}
    for case in recorded["cases"].values():
        spelling = {
            run: "+".join(f"[{place}:{place + 1}]" for place in case[f"at_{run}"]) for run in ("base", "source")
        }
        rank = {"rank": len(case["numbers"]["rotation"])} if case["numbers"] else {}
        item = vlreft.Intervention(
            case["method"],
            layers=case["layer"],
            component=case["component"],
            positions=spelling["base"],
            tied=True,
            init="reference",
            **rank,
        )
        reft = vlreft.attach(model, vlreft.ReftConfig(item))
        with torch.no_grad():
            for parameter in reft.parameters():
                parameter.copy_(torch.tensor(case["numbers"]["rotation"]))
        with reft.sources(source, spelling["source"]):
            found = logits(model, base)
        theirs = torch.tensor(case["logits"])
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
        assert (theirs - plain).abs().max() > 0.1
        reft.detach()
