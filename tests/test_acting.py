"""For a while: strengths, adapters of rows, what is read of an adapter's places and what is recorded of its edits."""

import math

import pytest
import torch
from family import SAMPLES, TEXT_ONLY
from test_laws import LAYER, SITES, at
from zoo import FAMILIES, Spy, shake

import vlreft
from vlreft.reft import find_reft
from vlreft.running.endings import ending_behind

TWO = [FAMILIES["llama"], FAMILIES["llava"]]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# Strength ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "site"), SITES)
def test_strength_is_a_factor_of_the_configs_scale(family, site, attached):
    batch = family.batch(SAMPLES)
    model, reft = attached(family, at(site, scale=0.5))
    with reft.disabled():
        base = logits(model, batch)
    plain = logits(model, batch)
    with reft.scaled(-3.0):
        scaled = logits(model, batch)
        with reft.scaled(1):
            assert logits(model, batch).equal(plain)
        assert logits(model, batch).equal(scaled)
        with reft.scaled(0.0):
            assert logits(model, batch).equal(base)
    assert logits(model, batch).equal(plain)
    state = {name: parameter.detach().clone() for name, parameter in reft.edits.named_parameters()}
    reft.detach()
    _, other = attached(family, at(site, scale=-1.5))
    other.edits.load_state_dict(state)
    assert logits(model, batch).equal(scaled)


@pytest.mark.parametrize(("family", "site"), [case for case in SITES if not case.values[0].packed])
def test_each_row_has_its_strength(family, site, attached):
    """Rows of one picture each, since a row of a tower is a picture."""
    samples = (SAMPLES[0],) * 3 if family.has_image else (TEXT_ONLY[1],) * 3
    batch = family.batch(samples)
    model, reft = attached(family, at(site))
    rows = []
    for strength in (0.0, 1.0, -0.5):
        with reft.scaled(strength):
            rows.append(logits(model, batch)[len(rows)])
    for given in ([0.0, 1.0, -0.5], torch.tensor([0.0, 1.0, -0.5])):
        with reft.scaled(given):
            together = logits(model, batch)
        torch.testing.assert_close(together, torch.stack(rows), atol=1e-5, rtol=1e-5)
        with reft.disabled():
            assert together[0].equal(logits(model, batch)[0])


def test_strength_is_undone_after_an_exception(attached):
    batch = FAMILIES["llama"].batch(TEXT_ONLY)
    model, reft = attached("llama", at("text"))
    plain = logits(model, batch)
    with pytest.raises(KeyError), reft.scaled(0.0), reft.scaled(2.0):
        raise KeyError
    assert logits(model, batch).equal(plain)


