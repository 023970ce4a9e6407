"""`Intervention` and `ReftConfig`: validation with the remedy in the text, JSON there and back."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

import vlreft
from vlreft.interventions import INTERVENTIONS

ITEMS = {
    "shortest": {"method": "red"},
    "loreft": {"method": "loreft", "positions": "question:f4+l4", "rank": 4},
    "all settings": {
        "method": "loreft", "site": "vision", "layers": range(1, 4), "positions": "patches", "rank": 2, "tied": True,
        "init": "reference", "activation": "gelu", "dropout": 0.1, "scale": -2,
    },
    "one layer": {"method": "vector", "layers": 3},
    "layers from the end": {"method": "red", "layers": (-1, 0)},
    "connector": {"method": "loreft", "site": "connector", "positions": "image:all", "rank": 1},
    "no identity": {"method": "consreft", "rank": 2, "init": "reference"},
}  # fmt: skip


def make(name):
    return vlreft.Intervention(**ITEMS[name])


@pytest.mark.parametrize("name", ITEMS)
def test_json_round_trip(name):
    config = vlreft.ReftConfig([make(name), make("loreft")])
    again = vlreft.ReftConfig.from_dict(json.loads(config.to_json()))
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()
    assert vlreft.ReftConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", ITEMS)
def test_every_setting_counts_for_equality(name):
    item = make(name)
    changes = {
        "site": "elsewhere", "layers": (7,), "positions": "text:f9", "tied": not item.tied, "dropout": 0.5,
        "scale": 3.0,
    }  # fmt: skip
    for field, value in changes.items():
        assert dataclasses.replace(item, **{field: value}) != item
    assert vlreft.ReftConfig([item, make("loreft")]) != vlreft.ReftConfig([make("loreft"), item, item])


def test_one_intervention_is_a_config():
    assert vlreft.ReftConfig(make("shortest")).interventions == (make("shortest"),)
    assert vlreft.ReftConfig(item for item in [make("loreft")]) == vlreft.ReftConfig(make("loreft"))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("loreft").rank = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        vlreft.ReftConfig(make("loreft")).interventions = ()


@pytest.mark.parametrize(
    ("layers", "normal"),
    [("all", "all"), (3, (3,)), (-1, (-1,)), ([0, 2], (0, 2)), (range(2), (0, 1)), ((5,), (5,)), ({4: 0}.keys(), (4,))],
)
def test_layers_become_all_or_a_tuple(layers, normal):
    assert vlreft.Intervention("red", layers=layers).layers == normal


@pytest.mark.parametrize(
    ("positions", "tied", "parts"),
    [
        ("f4+l4", False, ("f4", "l4")),
        ("f4+l4", True, ("f4+l4",)),
        ("image", False, ("all",)),
        ("question:l2", True, ("l2",)),
        ("[2:4]+all+f1", False, ("[2:4]", "all", "f1")),
    ],
)
def test_parts_are_the_groups_with_an_intervention_each(positions, tied, parts):
    assert vlreft.Intervention("red", positions=positions, tied=tied).parts == parts


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_build(method):
    needs = {"rank": 3} if INTERVENTIONS[method].uses_rank else {}
    start = "identity" if INTERVENTIONS[method].has_identity else "reference"
    dropout = 0.25 if INTERVENTIONS[method].uses_dropout else 0.0
    edit = vlreft.Intervention(method, init=start, dropout=dropout, scale=2, **needs).build(16)
    assert type(edit) is INTERVENTIONS[method]
    assert (edit.dropout, edit.scale) == (dropout, 2)
    source = torch.randn(2, 16) if edit.uses_source else None
    assert edit(torch.randn(2, 16), source_ND=source).shape == (2, 16)


LOREFT = {"method": "loreft", "rank": 4}
BAD = [
    ({"method": "lorefft"}, ValueError, r"`method` \(='lorefft'\) must be one of 'loreft', 'direft', .*'vector'"),
    ({"method": None}, ValueError, r"`method` \(=None\) must be one of 'loreft'"),
    ({"method": ["loreft"]}, ValueError, r"`method` \(=\['loreft'\]\) must be one of 'loreft'"),
    ({"method": INTERVENTIONS["loreft"], "rank": 4}, ValueError, r"`method` .* must be one of 'loreft'"),
    ({**LOREFT, "init": "zero"}, ValueError, r"`init` \(='zero'\) must be one of 'identity', 'reference'"),
    ({**LOREFT, "init": {}}, ValueError, r"`init` \(=\{\}\) must be one of 'identity', 'reference'"),
    (
        {**LOREFT, "activation": "swish"},
        ValueError,
        r"`activation` \(='swish'\) must be one of 'relu', 'gelu', 'silu', 'tanh'",
    ),
    ({**LOREFT, "activation": torch.relu}, ValueError, "`activation` .* must be one of 'relu'"),
    ({**LOREFT, "site": 3}, TypeError, "`site` must be a string, got 3"),
    ({**LOREFT, "tied": 1}, TypeError, "`tied` must be True or False, got 1"),
    ({**LOREFT, "tied": "yes"}, TypeError, "`tied` must be True or False, got 'yes'"),
    ({**LOREFT, "dropout": 1.0}, ValueError, r"`dropout` \(=1.0\) must be at least 0 and below 1"),
    ({**LOREFT, "dropout": -0.1}, ValueError, r"`dropout` \(=-0.1\) must be at least 0 and below 1"),
    ({**LOREFT, "dropout": "0.1"}, TypeError, "`dropout` must be a finite number, got '0.1'"),
    ({**LOREFT, "dropout": None}, TypeError, "`dropout` must be a finite number, got None"),
    ({**LOREFT, "scale": True}, TypeError, "`scale` must be a finite number, got True"),
    ({**LOREFT, "scale": float("nan")}, TypeError, "`scale` must be a finite number, got nan"),
    ({**LOREFT, "scale": float("inf")}, TypeError, "`scale` must be a finite number, got inf"),
    ({**LOREFT, "scale": torch.tensor(1.0)}, TypeError, r"`scale` must be a finite number, got tensor"),
    ({**LOREFT, "layers": "1;2"}, TypeError, "`layers` must be 'all', a number or a list of numbers, got '1;2'"),
    ({**LOREFT, "layers": None}, TypeError, "`layers` must be 'all', a number or a list of numbers, got None"),
    ({**LOREFT, "layers": []}, TypeError, r"`layers` must be 'all', a number or a list of numbers, got \[\]"),
    ({**LOREFT, "layers": [1.0]}, TypeError, r"`layers` must be 'all', a number or a list of numbers, got \[1.0\]"),
    ({**LOREFT, "layers": True}, TypeError, "`layers` must be 'all', a number or a list of numbers, got True"),
    ({**LOREFT, "layers": ["all"]}, TypeError, "`layers` must be 'all', a number or a list of numbers"),
    ({**LOREFT, "layers": torch.arange(2)}, TypeError, "`layers` must be 'all', a number or a list of numbers"),
    ({**LOREFT, "layers": np.arange(2)}, TypeError, "`layers` must be 'all', a number or a list of numbers"),
    ({**LOREFT, "layers": [1, 2, 1]}, ValueError, r"`layers` \(=\[1, 2, 1\]\) names a layer twice"),
    ({**LOREFT, "positions": "f4+g4"}, ValueError, r"(?s)'f4\+g4': .*\(character 4\)\n    f4\+g4\n       \^\nexpected"),
    ({**LOREFT, "positions": ["f4", "l4"]}, TypeError, "`positions` must be a string such as 'question:f4"),
    ({**LOREFT, "positions": None}, TypeError, "`positions` must be a string such as 'question:f4"),
    ({"method": "loreft"}, ValueError, "method 'loreft' needs a `rank`, e.g. rank=4"),
    ({**LOREFT, "rank": 0}, ValueError, r"`rank` \(=0\) must be at least 1"),
    ({**LOREFT, "rank": -4}, ValueError, r"`rank` \(=-4\) must be at least 1"),
    ({**LOREFT, "rank": 4.0}, TypeError, "`rank` must be a whole number, got 4.0"),
    ({**LOREFT, "rank": "4"}, TypeError, "`rank` must be a whole number, got '4'"),
    ({**LOREFT, "rank": True}, TypeError, "`rank` must be a whole number, got True"),
    ({"method": "red", "rank": 4}, ValueError, r"method 'red' has no rank; leave `rank` \(=4\) out"),
    (
        {"method": "vector", "activation": "relu"},
        ValueError,
        r"'vector' has no source to put `activation` \(='relu'\) on",
    ),
    ({"method": "consreft", "rank": 2}, ValueError, "'consreft' has no identity start; write init='reference'"),
    ({"method": "interchange", "dropout": 0.1}, ValueError, r"nothing to train, so leave `dropout` \(=0.1\) out"),
    (
        {**LOREFT, "activation": "relu"},
        ValueError,
        "'relu' has no identity start; write init='reference' or leave `activation` out",
    ),
    (
        {"method": "noreft", "rank": 2, "activation": "tanh"},
        ValueError,
        "'tanh' has no identity start; write init='reference'",
    ),
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD)
def test_bad_settings(settings, error, text):
    with pytest.raises(error, match=text):
        vlreft.Intervention(**settings)


@pytest.mark.parametrize(
    ("interventions", "error", "text"),
    [
        ([], ValueError, "ReftConfig needs at least one vlreft.Intervention"),
        ([ITEMS["loreft"]], TypeError, "item 0 of ReftConfig must be a vlreft.Intervention, got {'method'"),
        ([make("loreft"), "loreft"], TypeError, "item 1 of ReftConfig must be a vlreft.Intervention, got 'loreft'"),
    ],
)
def test_bad_configs(interventions, error, text):
    with pytest.raises(error, match=text):
        vlreft.ReftConfig(interventions)


def without(data, key):
    return {name: value for name, value in data.items() if name != key}


def data_of(**changes):
    return vlreft.ReftConfig(make("loreft")).to_dict() | changes


def item_of(**changes):
    return {"interventions": [*data_of()["interventions"], data_of()["interventions"][0] | changes]}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (data_of(format_version=4), r"`format_version` \(=4\) is none of 1 to 3; it was made by another vlreft"),
        (data_of(format_version="1"), r"`format_version` \(='1'\) is none of 1 to 3"),
        (without(data_of(), "format_version"), r"`format_version` \(=None\) is none of 1 to 3"),
        (without(data_of(), "modules_to_save"), "needs a list under 'modules_to_save'"),
        (without(data_of(), "interventions"), "needs a list under 'interventions'"),
        (data_of(interventions={}), "needs a list under 'interventions'"),
        ([], "needs a list under 'interventions'"),
        (data_of(interventions=[]), "needs at least one vlreft.Intervention"),
        (data_of(surplus=1), r"no keys \['surplus'\]"),
        (data_of(interventions=["loreft"]), "intervention 0 must have .*it differs in loreft"),
        (data_of(**item_of(surplus=1)), r"intervention 1 must have .*it differs in \['surplus'\]"),
        (data_of(interventions=[without(data_of()["interventions"][0], "tied")]), r"it differs in \['tied'\]"),
        (data_of(**item_of(rank=0)), r"intervention 1: `rank` \(=0\) must be at least 1"),
        (data_of(**item_of(positions="f4+g4")), r"intervention 1: `positions` 'f4\+g4'"),
    ],
)
def test_bad_data(data, text):
    with pytest.raises(ValueError, match=text):
        vlreft.ReftConfig.from_dict(data)
