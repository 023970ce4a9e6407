"""`examples/steer_reference.py`: references are what they claim to be, and steering by them does what is reported."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    """Import the script as it imports its neighbours: by their names."""
    sys.path.insert(0, str(ROOT / "examples"))
    import steer_reference

    sys.path.remove(str(ROOT / "examples"))
    return steer_reference


@pytest.fixture
def captioned(tmp_path):
    """Pictures of one colour each, some with a second one in their caption."""
    rows = []
    for place in range(120):
        red = place % 3 == 0
        file = tmp_path / f"{place}.png"
        Image.new("RGB", (2, 2), (200, 10, 20) if red else (10, 200, 20)).save(file)
        rows.append((str(file), f"a circle {'red' if red else 'green'}" + (" , a white star" if place % 2 else "")))
    return rows


def test_swapped_copies_differ_in_colour_alone_and_never_keep_red(script, captioned):
    copies = [np.asarray(copy)[0, 0].tolist() for copy in script.swapped(captioned[0][0])]
    assert copies == [[10, 200, 20], [20, 10, 200], [10, 20, 200], [20, 200, 10]]


def test_references_hold_the_target_and_follow_the_seed(script, captioned):
    captions = dict(captioned)
    for name, choose in script.REFERENCES.items():
        positive, negative = choose(captioned, "red", random.Random(0))
        assert all("red" in captions[file] for file in positive)
        assert positive == choose(captioned, "red", random.Random(0))[0]
        assert positive != choose(captioned, "red", random.Random(1))[0]
        if name == "16 with, 64 without":
            assert (len(set(positive)), len(set(negative))) == (16, 64)
            assert not any("red" in captions[file] for file in negative)
            continue
        assert len(positive) == len(negative) == 4 * len(set(positive))
        assert len(set(positive)) == (1 if name == "one picture" else 16)
        if name == "one picture":
            assert "white" not in captions[positive[0]]


def test_texts_are_told_apart_by_more_than_their_colours(script):
    assert script.colors_in("a Red circle, a red star .") == ["red", "red"]
    assert script.without_colors("a red circle") == script.without_colors("a blue circle")
    assert script.without_colors("a red circle") != script.without_colors("a red red circle")
    assert script.share([True, False, True, True]) == 0.75
    assert script.share([]) == 0.0


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path):
    command = [sys.executable, "examples/steer_reference.py", "--output", str(tmp_path), "--seeds", "0", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command += ["--lengths", "8", "10", "12", "--num", "50"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["base"] == {"effect": 0.0, "damage": 0.0, "said": 0.0, "altered": 0.0}
    assert results["num_test"] == {"targets": 50, "others": 50, "captions": 50}
    chosen = results["16 pictures"]["chosen_on_dev"]["mean"]
    assert chosen["effect"] >= 0.4
    assert chosen["said"] >= 0.3
    assert chosen["damage"] <= 0.05
    assert chosen["altered"] <= 0.2
    at_twelve = {
        name: [one["dial"][2] for one in results[name]["seeds"]] for name in ("one picture", "16 with, 64 without")
    }
    assert min(point["effect"] for point in at_twelve["one picture"]) >= 0.4
    altered = {name: sum(point["altered"] for point in points) / 2 for name, points in at_twelve.items()}
    assert altered["one picture"] + 0.2 < altered["16 with, 64 without"]
    for name in ("dial.png", "16_pictures.png", "one_picture/reft_model.safetensors"):
        assert (tmp_path / name).stat().st_size > 500
