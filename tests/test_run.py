"""`tasks.run`: every task end to end on the demo models, and the laws of the protocol: sealed test, resumed runs."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import official_captions
import official_text
import official_vqa
import pytest
from PIL import Image

import vlreft
from tasks import bootstrap
from tasks import run as command
from tasks.manifest import Manifest
from tasks.table import TASKS
from tasks.task import Task
from tasks.training import TaskTrainer
from vlreft.training.answers import read_answers

FOLDERS = official_vqa.FOLDERS | official_captions.FOLDERS | official_text.FOLDERS
DEMO = [name for name in TASKS if name.startswith("demo_")]
OWN = [name for name in DEMO if TASKS[name].parts.train is None]  # what the demo models could do before
TRAINED = [name for name in TASKS if name not in OWN]
FIRST = ("pope", *{TASKS[name].kind: name for name in TRAINED}.values())  # one of each kind, and one of other data
QUICK = ["--max-steps", "2", "--batch-size", "4", "--rank", "2", "--eval-batch-size", "8", "--max-new-tokens", "4"]
QUIET = ["--set", "disable_tqdm=true"]
ROOT = Path(__file__).parent.parent


def make(name, root):
    """Make the official files of a task, and of the one that it is trained on; return the options that name them."""
    task = TASKS[name]
    if name in DEMO:
        return ["--num-train", "24", "--num-dev", "8", "--num-test", "40"]
    options = []
    for flag, needed in (("--data", name), ("--train-data", task.parts.train_on)):
        if needed is not None:
            (root / needed).mkdir(parents=True)
            FOLDERS[needed](root / needed)
            options += [flag, str(root / needed)]
    source = TASKS[task.parts.train_on or name]
    return options if source.parts.dev else [*options, "--num-dev", "4"]


def start(name, options, output, *more):
    data = command.main([name, *options, "--output", str(output), *QUICK, *QUIET, *more])
    assert data is not None
    return data


def answers_in(output):
    """Return every file of answers to the test, by name."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.glob("test*/*/*.jsonl"))}


def test_every_task_has_its_files_made_here():
    assert set(TASKS) == set(FOLDERS) | set(DEMO)


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
)
def test_a_task_runs_end_to_end(name, tmp_path):
    output = tmp_path / "run"
    data = start(name, make(name, tmp_path), output)
    task = TASKS[name]
    assert set(data["test"]["scores"]) == set(task.parts.tests)
    for part, scores in data["test"]["scores"].items():
        (adapter,) = scores["adapters"]
        assert math.isfinite(adapter["value"])
        assert adapter["over"]
        num_rows = data["data"][part]["num_rows"]
        for score in (scores["base"], adapter):
            assert len(read_answers(output / score["answers"])) == num_rows
            submission = (output / score["answers"]).with_suffix(".submission.jsonl").read_text().splitlines()
            assert len([json.loads(entry) for entry in submission]) == num_rows
    (trial,) = data["trials"]
    assert trial["steps"] == 2
    assert sum(trial["num_trained"].values()) == sum(math.prod(shape) for shape in trial["trained"].values())
    assert len(data["test"]["openings"]) == 1
    page = (output / "report.html").read_text()
    assert task.name in page
    assert not (output / "trials" / trial["name"] / "checkpoints").exists()


@pytest.mark.parametrize("name", OWN)
def test_a_base_still_does_what_it_learnt(name, tmp_path):
    data = command.main([name, "--base-only", "--num-test", "40", "--output", str(tmp_path / "run"), *QUIET])
    assert data["test"]["scores"]["test"]["base"]["value"] > 0.75


def test_a_task_of_the_hub_runs_end_to_end(tmp_path, monkeypatch):
    """With a data set as the hub has it, pictures inside; nothing is downloaded here."""
    (tmp_path / "files").mkdir()
    FOLDERS["textvqa"](tmp_path / "files")
    read, asked = TASKS["textvqa"], []

    def on_the_hub(name, config, split):
        asked.append((name, config, split))
        rows = list(read.load({"train": "train", "validation": "val"}[split], tmp_path / "files"))
        columns = {
            "question_id": [int(row["id"]) for row in rows],
            "image": [{"bytes": Path(row["image"]["path"]).read_bytes(), "path": None} for row in rows],
            "question": [row["question"] for row in rows],
            "answers": [row["references"] for row in rows],
        }
        data = datasets.Dataset.from_dict(columns)
        return data.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", on_the_hub)
    hub = start("textvqa", ["--num-dev", "4"], tmp_path / "hub")
    files = start("textvqa", ["--num-dev", "4", "--data", str(tmp_path / "files")], tmp_path / "run")
    assert {(name, split) for name, _, split in asked} == {(read.hub.name, "train"), (read.hub.name, "validation")}
    assert hub["data"]["val"]["num_rows"] == files["data"]["val"]["num_rows"]
    assert hub["test"]["scores"]["val"]["base"]["value"] == files["test"]["scores"]["val"]["base"]["value"]
    base = [(tmp_path / name / "test/val/base.jsonl").read_bytes() for name in ("hub", "run")]
    assert base[0] == base[1]


# The same again ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_answers(tmp_path):
    options = make("vqav2", tmp_path)
    first, second = (
        start("vqav2", options, tmp_path / name, "--lr", "1e-2", "1e-3", "--seeds", "3", "4") for name in "ab"
    )
    assert answers_in(tmp_path / "a") == answers_in(tmp_path / "b")
    assert first["selection"]["lr"] == second["selection"]["lr"]
    assert len(first["trials"]) == 3
    assert [trial["adapter_sha256"] for trial in first["trials"]] == [t["adapter_sha256"] for t in second["trials"]]
    seeds = [read_answers(tmp_path / "a" / s["answers"]) for s in first["test"]["scores"]["val"]["adapters"]]
    assert len(seeds) == 2


def test_a_finished_run_is_shown_and_not_made_again(tmp_path, capsys):
    options = make("vqav2", tmp_path)
    first = start("vqav2", options, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.jsonl")}
    shown = capsys.readouterr().out
    assert start("vqav2", options, tmp_path / "run") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.jsonl")} == before
    assert shown.endswith(capsys.readouterr().out)


def wait_for(found, process, seconds=120):
    until = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until, "what to kill it at never came"
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    """Killed twice by SIGKILL: while it trains, after its first checkpoint, and while it answers the test."""
    options = [*make("demo_code", tmp_path), "--epochs", "3", "--max-steps", "-1", "--num-test", "400"]
    whole = start("demo_code", options, tmp_path / "whole", *options)
    cut = tmp_path / "cut"
    line = [sys.executable, "-m", "tasks.run", "demo_code", *options, "--output", str(cut), *QUICK, *options, *QUIET]
    trials, tests = cut / "trials", cut / "test" / "test"
    moments = (
        lambda: any(trials.glob("*/checkpoints/checkpoint-*/trainer_state.json")),
        lambda: any(path.stat().st_size for path in tests.glob("adapter-0.jsonl")),
    )
    for moment in moments:
        process = subprocess.Popen(
            line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
        )
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    held = json.loads((cut / "manifest.json").read_text())
    assert "selection" in held
    assert "finished" not in held["test"]["openings"][-1]
    assert 0 < len(read_answers(tests / "adapter-0.jsonl")) < 400
    ended = start("demo_code", options, cut, *options)
    assert answers_in(cut) == answers_in(tmp_path / "whole")
    assert [t["adapter_sha256"] for t in ended["trials"]] == [t["adapter_sha256"] for t in whole["trials"]]
    assert ended["test"]["scores"] == whole["test"]["scores"]
    assert len(ended["test"]["openings"]) == 1


