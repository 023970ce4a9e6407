"""Laws of merged adapters: the edit is the weighted sum of theirs, on the same state."""

import pytest
import torch
from family import SAMPLES
from zoo import FAMILIES, INTERVENTIONS, shake

import vlreft
from vlreft.merging import LINEAR
from vlreft.reft import find_refts

PLACES = {"text": "f2+l2", "vision": "patches", "connector": "image"}
MERGED = sorted(LINEAR | {"red"})


def item(method, site="text", **fields):
    return vlreft.Intervention(
        method, site=site, positions=PLACES[site], **(dict(INTERVENTIONS[method].fields) | fields)
    )


def attach(model, name, items, seed):
    return shake(vlreft.attach(model, vlreft.ReftConfig(items), name), seed)


@pytest.fixture
def model():
    return FAMILIES["llava"].build().eval()


def logits(model):
    with torch.no_grad():
        return model(**FAMILIES["llava"].batch(SAMPLES)).logits


@pytest.mark.parametrize("method", MERGED)
def test_a_merged_edit_is_the_weighted_sum(method, model):
    a = attach(model, "a", [item(method, site) for site in PLACES], 1)
    b = attach(model, "b", [item(method, site, scale=2.0, dropout=0.5) for site in PLACES], 2)
    merged = vlreft.merge(model, {"a": 0.7, "b": -0.3})
    for one, two, both in zip(a.edits.eval().values(), b.edits.eval().values(), merged.edits.values(), strict=True):
        h_ND = torch.randn(5, width_of(one))
        expected = h_ND + 0.7 * (one(h_ND) - h_ND) - 0.3 * (two(h_ND) - h_ND)
        assert (expected - h_ND).abs().max() > 1e-2
        torch.testing.assert_close(both(h_ND), expected, atol=2e-5, rtol=1e-5)


def width_of(edit):
    return max(size for parameter in edit.parameters() for size in parameter.shape)


def test_different_methods_merge_where_both_are_linear(model):
    a = attach(model, "a", [item("loreft", rank=3)], 1)
    b = attach(model, "b", [item("vector")], 2)
    merged = vlreft.merge(model, {"a": 1.0, "b": 0.5}, "both")
    assert [one.method for one in merged.config.interventions] == ["nodireft"]
    assert merged.config.interventions[0].rank == 4
    one, two, both = (next(iter(reft.edits.values())) for reft in (a, b, merged))
    h_ND = torch.randn(5, len(two.vector))
    torch.testing.assert_close(both(h_ND), one(h_ND) + 0.5 * two.vector, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", MERGED)
def test_one_adapter_merged_alone_is_that_adapter(method, model):
    attach(model, "a", [item(method, site) for site in PLACES], 1)
    base = logits_without(model)
    plain = logits(model)
    vlreft.merge(model, {"a": 1.0})
    with vlreft.use(model, "merged"):
        torch.testing.assert_close(logits(model), plain, atol=1e-4, rtol=1e-4)
    assert (plain - base).abs().max() > 1e-2


def logits_without(model):
    with vlreft.use(model):
        return logits(model)


def test_vectors_merged_are_vectors_stacked(model):
    for seed, name in enumerate("ab"):
        attach(model, name, [item("vector", site) for site in PLACES], seed)
    stacked = logits(model)
    vlreft.merge(model, {"a": 1.0, "b": 1.0})
    with vlreft.use(model, "merged"):
        torch.testing.assert_close(logits(model), stacked, atol=1e-4, rtol=1e-4)


def test_a_merged_adapter_is_saved_and_loaded_alone(model, tmp_path):
    for seed, name in enumerate("ab"):
        attach(model, name, [item("loreft", site) for site in PLACES], seed)
    state = torch.random.get_rng_state()
    merged = vlreft.merge(model, {"a": 0.5, "b": 0.5})
    assert torch.random.get_rng_state().equal(state)
    with vlreft.use(model, "merged"):
        expected = logits(model)
    merged.save_pretrained(tmp_path)
    for reft in find_refts(model).values():
        reft.detach()
    vlreft.load(model, tmp_path)
    assert logits(model).equal(expected)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (item("loreft"), item("loreft", layers=[1]), r"do not edit the same places in the same order"),
        (item("loreft"), vlreft.Intervention("loreft", positions="question:f2+l2", rank=2), "0:text:0:f2 of prompt"),
        (item("loreft"), item("loreft", tied=True), "do not edit the same places"),
        (item("loreft"), item("loreft", activation="relu", init="reference"), "with an activation is not linear"),
        (item("loreft"), item("red"), r"the methods \['loreft', 'red'\] have no weighted sum in one edit"),
        (item("vti"), item("vti"), r"the methods \['vti'\] have no weighted sum"),
    ],
    ids=["layers", "segment", "tied", "activation", "red", "vti"],
)
def test_what_has_no_sum_is_refused_and_leaves_the_model(first, second, message, model):
    attach(model, "a", [first], 1)
    attach(model, "b", [second], 2)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        vlreft.merge(model, {"a": 1.0, "b": 1.0})
    assert logits(model).equal(before)


def test_unknown_names_are_refused(model):
    attach(model, "a", [item("loreft")], 1)
    for weights, message in (({"a": 1.0, "z": 1.0}, r"no adapter \['z'\]"), ({}, "no adapter was named")):
        with pytest.raises(ValueError, match=message):
            vlreft.merge(model, weights)
