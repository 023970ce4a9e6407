"""The example scripts, run whole as a user would, reach the figures that they are shipped for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = "assets/demo-vqa"


def run_script(name, output, *options):
    command = [sys.executable, f"examples/{name}.py", "--output", str(output), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gives 8 of 8 answers again" in done.stdout
    assert (output / "examples.png").stat().st_size > 10_000
    return json.loads((output / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "base_at_most", "reft_at_least", "parameters"),
    [
        ("finetune_vqa", (), 0.02, 0.95, 4112),
        (
            "finetune_vqa",
            ("--data", f"{DATA}/refuse", "--edit", "text=image:all", "--edit", "text=prompt:l4", "--lr", "3e-2"),
            0.5,
            0.90,
            8224,
        ),
        ("finetune_vqa", ("--data", f"{DATA}/bgr", "--edit", "vision=prompt"), 0.70, 0.80, 4112),
        ("finetune_lm", (), 0.05, 0.95, 4112),
        ("caption", (), 0.02, 0.70, 8224),
    ],
    ids=["new words", "conditional answer", "swapped colours", "text only", "caption style"],
)
def test_script_reaches_its_figures(tmp_path, name, options, base_at_most, reft_at_least, parameters):
    results = run_script(name, tmp_path, *options)
    assert results["base"] <= base_at_most
    assert results["reft"] >= reft_at_least
    assert results["trainable_parameters"] == parameters
    assert results["adapter_bytes"] < 64_000
    assert results["train_seconds"] > 0
    assert results["seed"] == 0


def official_folder(folder, split, ours):
    """Write the first questions of a demo split down as VQAv2 does: its file names, its image folders."""
    demo = ROOT / DATA
    for kind, name in (
        ("questions", "v2_OpenEnded_mscoco_{}2014_questions"),
        ("annotations", "v2_mscoco_{}2014_annotations"),
    ):
        data = json.loads((demo / "code" / f"{ours}_{kind}.json").read_text())
        data[kind] = data[kind][:12]
        (folder / f"{name.format(split)}.json").write_text(json.dumps(data))
    images = folder / f"{split}2014"
    images.mkdir()
    for image_id in {row["image_id"] for row in data["annotations"]}:
        source = demo / "images" / ours / f"DEMO_{ours}_{image_id:012d}.png"
        shutil.copy(source, images / f"COCO_{split}2014_{image_id:012d}.png")


@pytest.mark.slow
def test_script_takes_a_folder_as_vqav2_has_it(tmp_path):
    official_folder(tmp_path, "train", "train")
    official_folder(tmp_path, "val", "test")
    options = ("--data", str(tmp_path), "--test-split", "val", "--epochs", "1", "--edit", "text=question:f4+l4")
    results = run_script("finetune_vqa", tmp_path / "out", *options)
    assert results["num_test"] == 12
    assert results["trainable_parameters"] == 2 * 4112


@pytest.mark.parametrize("name", ["finetune_vqa", "finetune_lm", "caption"])
def test_scripts_are_short_and_explain_themselves(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert text.count("\n") < 150
    assert text.startswith('"""')