@pytest.mark.slow
def test_a_run_that_died_after_its_training_trains_no_more(tmp_path, monkeypatch):
    options = make("vqav2", tmp_path)
    whole = start("vqav2", options, tmp_path / "whole", "--epochs", "2", "--max-steps", "-1")

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "add_trial", dies)
        with pytest.raises(KeyboardInterrupt):
            start("vqav2", options, tmp_path / "cut", "--epochs", "2", "--max-steps", "-1")
    steps = []
    monkeypatch.setattr(TaskTrainer, "training_step", lambda *_, **__: steps.append(1))
    ended = start("vqav2", options, tmp_path / "cut", "--epochs", "2", "--max-steps", "-1")
    assert steps == []
    assert [t["adapter_sha256"] for t in ended["trials"]] == [t["adapter_sha256"] for t in whole["trials"]]
    assert [t["dev"] for t in ended["trials"]] == [t["dev"] for t in whole["trials"]]


# The sealed test -----------------------------------------------------------------------------------------------------


class Watch:
    """What is opened below a folder, and whether the manifest said by then that the test is open."""

    def __init__(self):
        self.folder, self.manifest, self.seen, self.is_on = "", Path(), [], False
        sys.addaudithook(self)  # for good: hooks cannot be removed

    def __call__(self, event, arguments):
        if self.is_on and event == "open" and str(arguments[0]).startswith(self.folder):
            self.is_on = False
            is_open = self.manifest.exists() and bool(json.loads(self.manifest.read_text())["test"]["openings"])
            self.seen.append((Path(str(arguments[0])), is_open))
            self.is_on = True