def test_strength_reaches_the_gradient(attached):
    batch = FAMILIES["llama"].batch(TEXT_ONLY)
    model, reft = attached("llama", at("text", "vector", "prompt:l2", layers=2), is_shaken=False)
    found = []
    for strength in (1.0, 0.5, 0.0, [0.5, 0.0], [0.0, 0.5], [0.0, 0.0]):
        with reft.scaled(strength):
            model(**batch).loss.backward()
        found.append(next(reft.parameters()).grad.clone())
        next(reft.parameters()).grad = None
    torch.testing.assert_close(found[1], 0.5 * found[0], atol=1e-6, rtol=1e-5)  # at zero the model does not know of it
    assert not found[2].any()
    assert not found[5].any()
    assert found[3].any()
    torch.testing.assert_close(found[3] + found[4], found[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("strength", "error", "text"),
    [
        (math.nan, ValueError, "must be finite"),
        ([1.0, math.inf], ValueError, "must be finite"),
        ("1", TypeError, "must be a number, or one for each row"),
        (None, TypeError, "must be a number, or one for each row"),
        (True, TypeError, "must be a number, or one for each row"),
        ([], ValueError, "one for each row"),
        ([[1.0], [2.0]], ValueError, r"one for each row of the batch, got shape \(2, 1\)"),
    ],
)
def test_what_is_no_strength(strength, error, text, attached):
    _, reft = attached("llama", at("text"))
    with pytest.raises(error, match=text), reft.scaled(strength):
        pass


def test_strengths_of_another_batch(attached):
    model, reft = attached("llama", at("text"))
    with (
        reft.scaled([1.0, 0.5, 0.0]),
        pytest.raises(ValueError, match="3 strengths were given and site 'text' layer 1"),
    ):
        model(**FAMILIES["llama"].batch(TEXT_ONLY))


# Several adapters ----------------------------------------------------------------------------------------------------

ALONE = {"max_new_tokens": 5, "do_sample": False}


def with_three(family, attached):
    """Attach three adapters that differ in place, method and numbers."""
    model, _ = attached(family, at("text"), name="a")
    _, b = attached(family, at("text", "nodireft", "prompt:l3", layers=0), name="b", model=model)
    items = [at("text", "red", "response")] + [at("vision")] * bool(family.has_image)
    _, c = attached(family, *items, name="c", model=model)
    shake(b, 5), shake(c, 6)
    with torch.no_grad():
        for parameter in c.parameters():
            parameter.mul_(0.3)
    return model


@pytest.mark.parametrize("family", TWO, ids=str)
def test_each_row_as_if_it_ran_alone(family, attached):
    model = with_three(family, attached)
    rows = ["a", "b", None, "c", ("a", "b"), ("c", "a", "b"), None, "b"]
    batch = family.batch([SAMPLES[0] if family.has_image else TEXT_ONLY[1]] * len(rows))
    prompts = family.batch([SAMPLES[0] if family.has_image else TEXT_ONLY[1]] * len(rows), side="left", answer=False)
    with vlreft.use(model, rows=rows), torch.no_grad():
        together = logits(model, batch)
        greedy = model.generate(**prompts, **ALONE)
        beams = model.generate(**prompts, **ALONE, num_beams=3, num_return_sequences=2)
    for place, names in enumerate(rows):
        one = {name: value[place : place + 1] for name, value in batch.items()}
        prompt = {name: value[place : place + 1] for name, value in prompts.items()}
        names = () if names is None else (names,) if isinstance(names, str) else tuple(sorted(names))
        with vlreft.use(model, *names), torch.no_grad():
            torch.testing.assert_close(together[place : place + 1], logits(model, one), atol=2e-4, rtol=2e-4)
            assert greedy[place : place + 1].equal(model.generate(**prompt, **ALONE))
            alone = model.generate(**prompt, **ALONE, num_beams=3, num_return_sequences=2)
            assert beams[2 * place : 2 * place + 2].equal(alone)
    assert len({tuple(row) for row in greedy.tolist()}) > 2


def test_order_is_as_named(attached):
    family, batch = FAMILIES["llama"], FAMILIES["llama"].batch(TEXT_ONLY)
    model, _ = attached(family, at("text"), name="a")
    _, b = attached(family, at("text"), name="b", model=model)
    shake(b, 5)
    both = logits(model, batch)
    with vlreft.use(model, "a", "b"):
        assert logits(model, batch).equal(both)
    with vlreft.use(model, "b", "a"):
        turned = logits(model, batch)
        assert not turned.equal(both)
        with vlreft.use(model, "a"):
            alone = logits(model, batch)
        assert logits(model, batch).equal(turned)
    with vlreft.use(model):
        base = logits(model, batch)
    b.detach()
    assert logits(model, batch).equal(alone)
    _, b = attached(family, at("text"), name="a2", model=model)
    with b.disabled(), vlreft.use(model):
        assert logits(model, batch).equal(base)


def test_who_acts_on_what_is_undone_after_an_exception(attached):
    family, batch = FAMILIES["llama"], FAMILIES["llama"].batch(TEXT_ONLY)
    model = with_three(family, attached)
    plain = logits(model, batch)
    with pytest.raises(KeyError), vlreft.use(model, rows=["a", None]):
        raise KeyError
    assert logits(model, batch).equal(plain)


def test_rows_train_their_own_adapters_alone(attached):
    family = FAMILIES["llama"]
    model = with_three(family, attached)
    batch = family.batch(TEXT_ONLY)
    with vlreft.use(model, rows=["a", "b"]):
        model.train()(**batch).loss.backward()
    a, b, c = (find_reft(model, name) for name in "abc")
    assert all(parameter.grad is not None for reft in (a, b) for parameter in reft.parameters())
    assert all(parameter.grad is None for parameter in c.parameters())


@pytest.mark.parametrize(
    ("names", "rows", "text"),
    [
        (("x",), None, r"no adapter 'x' is attached; there are \['a', 'b', 'c'\]"),
        ((), ["a", "x"], "no adapter 'x' is attached"),
        (("a",), ["a"], "not both"),
        ((), [], "`rows` is empty"),
        (("a", "a"), None, "one is named twice"),
        ((), [("b", "b")], "one is named twice"),
    ],
)
def test_what_use_refuses(names, rows, text, attached):
    model = with_three(FAMILIES["llama"], attached)
    with pytest.raises(ValueError, match=text), vlreft.use(model, *names, rows=rows):
        pass


# Reading and recording -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "site"), SITES)
def test_read_states_are_those_that_the_edit_is_given(family, site, attached):
    batch = family.batch(SAMPLES)
    model, reft = attached(family, at(site, tied=True))
    block = family.blocks(model, site)[LAYER[site]]
    model.train()
    before = [module.training for module in model.modules()]
    with Spy(block, of_input=site == "connector") as spy:
        (read,) = reft.read(batch)
    assert [module.training for module in model.modules()] == before
    assert not spy.edited(0).any()
    with Spy(block, of_input=site == "connector") as edits, torch.no_grad():
        model.eval()(**batch)
    chosen, h = edits.edited(0), spy.before[0]
    h, chosen = h.reshape(-1, *h.shape[-2:]), chosen.reshape(-1, chosen.shape[-1])
    assert (read.site, read.layer, read.component) == (site, LAYER[site], "output")
    for row, chosen_T in enumerate(chosen):
        assert read.states_BKD[row][read.valid_BK[row]].equal(h[row][chosen_T].detach())
        assert not read.states_BKD[row][~read.valid_BK[row]].any()


@pytest.mark.parametrize("component", ["output", "input"])
def test_a_read_ends_behind_its_last_block(component, attached):
    family = FAMILIES["llava"]
    model, reft = attached(family, at("text", positions="prompt:l1", layers=[0], component=component))
    batch, blocks, ran = family.batch(SAMPLES), family.blocks(model, "text"), []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        before = model.eval()(**batch).logits
        ran.clear()
        reft.read(batch)
        assert ran == [0]
        assert model(**batch).logits.equal(before)


@pytest.mark.parametrize("what", ["layer", "site", "hook", "compiled", "twice"])
def test_a_read_that_could_miss_something_runs_to_the_end(what, attached):
    family = FAMILIES["llava"]
    site, layers = ("vision", [0]) if what == "site" else ("text", [-1 if what == "layer" else 0])
    model, reft = attached(family, at(site, positions="all", layers=layers))
    batch, blocks, ran = family.batch(SAMPLES), family.blocks(model, "text"), []
    if what == "hook":
        blocks[1].__dict__["_hf_hook"] = None
    if what == "compiled":
        blocks[1]._compiled_call_impl = blocks[1]._call_impl
    model.register_forward_hook(lambda *_: ran.append(what))
    if what == "twice":
        with ending_behind(model, (blocks[0], blocks[0], blocks[1]), [0]), torch.no_grad():
            model(**batch)
    else:
        reft.read(batch)
    assert ran == [what]


def test_parts_are_read_apart(attached):
    family = FAMILIES["llama"]
    model, reft = attached(family, at("text", positions="f2+l1"), at("text", "red", "l1", layers=[0, 2]))
    with Spy(family.blocks(model, "text")[1]) as spy:
        reads = reft.read(family.batch(TEXT_ONLY))
    assert [(read.layer, read.part, tuple(read.states_BKD.shape)) for read in reads] == [
        (1, 0, (2, 2, 32)),
        (1, 1, (2, 1, 32)),
        (0, 0, (2, 1, 32)),
        (2, 0, (2, 1, 32)),
    ]
    assert reads[0].states_BKD[1].equal(spy.before[0][1, :2])


def test_other_tokens_can_be_read(attached):
    family = FAMILIES["llava"]
    batch = family.batch(SAMPLES)
    model, reft = attached(family, at("text", positions="prompt:l1"))
    with Spy(family.blocks(model, "text")[1]) as spy:
        (read,) = reft.read(batch, positions="image")
    assert read.valid_BK.sum(1).tolist() == [4, 0, 8]
    assert read.states_BKD[2].equal(spy.before[0][2][batch["input_ids"][2] == family.image_id])


def test_what_read_refuses(attached):
    family = FAMILIES["llava"]
    _, reft = attached(family, at("vision"), at("text", positions="f1+l1"))
    with pytest.raises(ValueError, match=r"no token of this batch is selected at site 'vision' layer 1"):
        reft.read(family.batch(TEXT_ONLY))
    with pytest.raises(ValueError, match=r"positions 'l3' have 1 parts and 'f1\+l1' at site 'text' layer 1 2"):
        reft.read(family.batch(SAMPLES), positions="l3")
    with pytest.raises(ValueError, match="is no segment"):
        reft.read(family.batch(SAMPLES), positions="nowhere:l3")


@pytest.mark.parametrize(("family", "site"), SITES)
def test_recorded_edits_are_those_made(family, site, attached):
    model, reft = attached(family, at(site, "red"))
    block = family.blocks(model, site)[LAYER[site]]
    batch = family.batch(SAMPLES)
    plain = logits(model, batch)
    with Spy(block, of_input=site == "connector") as spy, reft.recording() as edits:
        assert edits == []
        assert logits(model, batch).equal(plain)
    assert {(edit.site, edit.layer) for edit in edits} == {(site, 0 if site == "connector" else 1)}
    mask = torch.stack([edit.mask_BT for edit in edits]).any(0)
    assert mask.equal(spy.edited(0).reshape(mask.shape))
    moved = (spy.after[0] - spy.before[0]).float().norm(dim=-1).reshape(mask.shape)
    length = spy.before[0].float().norm(dim=-1).reshape(mask.shape)
    together = torch.stack([edit.norm_BT for edit in edits]).sum(0)
    torch.testing.assert_close(together, moved)
    torch.testing.assert_close(torch.stack([edit.relative_BT for edit in edits]).sum(0), moved / length)
    with torch.no_grad():
        model(**batch)
    assert len(edits) == len(reft.config.interventions[0].parts)


def test_generated_tokens_are_recorded_as_they_come(attached):
    family = FAMILIES["llama"]
    model, reft = attached(family, at("text", "red", "response"), at("text", "red", "l2"))
    with reft.recording() as edits:
        model.generate(**family.batch(TEXT_ONLY, side="left", answer=False), **ALONE)
    shapes = [(edit.positions, tuple(edit.mask_BT.shape)) for edit in edits]
    length = family.batch(TEXT_ONLY, side="left", answer=False)["input_ids"].shape[1]
    assert shapes == [("response", (2, length)), ("l2", (2, length))] + [("response", (2, 1))] * 4
    assert not edits[0].mask_BT.any()
    assert all(edit.mask_BT.all() for edit in edits[-4:])


def test_fingerprint_knows_the_strength(attached):
    _, reft = attached("llama", at("text", groups=("a",)))
    prints = {reft.fingerprint()}
    with reft.scaled(0.5):
        prints.add(reft.fingerprint())
    with reft.scaled([0.5, 1.0]):
        prints.add(reft.fingerprint())
    with reft.groups("a"):
        prints.add(reft.fingerprint())
    with reft.groups({"a": 0.5}):
        prints.add(reft.fingerprint())
    with reft.disabled():
        prints.add(reft.fingerprint())
    assert len(prints) == 6
    assert reft.fingerprint() in prints
