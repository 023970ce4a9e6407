"""`tasks.compare`: equal budgets, a test that nobody reads before all is chosen, what was forgotten, what it costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.compare.__main__ import main
from tasks.compare.comparison import possible
from tasks.compare.overview import main as show
from tasks.compare.overview import overview
from tasks.methods.table import METHODS
from tasks.protocol import Settings
from tasks.search.budget import Budget
from tasks.search.command import make_bench
from tasks.table import TASKS
from vlreft.training.answers import read_answers

ROOT = Path(__file__).parent.parent
FEW = [
    "--num-train",
    "24",
    "--num-dev",
    "8",
    "--num-test",
    "40",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--threads",
    "1",
]
LM = ["demo_lm_code", "--drop-shared", *FEW, "--trials", "3", "--seeds", "2"]
THREE = ["--methods", "loreft", "lora", "head"]
# peft asks transformers for what is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, main([*LM, *THREE, "--output", str(folder)])


@pytest.mark.slow
def test_every_method_has_its_line(compared):
    folder, data = compared
    assert [line["name"] for line in data["lines"]] == ["loreft", "lora", "head"]
    for line in data["lines"]:
        assert line["num_trials"] == 3
        assert line["spent"] == 3
        values = [score["value"] for score in scores_of(data, line["name"])]
        assert line["test"] == pytest.approx(np.mean(values))
        assert line["test_sd"] == pytest.approx(np.std(values, ddof=1))
        assert line["num_trained"] > 0
        assert 4 * line["num_trained"] <= line["num_bytes"] <= 4 * line["num_trained"] + 20_000
        trials = data["methods"][line["name"]]["trials"]
        assert 0 < line["step"] < 1e3 * max(trial["spent"] / trial["steps"] for trial in trials)  # without dev's
        assert line["prefill"] > 0
        assert line["peak_memory"] > 1e8
    page = (folder / "compare.html").read_text()
    assert all(METHODS[name].title in page for name in ("loreft", "lora", "head"))


def scores_of(data, name, part="demo_lm_code/test"):
    return data["methods"][name]["test"]["scores"][part]["adapters"]


@pytest.mark.slow
def test_scores_are_those_of_the_answers(compared):
    folder, data = compared
    rows = list(TASKS["demo_lm_code"].load("test").shuffle(seed=0).select(range(40)))
    for name in ("loreft", "lora", "head"):
        for score in scores_of(data, name):
            answers = read_answers(folder / score["answers"])
            right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
            assert score["value"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_what_was_forgotten_is_told(compared):
    _, data = compared
    assert data["plan"]["own"] == ["demo_lm_base"]
    assert data["base"]["demo_lm_base/test"] > 0.5
    for line in data["lines"]:
        values = [score["value"] for score in scores_of(data, line["name"], "demo_lm_base/test")]
        assert line["own"] == {"demo_lm_base": pytest.approx(np.mean(values))}


@pytest.mark.slow
def test_differences_are_paired_and_corrected(compared):
    _, data = compared
    first, *others = data["lines"]
    assert first["difference"] is None
    for line in others:
        assert line["difference"]["difference"] == pytest.approx(first["test"] - line["test"])
        assert line["p_value"] >= line["difference"]["p_value"]


@pytest.mark.slow
def test_the_test_is_opened_once_and_last(compared):
    folder, data = compared
    final = [method["selection"]["final_at"] for method in data["methods"].values()]
    openings = [method["test"]["openings"] for method in data["methods"].values()]
    assert all(len(one) == 1 for one in openings)
    assert all(one[0]["opened"] >= last for one in openings for last in final)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    again = main([*LM, *THREE, "--output", str(folder)])
    assert json.dumps(again["methods"]) == json.dumps(data["methods"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")} == before


@pytest.mark.slow
def test_other_settings_want_another_folder(compared, capsys):
    folder, _ = compared
    with pytest.raises(SystemExit):
        main([*LM, *THREE, "--epochs", "2", "--output", str(folder)])
    assert "holds a run of other settings (epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "model", "method"), [("demo_lm_code", "demo-lm", "bias"), ("demo_clip", "demo-clip", "prefix")]
)
def test_what_cannot_adapt_this_base_is_told_before_all_else(task, model, method, tmp_path, capsys):
    options = [task, "--drop-shared", *FEW, "--trials", "3", "--seeds", "2"]
    with pytest.raises(SystemExit):
        main([*options, "--methods", "loreft", method, "--output", str(tmp_path / "c")])
    assert method in capsys.readouterr().err
    assert not list(tmp_path.rglob("manifest.json"))
    settings = Settings(task=task, model=str(ROOT / "assets" / model), num_train=24, num_dev=8, drop_shared=True)
    setup = make_bench(TASKS[task], settings, Budget(1, "trials")).setup
    can, cannot = possible(list(METHODS), setup)
    assert can[0] == "loreft"
    assert method in cannot
    assert sorted([*can, *cannot]) == sorted(METHODS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--methods", "magic"], "there are no methods ['magic']"),
        (["--methods", "loreft", "loreft"], "none twice"),
        (["--methods", "loreft", "--own", "nothing"], "there are no tasks ['nothing']"),
        (["--methods", "loreft", "--seeds", "0"], "need an entry"),
        (["--methods", "loreft", "--data", "assets/no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_options_are_one_error(options, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*LM, *options, "--output", str(tmp_path / "c")])
    assert text in capsys.readouterr().err
    assert not list(tmp_path.rglob("manifest.json"))


WATCHED = """
import json, sys
from pathlib import Path