WATCH = Watch()
OWN_TEST_FILES = {  # what belongs to the sealed part alone, by name
    "vqav2": "val",
    "gqa": "testdev",
    "pope": "coco_pope",
    "captions": "test",
    "fewshot": "/test/",
    "commonsense": "test.json",
}


@pytest.mark.parametrize("name", OWN_TEST_FILES)
def test_no_file_of_the_test_is_opened_before_the_selection_is_final(name, tmp_path, monkeypatch):
    options, output = make(name, tmp_path), tmp_path / "run"
    monkeypatch.setattr(WATCH, "folder", str(tmp_path / name))
    monkeypatch.setattr(WATCH, "manifest", output / "manifest.json")
    monkeypatch.setattr(WATCH, "seen", [])
    WATCH.is_on = True
    try:
        start(name, options, output)
    finally:
        WATCH.is_on = False
    folder = tmp_path / name
    of_test = [is_open for path, is_open in WATCH.seen if OWN_TEST_FILES[name] in f"/{path.relative_to(folder)}"]
    assert of_test
    assert all(of_test)
    assert any(not is_open for _, is_open in WATCH.seen) or name == "pope"  # the watch sees what is read before


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FIRST else pytest.mark.slow) for n in TRAINED])
def test_no_part_of_the_test_is_loaded_before_the_selection_is_final(name, tmp_path, monkeypatch):
    options, output, loaded = make(name, tmp_path), tmp_path / "run", []
    load = Task.load

    def watched(self, part, folder=None):
        manifest = output / "manifest.json"
        loaded.append(
            (self.name, part, manifest.exists() and bool(json.loads(manifest.read_text())["test"]["openings"]))
        )
        return load(self, part, folder)

    monkeypatch.setattr(Task, "load", watched)
    start(name, options, output)
    tests = [is_open for task, part, is_open in loaded if task == name and part in TASKS[name].parts.tests]
    assert tests
    assert all(tests)


