"""The example that looks for the colour: its pairs, and the figures it is shipped for."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vlreft
from vlreft.causes.interchange import interchange_accuracy, patch_grid

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
import find_subspace as example  # noqa: E402

MIDDLE = np.s_[16:48, 16:48]  # pixels of the patches that are exchanged


@pytest.mark.parametrize("seed", range(20))
def test_minimal_pairs_differ_in_one_colour(seed):
    row = example.minimal_pictures(random.Random(seed))
    base, source = (np.asarray(one["image"], dtype=int) for one in (row, row["source"]))
    change = np.abs(base - source).sum(-1) > 0
    assert change[MIDDLE].any()
    assert not np.delete(np.delete(change, np.s_[16:48], 0), np.s_[16:48], 1).any()
    assert change.sum() == change[MIDDLE].sum()
    assert row["own"] != row["answer"] == row["source"]["answer"]
    text = example.minimal_texts(random.Random(seed))
    words = zip(text["question"].split(), text["source"]["question"].split(), strict=True)
    assert [pair for pair in words if pair[0] != pair[1]] == [(text["own"], text["answer"])]


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_wanted_is_of_this_object_in_the_others_colour(seed):
    row = example.different_pictures(random.Random(seed))
    size, color, shape = row["own"].split()
    other_size, other_color, other_shape = row["source"]["answer"].split()
    assert (size != other_size, color != other_color, shape != other_shape) == (True, True, True)
    assert row["answer"] == f"{size} {other_color} {shape}"
    text = example.different_texts(random.Random(seed))
    base, source = (one["question"].split() for one in (text, text["source"]))
    assert base[3:6][-1] != source[3:6][-1]
    assert (text["own"], text["answer"]) == (base[4], source[4])
    assert text["own"] != text["answer"]
    assert base[-2] == base[5]


def test_each_cell_of_the_grid_is_an_accuracy():
    """On a model that knows what it says: cells of one, of zero and between, as patching a place alone gives them."""
    case = example.texts(str(ROOT / "assets" / "demo-lm"))
    rows = example.make_pairs(case, case.minimal, "test", 16)
    named = case.grids["text"]
    positions = [named["COLOR SHAPE , together"], named["4: COLOR"], named["20: <assistant>"]]
    grid = patch_grid(case.model, case.collator, rows, positions=positions, batch_size=5)
    found = []
    for text in positions:
        for layer in grid.layers:
            item = vlreft.Intervention("interchange", layers=layer, positions=text, tied=True, init="reference")
            reft = vlreft.attach(case.model, vlreft.ReftConfig(item))
            found.append(interchange_accuracy(case.model, rows, case.collator))
            reft.detach()
    assert grid.accuracy_PN.flatten().tolist() == found
    assert {0.0, 1.0} < set(found)
    assert grid.base_accuracy == 0.0
    assert grid.num_rows == len(rows)


@pytest.mark.slow
def test_the_subspace_of_the_colour(tmp_path):
    command = [sys.executable, "examples/find_subspace.py", "--seeds", "0", "--ranks", "8", "--output", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for name, whole in (("picture", 0.05), ("text", 0.45)):
        (found,) = results[name]["subspaces"]
        assert found["das"][0] > 0.95
        assert found["random"][0] < 0.05
        assert found["whole states"] < whole
        assert (tmp_path / f"grid_{name}_text.png").stat().st_size > 10_000
    grid = results["picture"]["grids"]["text"]
    assert grid["the object's image tokens"][0] > 0.95
    assert grid["image tokens above it"] == [0.0] * 4
    assert grid["8: <assistant>"][-1] > 0.95
