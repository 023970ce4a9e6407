"""The composition example, run whole as a user would: what each group does alone, and what both do together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_two_skills_are_switched_on_alone_and_together(tmp_path):
    command = [sys.executable, "examples/compose.py", "--output", str(tmp_path), "--num-test", "100"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    scores = results["accuracy"]
    assert scores["nothing"]["usual"] > 0.97
    assert max(scores["nothing"][kind] for kind in ("usual, red", "code", "code, red")) == 0.0
    assert scores["group code"]["code"] > 0.95
    assert scores["group code"]["code, red"] < 0.05
    assert min(scores["group refuse"]["usual"], scores["group refuse"]["usual, red"]) > 0.8
    assert scores["group refuse"]["code"] < 0.05
    # Together they do what neither does alone: "code" refuses nothing, "refuse" has no words.
    assert min(scores["both groups"].values()) > 0.3
    alone = max(scores[name]["mean"] for name in ("nothing", "group code", "group refuse"))
    assert scores["both groups"]["mean"] > alone + 0.03
    assert scores["both groups, routed"]["mean"] > max(scores["both groups"]["mean"], 0.8)
    angles = results["angles"]
    assert min(min(degrees) for degrees in angles["two groups"].values()) > 89.9
    assert min(min(degrees) for degrees in angles["two adapters"].values()) < 85.0
    assert (tmp_path / "compose.png").stat().st_size > 20_000
    for adapter in ("grouped", "code", "refuse"):
        assert (tmp_path / "seed-0" / adapter / "reft_model.safetensors").stat().st_size < 128_000
