"""`tasks.search`: trials leave the base as it was, budgets are kept, studies go on, nothing is done twice."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from torch import nn

import vlreft
from tasks import run as run_command
from tasks.methods.method import Space
from tasks.methods.reft import OFF, ReftMethod, layers_of, slots_of
from tasks.methods.table import METHODS
from tasks.protocol import Settings
from tasks.search.__main__ import main
from tasks.search.budget import Budget, Operations, Seconds, meter_of, parse_time
from tasks.search.command import make_bench
from tasks.search.page import best_so_far, front
from tasks.search.search import Search, coarse
from tasks.search.study import Stage, open_storage
from tasks.search.trial import Fidelity, Result, Workbench
from tasks.table import TASKS

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
FEW = ["--num-train", "24", "--num-dev", "8", "--epochs", "1.5", "--batch-size", "8", "--threads", "1"]
LM = ["demo_lm_code", "--drop-shared", *FEW]
BRIEF = Fidelity(1.0, None, (0.5, 1.0))


def make(task="demo_lm_code", model="demo-lm", num_train=24, num_dev=8, **fields):
    settings = Settings(
        task=task,
        model=str(ASSETS / model),
        num_train=num_train,
        num_dev=num_dev,
        drop_shared=True,
        training={"per_device_train_batch_size": 8},
        eval_batch_size=8,
    )
    bench = make_bench(TASKS[task], settings, Budget(1, "trials"))
    for name, value in fields.items():
        setattr(bench, name, value)
    return bench


@pytest.fixture(scope="module")
def bench():
    return make()


def choice_of(bench, **on):
    names = [slot.name for slot in slots_of(bench.setup)]
    plain = {"layers": "all", "rank": 2, "formula": "loreft", "tied": False, "learning_rate": 1e-2}
    return {**dict.fromkeys(names, OFF), **plain, **on}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def result(dev=0.5, **fields):
    plain = {"num_trained": 1, "spent": 1.0, "seconds": 1.0, "steps": 4, "num_steps": 4, "peak_memory": 0}
    return Result(dev, **{**plain, **fields})


def stage(folder, space, name="loreft/placement", identity=None, **options):
    storage = open_storage(f"sqlite:///{folder / 'study.db'}")
    return Stage(storage, name, space, {"task": "a"} if identity is None else identity, **options)


# Budgets -------------------------------------------------------------------------------------------------------------


def test_times_are_read():
    assert [parse_time(text).amount for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    for text in ("30", "m", "-3m", "3 days", ""):
        with pytest.raises(ValueError, match="must be a number with s, m or h"):
            parse_time(text)
    with pytest.raises(ValueError, match="more than nothing"):
        parse_time("0s")


def test_operations_are_counted_forward_and_backward():
    layer, meter = nn.Linear(8, 16, bias=False), Operations()
    with meter.running():
        layer(torch.ones(4, 8, requires_grad=True)).sum().backward()
        assert meter.spent == 3 * 2 * 4 * 8 * 16  # forward, with respect to the input, to the weight
    with meter.running():
        assert meter.spent == 0


def test_seconds_are_those_of_the_processor_on_a_cpu():
    meter = meter_of(Budget(1, "seconds"), "cpu")
    assert isinstance(meter, Seconds)
    with meter.running():
        time.sleep(0.3)
        assert 0 <= meter.spent < 0.25


# One training --------------------------------------------------------------------------------------------------------


def test_a_trial_leaves_the_base_as_it_was(bench):
    before, choice = weights(bench.setup.model), choice_of(bench, text="prompt:l1")
    found = bench.run(ReftMethod(), choice, BRIEF)
    assert (found.steps, found.num_steps, found.stopped) == (3, 3, "")
    assert found.num_trained == 4 * (2 * 2 * 128 + 2)
    assert [step for _, step, _ in found.curve] == [2, 3]
    assert found.dev == found.curve[-1][2]
    assert found.spent >= found.curve[-1][0] > found.curve[0][0] > 0

    def fail(*_):
        raise KeyError

    with pytest.raises(KeyError):
        bench.run(ReftMethod(), choice, BRIEF, report=fail)
    after = bench.setup.model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())


def test_a_trial_is_stopped_by_its_rung_and_by_the_budget(bench):
    choice = choice_of(bench, text="prompt:l1")
    found = bench.run(ReftMethod(), choice, BRIEF, report=lambda rung, _: rung == 1)
    assert (found.steps, found.stopped) == (2, "others were better at this rung")
    found = bench.run(ReftMethod(), choice, BRIEF, limit=0.0)
    assert (found.steps, found.stopped, found.curve) == (1, "the budget was spent", [])
    assert found.dev == -math.inf


@pytest.mark.slow
def test_dev_is_of_the_tower_as_it_is_now():
    """Features that were kept at one rung are not those of the next one, where the tower is trained."""
    bench, choice = make("demo_bgr", "demo-llava", num_train=32, num_dev=32), {"part": "vision", "learning_rate": 2e-2}
    often, once = (bench.run(METHODS["full"], choice, Fidelity(1.0, None, rungs)) for rungs in ((0.125, 1.0), (1.0,)))
    assert often.curve[0][2] != once.dev
    assert often.dev == once.dev


def test_the_same_seed_gives_the_same_training(tmp_path):
    bench = make(prefixes=None)  # a kept prefix was computed in another batch: the same within rounding
    choice = choice_of(bench, text="prompt:l4", response="response")
    for name in ("a", "b"):
        bench.run(ReftMethod(), choice, BRIEF, seed=3, save_to=tmp_path / name)
    one, other = ((tmp_path / name / "reft_model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize(
    "on",
    [
        {"text": "prompt:l4"},
        pytest.param({"text": "question", "vision": "patches"}, marks=pytest.mark.slow),
        pytest.param({"image": "image"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_changes_no_result(on, tmp_path):
    """Features and prefixes of an earlier trial serve the next, and give what a trial without any gives."""
    plain = make("demo_code", "demo-llava", features=None, prefixes=None)
    kept = make("demo_code", "demo-llava")
    choice = choice_of(kept, **on)
    for bench, names in ((plain, "a"), (kept, "bc")):
        for name in names:
            bench.run(ReftMethod(), choice, BRIEF, save_to=tmp_path / name)
    one, *others = (vlreft.load(plain.setup.model, tmp_path / name, name=name) for name in "abc")
    for other in others:
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(mine, theirs, atol=2e-5)
    for reft in (one, *others):
        reft.detach()


def test_two_trials_on_one_prefix_share_it():
    bench = make("demo_code", "demo-llava")
    for positions in ("prompt:l4", "question", "prompt:l1"):
        bench.run(ReftMethod(), choice_of(bench, text=positions), BRIEF)
        if positions == "prompt:l4":
            misses, features = bench.prefixes.num_misses, bench.features.num_misses
            assert misses
            assert features
    assert bench.prefixes.num_misses == misses
    assert bench.features.num_misses <= features + 1  # how a cache of prefixes is built is seen on one row


# Spaces --------------------------------------------------------------------------------------------------------------


def test_every_choice_of_the_space_is_a_config(bench):
    llava = make("demo_code", "demo-llava")
    rng = random.Random(0)
    for one in (bench, llava):
        space = ReftMethod().space(one.setup)
        for start in space.starts:
            assert start.keys() == space.placement.keys()
            assert all(value in space.placement[name].choices for name, value in start.items())
            ReftMethod().config(one.setup, start)
        for _ in range(20):
            drawn = {name: rng.choice(space.placement[name].choices) for name in space.placement}
            if any(drawn[slot.name] != OFF for slot in slots_of(one.setup)):
                vlreft.attach(one.setup.model, ReftMethod().config(one.setup, drawn)).detach()
    assert {slot.name for slot in slots_of(llava.setup)} == {"text", "image", "response", "connector", "vision"}
    assert len(ReftMethod().space(llava.setup).starts) == 5 + 10 + 1


def test_all_off_is_refused(bench):
    with pytest.raises(ValueError, match="every slot is off"):
        ReftMethod().config(bench.setup, choice_of(bench))


def test_layers_are_shares_of_a_stack():
    assert layers_of("all", 5) == "all"
    assert layers_of("first half", 5) == [0, 1]
    assert layers_of("last half", 5) == [2, 3, 4]
    assert layers_of("every 2", 5) == [0, 2, 4]
    assert layers_of("first half", 1) == "all"


def test_coarse_rates_divide_a_logarithmic_scale():
    low, middle, high = coarse(FloatDistribution(1e-4, 1e0, log=True))
    assert (low, middle, high) == (1e-3, 1e-2, 1e-1)


def test_what_makes_no_difference_makes_no_trial():
    setup = make("demo_code", "demo-llava").setup
    method = ReftMethod()
    off = {slot.name: OFF for slot in slots_of(setup)} | {"rank": 4, "formula": "loreft"}
    same = [
        ({"text": "prompt:l4", "tied": True, "layers": "all"}, {"text": "prompt:l4", "tied": False, "layers": "all"}),
        (
            {"connector": "image", "tied": True, "layers": "all"},
            {"connector": "image", "tied": False, "layers": "every 2"},
        ),
    ]
    other = [
        (
            {"text": "question:f4+l4", "tied": True, "layers": "all"},
            {"text": "question:f4+l4", "tied": False, "layers": "all"},
        ),
        (
            {"text": "prompt:l4", "tied": True, "layers": "all"},
            {"text": "prompt:l4", "tied": True, "layers": "every 2"},
        ),
    ]
    for are_same, pairs in ((True, same), (False, other)):
        for pair in pairs:
            one, two = ({**off, **choice} for choice in pair)
            assert (method.plain(setup, one) == method.plain(setup, two)) == are_same
            assert (method.config(setup, one) == method.config(setup, two)) == are_same
            assert method.config(setup, method.plain(setup, one)) == method.config(setup, one)
    clip = make("demo_clip", "demo-clip", num_train=None, num_dev=None).setup
    assert ReftMethod().space(clip).placement["tied"].choices == (False,)


# Studies -------------------------------------------------------------------------------------------------------------


def test_trials_that_differ_in_name_alone_are_twins(tmp_path):
    space = {"a": CategoricalDistribution((1, -1, 2))}
    one = stage(tmp_path, space, plain=lambda choice: {"a": abs(choice["a"])})
    seen = []
    while (trial := one.ask()) is not None:
        seen.append(abs(trial.params["a"]))
        one.tell(trial, result())
    assert sorted(seen) == [1, 2]


def test_no_trial_is_done_twice_and_a_space_ends(tmp_path):
    one = stage(tmp_path, {"a": CategoricalDistribution((1, 2, 3))})
    seen = []
    while (trial := one.ask()) is not None:
        seen.append(trial.params["a"])
        one.tell(trial, result())
    assert sorted(seen) == [1, 2, 3]


def test_of_two_at_once_the_later_gives_way(tmp_path):
    one = stage(tmp_path, {"a": CategoricalDistribution((1, 2))})
    other = stage(tmp_path, {"a": CategoricalDistribution((1, 2))})
    first, second = one.ask(), other.ask()
    assert {first.params["a"], second.params["a"]} == {1, 2}
    assert one.ask() is None
    assert other.ask() is None


def test_a_trial_that_is_still_being_asked_for_is_waited_for(tmp_path, monkeypatch):
    """The earlier one of two twins has its number, and says only later what it is: the later one gives way even so."""
    space = {"a": CategoricalDistribution((1,))}
    one, other = stage(tmp_path, space), stage(tmp_path, space)
    early = one.study.ask()  # no parameters and no owner yet
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        early.suggest_categorical("a", (1,))
        early.set_user_attr("owner", one_owner)

    late = other.study.ask(fixed_distributions=space)
    late.set_user_attr("owner", one_owner := {"host": "h", "pid": 1, "began": 0.0})
    monkeypatch.setattr("tasks.search.study.time.sleep", sleep)
    assert other._is_repeated(late)
    assert sleeps == [0.02]
    assert not one._is_repeated(early)


def test_processes_agree_on_what_the_first_one_says(tmp_path):
    one, other = (stage(tmp_path, {"a": CategoricalDistribution((1,))}) for _ in range(2))
    assert other.agree("finalists", ["x"]) == ["x"]
    assert one.agree("finalists", ["y"]) == ["x"]


def test_what_is_behind_at_a_rung_is_given_up(tmp_path):
    one = stage(tmp_path, {"a": FloatDistribution(0, 1)})
    for value in (0.9, 0.8, 0.7):
        trial = one.ask()
        one.reporter(trial)(1, value)
        one.tell(trial, result(value))
    trial = one.ask()
    assert one.reporter(trial)(1, 0.1)
    one.tell(trial, result(0.1, stopped="others were better at this rung"))
    assert [done.is_whole for done in one.done()] == [True, True, True, False]
    assert [done.result.dev for done in one.best(2)] == [0.9, 0.8]
    assert one.spent() == 4.0


def test_equals_are_told_apart_by_what_they_train(tmp_path):
    one = stage(tmp_path, {"a": FloatDistribution(0, 1)})
    for num in (30, 10, 20):
        one.tell(one.ask(), result(1.0, num_trained=num))
    assert one.best(1)[0].result.num_trained == 10


@pytest.mark.parametrize("changed", ["task", "model", "versions", "space"])
def test_a_study_of_something_else_is_refused(changed, tmp_path):
    identity = {"task": "a", "model": "b", "versions": {"vlreft": "1"}}
    space = {"a": CategoricalDistribution((1, 2))}
    stage(tmp_path, space, identity=identity)
    stage(tmp_path, space, identity=identity)
    if changed == "space":
        space = {"a": CategoricalDistribution((1, 2, 3))}
    else:
        identity = {**identity, changed: "other"}
    with pytest.raises(ValueError, match=rf"was made for something else \({changed}: "):
        stage(tmp_path, space, identity=identity)


def test_an_empty_space_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the search space of 'loreft/placement' is empty"):
        stage(tmp_path, {})


def test_the_dead_are_buried(tmp_path):
    one = stage(tmp_path, {"a": CategoricalDistribution((1, 2))})
    trial = one.ask()
    trial.set_user_attr("owner", {**trial.user_attrs["owner"], "began": 0.0})  # a process that is no more
    other = stage(tmp_path, {"a": CategoricalDistribution((1, 2))})
    again = [other.ask().params["a"], other.ask().params["a"]]
    assert sorted(again) == [1, 2]


def test_a_storage_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").touch()
    for where in (f"sqlite:///{tmp_path}/file/x.db", "nothing://here"):
        with pytest.raises(ValueError, match="cannot be opened"):
            open_storage(where)


# Searches ------------------------------------------------------------------------------------------------------------


def search(bench, folder, budget, method=None, **options):
    storage = open_storage(f"journal:{folder / 'journal.log'}")
    return Search(bench, method or ReftMethod(), budget, storage, {"task": "x"}, epochs=1.0, **options)


def test_a_search_goes_on_where_it_stopped(bench, tmp_path):
    first = search(bench, tmp_path, Budget(4, "trials")).run()
    assert len(first.done) == 4
    again = search(bench, tmp_path, Budget(4, "trials")).run()
    assert again == first
    more = search(bench, tmp_path, Budget(7, "trials")).run()
    assert len(more.done) == 7
    assert {(kind, one.number) for kind, one in first.done} <= {(kind, one.number) for kind, one in more.done}


@pytest.mark.slow
def test_placement_comes_first_and_training_takes_the_best(bench, tmp_path):
    found = search(bench, tmp_path, Budget(8, "trials")).run()
    kinds = [kind for kind, _ in found.done]
    assert kinds == sorted(kinds)  # "placement" before "training"
    assert set(kinds) == {"placement", "training"}
    space = ReftMethod().space(bench.setup)
    assert found.choice.keys() == space.placement.keys() | space.training.keys() | {"epochs", "warmup", "weight_decay"}
    whole = [one.result.dev for kind, one in found.done if kind == "training" and one.is_whole]
    assert found.best.result.dev == max(whole)


@pytest.mark.slow
def test_a_budget_of_operations_is_metered(tmp_path):
    bench = make(meter=Operations())
    one = bench.run(ReftMethod(), choice_of(bench, text="prompt"), BRIEF)
    assert one.spent > 1e8
    assert bench.run(ReftMethod(), choice_of(bench, text="prompt"), BRIEF).spent == one.spent
    found = search(bench, tmp_path, Budget(8 * one.spent, "operations")).run()
    assert found.spent <= 8.5 * one.spent


@dataclass
class Priced:
    """A bench whose trainings cost what they are said to, and are the better the more they cost."""

    setup: Any
    price: Callable[[Mapping[str, Any]], float]
    dev: range = range(300)

    def run(self, _method, choice, fidelity, *, limit, report, **_):
        rows = 300 if fidelity.num_dev is None else fidelity.num_dev
        dev = len(fidelity.rungs) * rows * 0.01
        cost = self.price(choice) * fidelity.epochs * choice.get("epochs", 1.0) + dev
        if cost > limit:
            steps = int(100 * limit / cost)
            return Result(-math.inf, 1, limit, 1.0, steps, 100, 0, stopped="the budget was spent", dev_spent=dev)
        value = self.price(choice) / 1000
        for rung in range(len(fidelity.rungs)):
            report(rung + 1, value)
        return Result(value, 1, cost, 1.0, 100, 100, 0, dev_spent=dev)


@dataclass
class Fast:
    """A bench where the highest learning rate is best, and nothing else matters; what it was asked for, in order."""

    setup: Any
    dev: range = range(300)
    asked: list[Mapping[str, Any]] = field(default_factory=list)

    def run(self, _method, choice, fidelity, *, report, **_):
        self.asked.append(choice)
        for rung in range(len(fidelity.rungs)):
            report(rung + 1, choice["learning_rate"])
        return result(choice["learning_rate"])


def test_the_first_kind_of_place_finds_the_rate_for_the_others(bench, tmp_path):
    starts = ReftMethod().space(bench.setup).starts
    fast = Fast(bench.setup)
    search(fast, tmp_path, Budget(5, "trials")).run()
    search(fast, tmp_path, Budget(3 * len(starts), "trials")).run()  # goes on
    placed = [one for one in fast.asked if "epochs" not in one][: len(starts) + 2]
    assert [{**one, "learning_rate": 0} for one in placed] == [
        {**one, "learning_rate": 0} for one in (*starts[:1] * 3, *starts[1:])
    ]
    assert [one["learning_rate"] for one in placed] == [0.01, 0.032, 0.0032] + [0.032] * (len(starts) - 1)


@pytest.mark.parametrize("dearest", ["first", "later"])
def test_whatever_the_budget_enough_is_left_for_the_final_training(bench, tmp_path, dearest):
    def price(choice):
        on = [choice[slot.name] != OFF for slot in slots_of(bench.setup)]
        return 60.0 if all(on) == (dearest == "first") else 20.0

    # Half as long and asked less, then with the reserve, the first placement: it is the least that can be spent.
    first = price(ReftMethod().space(bench.setup).starts[0])
    least = (first / 2 + 2) + 1.2 * (first + 6)
    for number, amount in enumerate((1.05 * least, 1.5 * least, 2 * least, 3 * least, 7 * least)):
        (folder := tmp_path / str(number)).mkdir()
        found = search(Priced(bench.setup, price), folder, Budget(amount, "seconds")).run()
        assert found.best.is_whole
        assert found.spent <= amount
    assert found.best.result.dev == 0.06
    with pytest.raises(ValueError, match="too small for one trial"):
        search(Priced(bench.setup, price), tmp_path, Budget(0.5 * least, "seconds")).run()


def test_a_budget_for_less_than_a_trial_says_how_long_one_takes(bench, tmp_path):
    with pytest.raises(ValueError, match=r"too small for one trial: a training of \d+ steps takes about .* seconds"):
        search(bench, tmp_path, Budget(1e-3, "seconds")).run()


class Nothing(ReftMethod):
    def space(self, setup):
        return Space({}, {})


def test_a_method_without_a_learning_rate_is_refused(bench, tmp_path):
    with pytest.raises(ValueError, match="the search space of 'loreft' is empty"):
        search(bench, tmp_path, Budget(2, "trials"), Nothing())


def test_the_command_and_what_run_takes_of_it(tmp_path):
    record = main([*LM, "--trials", "5", "--output", str(tmp_path / "s")])
    assert record["budget"] == {"amount": 5, "unit": "trials", "spent": 5.0}
    best = json.loads((tmp_path / "s" / "best.json").read_text())
    assert vlreft.ReftConfig.from_dict(best["config"]).interventions
    page = (tmp_path / "s" / "search.html").read_text()
    assert "What no other trial beats" in page
    assert all(f"{trial['stage']} {trial['number']}" in page for trial in record["trials"])
    options = ["--found", str(tmp_path / "s" / "best.json"), "--max-steps", "2", "--num-test", "8", "--drop-shared"]
    few = ["--num-train", "24", "--num-dev", "8", "--set", "disable_tqdm=true"]
    data = run_command.main(["demo_lm_code", *options, *few, "--output", str(tmp_path / "r")])
    assert data["settings"]["config"] == best["config"]
    assert data["trials"][0]["lr"] == best["training"]["learning_rate"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["nothing", "--trials", "2"], "there is no task 'nothing'"),
        (["demo_base", "--trials", "2"], "'demo_base' has nothing to train and select on"),
        (["demo_lm_code"], "0 budgets are given"),
        (["demo_lm_code", "--trials", "2", "--budget", "3m"], "2 budgets are given"),
        (["demo_lm_code", "--budget", "soon"], "must be a number with s, m or h"),
        ([*LM, "--trials", "2", "--method", "magic"], "there is no method 'magic'"),
        ([*LM, "--trials", "2", "--storage", "nothing://here"], "cannot be opened"),
    ],
)
def test_bad_options_are_one_error(options, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*options, "--output", str(tmp_path / "s")])
    assert text in capsys.readouterr().err
    assert not (tmp_path / "s" / "search.json").exists()


def test_other_data_want_another_study(tmp_path, capsys):
    main([*LM, "--trials", "2", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        main([*LM, "--num-train", "16", "--trials", "2", "--output", str(tmp_path)])
    assert "was made for something else (data" in capsys.readouterr().err


def test_a_search_needs_no_test_files(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ASSETS / "demo-vqa" / "lm_code", folder, ignore=shutil.ignore_patterns("test*"))
    assert main([*LM, "--data", str(folder), "--trials", "2", "--output", str(tmp_path / "s")])


def command(folder, trials):
    arguments = [*LM, "--trials", str(trials), "--output", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.search", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def done_in(folder):
    """Return the parameters of the finished trials of a study, the kind of each beside them."""
    if not (folder / "study.db").exists():
        return []
    import optuna

    storage = open_storage(f"sqlite:///{folder / 'study.db'}")
    found = []
    for study in optuna.get_all_study_names(storage):
        trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
        found += [(study, json.dumps(trial.params, sort_keys=True), trial.state.name) for trial in trials]
    return found


@pytest.mark.slow
def test_a_killed_search_loses_what_was_running_alone(tmp_path):
    process = command(tmp_path, 200)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        finished = [one for one in done_in(tmp_path) if one[2] in ("COMPLETE", "PRUNED")]
        if len(finished) >= 3:
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {one[:2] for one in done_in(tmp_path) if one[2] in ("COMPLETE", "PRUNED")}
    assert len(before) >= 3
    assert command(tmp_path, len(before) + 3).wait(timeout=240) == 0
    after = done_in(tmp_path)
    assert before <= {one[:2] for one in after if one[2] in ("COMPLETE", "PRUNED")}
    assert sum(one[2] in ("COMPLETE", "PRUNED") for one in after) == len(before) + 3
    assert not [one for one in after if one[2] == "RUNNING"]


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path):
    processes = [command(tmp_path, 10) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finished = [one[:2] for one in done_in(tmp_path) if one[2] in ("COMPLETE", "PRUNED")]
    assert len(finished) == len(set(finished))
    assert 10 <= len(finished) <= 11  # each may have been at its last one


# The page ------------------------------------------------------------------------------------------------------------


def trial(dev, num=1, seconds=1.0, memory=1, stopped="", spent=1.0):
    return {
        "dev": dev,
        "num_trained": num,
        "seconds": seconds,
        "peak_memory": memory,
        "stopped": stopped,
        "spent": spent,
    }


def test_the_front_is_what_no_other_beats():
    rng = random.Random(0)
    trials = [trial(rng.randrange(5) / 5, rng.randrange(4), rng.randrange(4), rng.randrange(4)) for _ in range(60)]

    def beats(a, b):
        less = [
            a["num_trained"] <= b["num_trained"],
            a["seconds"] <= b["seconds"],
            a["peak_memory"] <= b["peak_memory"],
        ]
        same = all(a[key] == b[key] for key in ("dev", "num_trained", "seconds", "peak_memory"))
        return a["dev"] >= b["dev"] and all(less) and not same

    expected = [one for one in trials if not any(beats(other, one) for other in trials)]
    assert {id(one) for one in front(trials)} == {id(one) for one in expected}
    assert front([trial(1.0, stopped="it was"), trial(0.5)]) == [trial(0.5)]


def test_the_best_so_far_only_rises():
    points = best_so_far([trial(0.2), trial(0.9, stopped="it was"), trial(0.1), trial(0.4, spent=2.0), trial(0.3)])
    assert points == [(1.0, 0.2), (5.0, 0.4), (6.0, 0.4)]
    assert best_so_far([]) == []


def test_a_workbench_is_a_task_and_a_base(bench):
    assert isinstance(bench, Workbench)
    assert (len(bench.train), len(bench.dev)) == (24, 8)
    assert len(bench.dev_rows(4)) == 4
    assert bench.dev_rows(None) is bench.dev