def test_a_second_look_wants_a_reason_and_stays_on_record(tmp_path):
    options = make("vqav2", tmp_path)
    start("vqav2", options, tmp_path / "run")
    manifest = Manifest(tmp_path / "run", json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"])
    with pytest.raises(ValueError, match=r"the test was opened on .*--reopen REASON"):
        manifest.open_test(None)
    again = start("vqav2", options, tmp_path / "run", "--reopen", "a typo in the prompt")
    assert [opening["reason"] for opening in again["test"]["openings"]] == ["first", "a typo in the prompt"]
    assert all("finished" in opening for opening in again["test"]["openings"])
    found = answers_in(tmp_path / "run")
    assert found["test/val/adapter-0.jsonl"] == found["test-2/val/adapter-0.jsonl"]
    assert "a typo in the prompt" in (tmp_path / "run" / "report.html").read_text()


def test_the_test_is_sealed_before_the_selection_and_trials_after_it(tmp_path):
    manifest = Manifest(tmp_path, {})
    with pytest.raises(ValueError, match="sealed"):
        manifest.open_test("please")
    manifest.select({"lr": 1.0})
    with pytest.raises(ValueError, match="selection of this run is final"):
        manifest.add_trial({"name": "late"})


def test_an_adapter_and_a_base_are_tested_without_training(tmp_path):
    options = make("vqav2", tmp_path)
    trained = start("vqav2", options, tmp_path / "run", "--lr", "3e-2")
    adapter = tmp_path / "run" / trained["selection"]["adapters"][0]
    tested = start("vqav2", options, tmp_path / "adapter", "--adapter", str(adapter))
    base = start("vqav2", options, tmp_path / "base", "--base-only")
    scores = trained["test"]["scores"]["val"]
    assert tested["test"]["scores"]["val"]["adapters"][0]["value"] == scores["adapters"][0]["value"]
    assert base["test"]["scores"]["val"]["base"]["value"] == scores["base"]["value"]
    assert base["test"]["scores"]["val"]["adapters"] == []
    assert tested["trials"] == base["trials"] == []


# Comparing -----------------------------------------------------------------------------------------------------------


def compared(capsys, *folders):
    capsys.readouterr()
    bootstrap.main([str(folder) for folder in folders])
    return capsys.readouterr().out


@pytest.mark.slow
def test_runs_are_compared_on_what_they_answered(tmp_path, capsys):
    options = make("demo_code", tmp_path)
    for name, rate in (("good", "3e-2"), ("poor", "1e-6")):
        start("demo_code", options, tmp_path / name, "--lr", rate, "--epochs", "6", "--max-steps", "-1", *options)
    scores = {name: score_of(tmp_path / name) for name in ("good", "poor")}
    assert scores["good"] > scores["poor"]
    shown = compared(capsys, tmp_path / "good", tmp_path / "poor")
    assert f"{100 * (scores['good'] - scores['poor']):+.2f}" in shown
    assert "10,000 resamples of 40 rows" in shown
    assert "its base" in compared(capsys, tmp_path / "good")


def score_of(folder):
    return json.loads((folder / "manifest.json").read_text())["test"]["scores"]["test"]["adapters"][0]["value"]


@pytest.mark.slow
def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    options = make("demo_code", tmp_path)
    start("demo_code", options, tmp_path / "a")
    start("demo_code", options, tmp_path / "b", "--num-test", "20")
    start("demo_lm_code", options, tmp_path / "c")
    for folders, message in (
        ([tmp_path / "a", tmp_path / "b"], "answered other rows of 'test'"),
        ([tmp_path / "a", tmp_path / "c"], "are runs of different tasks"),
        ([tmp_path / "nowhere"], "has no manifest.json"),
    ):
        with pytest.raises(SystemExit):
            bootstrap.main([str(folder) for folder in folders])
        assert message in capsys.readouterr().err


def test_beams_answer_as_well(tmp_path):
    data = start("demo_code", make("demo_code", tmp_path), tmp_path / "run", "--generate", "num_beams=2")
    assert data["settings"]["generation"] == {"max_new_tokens": 4, "num_beams": 2}


def test_a_recipe_gives_all_settings(tmp_path):
    data = start("commonsense", make("commonsense", tmp_path), tmp_path / "run", "--recipe", "loreft-commonsense")
    recipe, settings = vlreft.recipe("loreft-commonsense"), data["settings"]
    assert settings["config"] == json.loads(recipe.config.to_json())
    assert settings["lrs"] == [recipe.training["learning_rate"]]
    assert settings["max_length"] == recipe.collator["max_length"]
    assert settings["training"]["gradient_accumulation_steps"] == recipe.training["gradient_accumulation_steps"]
    assert len(data["selection"]["adapters"]) == len(settings["seeds"]) == max(1, len(recipe.seeds))


# What is refused -----------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, *QUICK, *QUIET])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_faults_of_the_command_are_told_in_one_line(tmp_path, capsys):
    options, output = make("vqav2", tmp_path), ["--output", str(tmp_path / "run")]
    assert "there is no task 'nonsense'; there are" in refused(capsys, "nonsense")
    assert "has the tests ['val'], not ['dev']" in refused(capsys, "vqav2", *options, *output, "--tests", "dev")
    assert "`num_dev` (=0) must be at least 1" in refused(capsys, "vqav2", *options, *output, "--num-dev", "0")
    assert "seeds none twice" in refused(capsys, "vqav2", *options, *output, "--seeds", "1", "1")
    assert "`num_dev` (=24) must be at least 1" in refused(capsys, "vqav2", *options, *output, "--num-dev", "24")
    assert "'x' must be NAME=VALUE" in refused(capsys, "vqav2", *options, *output, "--set", "x")
    assert "unexpected keyword argument 'x'" in refused(capsys, "vqav2", *options, *output, "--set", "x=1")
    assert "the model 'nowhere' cannot be loaded" in refused(capsys, "vqav2", *options, *output, "--model", "nowhere")
    assert not (tmp_path / "run").exists()  # the right command is not held up by the wrong ones
    start("vqav2", options, tmp_path / "run")
    message = refused(capsys, "vqav2", *options, *output, "--lr", "0.5")
    assert "holds a run of other settings (lrs differ)" in message
    assert message.count("\n") == 1


def test_missing_test_files_are_told_before_the_training(tmp_path, capsys):
    options = make("vqav2", tmp_path)
    for file in (tmp_path / "vqav2").glob("*val*annotations.json"):
        file.unlink()
    message = refused(capsys, "vqav2", *options, "--output", str(tmp_path / "run"))
    assert "one file of annotations for the split 'val'" in message
    assert not (tmp_path / "run").exists()


def test_a_dev_example_that_is_in_train_is_refused(tmp_path, capsys):
    options = make("fewshot_dev", tmp_path)
    train, dev = (sorted((tmp_path / "fewshot_dev" / part).rglob("*.png")) for part in ("train", "dev"))
    dev[0].write_bytes(train[0].read_bytes())
    message = refused(capsys, "fewshot_dev", *options, "--output", str(tmp_path / "run"))
    assert "is in train as well" in message
    assert dev[0].name in message
    data = start("fewshot_dev", options, tmp_path / "run", "--drop-shared")
    assert data["data"]["train"]["num_rows"] == len(train) - 1


def test_a_broken_picture_is_named_and_costs_nothing_that_was_written(tmp_path, capsys):
    options, output = make("vqav2", tmp_path), tmp_path / "run"
    pictures = sorted(
        path for path in (tmp_path / "vqav2").rglob("*") if "val" in str(path) and path.suffix in (".jpg", ".png")
    )
    whole = pictures[0].read_bytes()
    pictures[0].write_bytes(whole[: len(whole) // 2])
    message = refused(capsys, "vqav2", *options, "--output", str(output))
    assert "has an image that cannot be read" in message
    assert pictures[0].name in message
    data = json.loads((output / "manifest.json").read_text())
    assert len(data["trials"]) == 1
    adapter = output / data["trials"][0]["adapter"] / "reft_model.safetensors"
    before = adapter.read_bytes()
    pictures[0].write_bytes(whole)
    ended = start("vqav2", options, output)
    assert "finished" in ended["test"]["openings"][0]
    assert adapter.read_bytes() == before


def test_an_answer_beyond_the_limit_is_refused_or_cut(tmp_path, capsys):
    options = ["--num-train", "24", "--num-dev", "8", "--num-test", "8", "--max-length", "75"]
    message = refused(capsys, "demo_short", *options, "--output", str(tmp_path / "run"))
    assert re.search(r"sample '\d+' .* more than `max_length` \(=75\)", message)
    data = start("demo_short", options, tmp_path / "cut", "--overflow", "cut")
    assert data["settings"]["overflow"] == "cut"


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, capsys, monkeypatch):
    options = make("vqav2", tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)  # Pillow raises beyond twice as many
    message = refused(capsys, "vqav2", *options, "--output", str(tmp_path / "run"))
    assert "decompression bomb" in message
    assert "has an image that cannot be read" in message


def test_data_that_changed_since_a_run_began_are_refused(tmp_path, capsys):
    options, output = make("vqav2", tmp_path), tmp_path / "run"
    start("vqav2", options, output)
    (file,) = (tmp_path / "vqav2").glob("*val*_questions.json")
    file.write_text(file.read_text().replace("what", "which", 1))
    message = refused(capsys, "vqav2", *options, "--output", str(output), "--reopen", "because")
    assert "the data of 'val' have changed since this run began" in message


def test_the_list_names_every_task_and_its_sources(capsys):
    command.main(["--list"])
    shown = capsys.readouterr().out
    for name, task in TASKS.items():
        assert f"{name}: {task.title}" in shown
        assert all(source in shown for source in task.sources)