folder, seen = Path(sys.argv[1]), []


def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and "lm_code" in arguments[0] and "test" in arguments[0]:
        manifests = [json.loads(path.read_text()) for path in folder.glob("c/*/manifest.json")]
        seen.append((arguments[0], [("selection" in one, len(one["test"]["openings"])) for one in manifests]))


sys.addaudithook(watch)
from tasks.compare.__main__ import main

main([*json.loads(sys.argv[2]), "--output", str(folder / "c")])
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_no_test_file_is_read_before_all_is_chosen(tmp_path):
    """Every opening of a test file, by any library, with an empty cache, and what the manifests said by then."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    methods = ["loreft", "lora", "dora", "ia3", "prompt", "norms", "head", "full"]
    options = [*LM, "--trials", "2", "--methods", *methods]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path), json.dumps(options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen
    for name, manifests in seen:
        assert len(manifests) == len(methods), name
        assert all(is_final for is_final, _ in manifests), name
        assert any(num_openings for _, num_openings in manifests), name


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tmp_path):
    arguments = [sys.executable, "-m", "tasks.compare", *LM, *THREE, "--output", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, **quiet)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (tmp_path / "lora" / "seed-0").is_dir():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    loreft = json.loads((tmp_path / "loreft" / "manifest.json").read_text())
    assert "selection" in loreft
    assert not loreft["test"]["openings"]
    data = main([*LM, *THREE, "--output", str(tmp_path)])
    for key in ("found", "trials", "selection"):
        assert data["methods"]["loreft"][key] == loreft[key]
    assert [line["num_trials"] for line in data["lines"]] == [3, 3, 3]


# Several comparisons --------------------------------------------------------------------------------------------------


def line(name, test, *, p_value=None, own=None, **costs):
    numbers = {"num_trained": 1000, "num_bytes": 4000, "step": 10.0, "peak_memory": 100} | costs
    known = {"name": name, "title": name.upper(), "test": test, "test_sd": 0.01, "p_value": p_value}
    return known | {"own": own or {}} | numbers


ONE = {
    "task": "one",
    "base": {"one/test": 0.1, "old/test": 0.9, "old/more": 0.7},
    "lines": [line("a", 0.8, own={"old": 0.7}), line("b", 0.9, p_value=0.01, own={"old": 0.8}, step=15.0)],
}
TWO = {
    "task": "two",
    "base": {"two/test": 0.2},
    "lines": [line("a", 0.6), line("c", 0.5, p_value=0.2, num_trained=3000)],
}


def test_several_comparisons_are_one_table():
    assert overview([ONE, TWO]).splitlines() == [
        "| method | one | two |",
        "| --- | ---: | ---: |",
        "| base | 0.100 | 0.200 |",
        "| A | 0.800 ± 0.010 | 0.600 ± 0.010 |",
        "| B | 0.900 ± 0.010* |  |",
        "| C |  | 0.500 ± 0.010 |",
        "",
        "| method | trained numbers | file, kB | step, of the first's | memory, of the first's | forgotten |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| A | 1,000 | 4 | 1.00 | 1.00 | 0.100 |",
        "| B | 1,000 | 4 | 1.50 | 1.00 | 0.000 |",
        "| C | 3,000 | 4 | 1.00 | 1.00 |  |",
    ]
    with pytest.raises(ValueError, match="one comparison of each task"):
        overview([ONE, ONE])


def test_an_unfinished_comparison_has_no_place_in_it(tmp_path):
    with pytest.raises(SystemExit, match="no finished comparison in"):
        show([str(tmp_path)])


@pytest.mark.slow
def test_a_comparison_has_what_the_table_takes(compared, capsys):
    folder, data = compared
    show([str(folder)])
    printed = capsys.readouterr().out
    assert [row.split(" | ")[0] for row in printed.splitlines()[3:6]] == [
        f"| {line['title']}" for line in data["lines"]
    ]
