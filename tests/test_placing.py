"""`tasks.search.placing`: gates are the paper's, gradients the loss' own, budgets are kept, the base comes back."""

import json
import math
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import hooks_of_vlreft
from tiny import llama, text_batch
from torch import nn
from zoo import shake

import vlreft
from tasks import run as run_command
from tasks.protocol import Settings
from tasks.search import gates as gating
from tasks.search.budget import Budget
from tasks.search.command import make_bench
from tasks.search.gates import (
    Gates,
    Place,
    PlacedMethod,
    chance_open,
    config_at,
    layers_by_slot,
    learn,
    places_of,
    sampled,
    settled,
    strongest,
)
from tasks.search.placing import main, tune
from tasks.search.saliency import guess
from tasks.search.trial import Fidelity
from tasks.table import TASKS
from tasks.training import TaskTrainer
from vlreft.layout import prompt_from_labels
from vlreft.models.sites import find_sites

ASSETS = Path(__file__).parent.parent / "assets"
FEW = ["--num-train", "16", "--num-dev", "4", "--epochs", "1", "--batch-size", "8", "--threads", "1"]
BLIND = Fidelity(2.0, 0, ())
NUM = 2 * 4 * 128 + 4  # of LoReFT of rank 4 in the demo models


def make(task="demo_lm_code", model="demo-lm", num_train=16):
    settings = Settings(
        task=task,
        model=str(ASSETS / model),
        num_train=num_train,
        num_dev=4,
        training={"per_device_train_batch_size": 8},
        eval_batch_size=4,
    )
    return make_bench(TASKS[task], settings, Budget(1, "trials"))


@pytest.fixture(scope="module")
def bench():
    return make()


@pytest.fixture(scope="module")
def vision_bench():
    return make("demo_refuse", "demo-llava")


@contextmanager
def untouched(model):
    """Assert that a model comes back as it was, also from what raises."""

    def state():
        flags = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
        return (
            {key: value.clone() for key, value in model.state_dict().items()},
            flags,
            list(dict(model.named_modules())),
        )

    before = state()
    try:
        yield
    finally:
        now = state()
        assert now[0].keys() == before[0].keys()
        assert [name for name, value in before[0].items() if not value.equal(now[0][name])] == []
        assert now[1:] == before[1:]
        assert hooks_of_vlreft(model) == []


def fail(*_, **__):
    raise KeyError


# Gates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-6.0, -1.5, 0.0, 0.7, 4.0])
def test_gates_are_hard_concrete(log_alpha):
    """Against the paper's distribution function, Q(s) = sigmoid(beta log(s / (1 - s)) - log alpha), in plain floats."""
    beta, gamma, zeta = 2 / 3, -0.1, 1.1

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def below(z):
        s = (z - gamma) / (zeta - gamma)
        return sigmoid(beta * math.log(s / (1 - s)) - log_alpha)

    log_alpha_G = torch.tensor([log_alpha], dtype=torch.float64)
    u_G = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z_G = sampled(log_alpha_G, u_G)
    assert float(z_G.min()) >= 0
    assert float(z_G.max()) <= 1
    for z in (0.0, 0.3, 0.8):
        assert float((z_G <= z).double().mean()) == pytest.approx(below(z), abs=2e-5)
    assert float((z_G == 1).double().mean()) == pytest.approx(1 - below(1.0), abs=2e-5)
    assert float(chance_open(log_alpha_G)) == pytest.approx(1 - below(0.0), rel=1e-9)
    mean = min(1.0, max(0.0, sigmoid(log_alpha) * (zeta - gamma) + gamma))
    assert float(settled(log_alpha_G)) == pytest.approx(mean, rel=1e-9)


def test_gates_stay_in_their_range_at_the_ends():
    log_alpha_G = torch.tensor([-80.0, 80.0], requires_grad=True)
    gates = Gates([nn.Linear(1, 1)] * 2, [1, 1], 1)  # pyright: ignore
    gates.log_alpha_G = nn.Parameter(log_alpha_G.detach())
    for _ in range(100):
        assert gates.sample().tolist() == gates.values().tolist() == [0.0, 1.0]
    (gates.sample().sum() + gates.penalty()).backward()
    assert bool(torch.isfinite(gates.log_alpha_G.grad).all())


def gated_llama():
    model = llama().double()
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=2, positions="prompt")))
    edits = list(shake(reft).edits.values())
    return model, reft, Gates(edits, [10, 20, 30], 30)  # pyright: ignore


def test_the_gradient_of_a_gate_is_that_of_the_loss():
    model, _, gates = gated_llama()
    batch, u_G = text_batch(), torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)

    def loss(log_alpha_G):
        with gates.acting(sampled(log_alpha_G, u_G)):
            return model(**batch).logits.sin().sum()  # the model's own is in float32

    log_alpha_G = torch.tensor([-0.5, 0.1, -0.9], dtype=torch.float64, requires_grad=True)
    assert bool((sampled(log_alpha_G, u_G) > 0).all())
    torch.autograd.gradcheck(loss, log_alpha_G, eps=1e-3)  # norms are in float32
    (grad_G,) = torch.autograd.grad(loss(log_alpha_G), log_alpha_G)
    assert bool((grad_G != 0).all())


@torch.no_grad()
def test_a_gate_multiplies_its_edit_while_it_acts():
    model, reft, gates = gated_llama()
    batch = text_batch()
    with reft.disabled():
        base = model(**batch).logits
    with reft.scaled(0.5):
        half = model(**batch).logits
    whole = model(**batch).logits
    with gates.acting(torch.zeros(3)):
        assert model(**batch).logits.equal(base)
    with gates.acting(torch.full((3,), 0.5)):
        torch.testing.assert_close(model(**batch).logits, half)
        assert not half.equal(whole)
    with pytest.raises(KeyError), gates.acting(torch.zeros(3)):
        fail()
    assert [edit.scale for edit in gates.edits] == [1.0] * 3
    assert model(**batch).logits.equal(whole)


def test_the_price_rises_until_the_numbers_are_affordable():
    gates = Gates([nn.Linear(1, 1)] * 3, [10, 20, 30], 30)  # pyright: ignore
    expected = gates.expected_numbers().detach()
    assert float(expected) == pytest.approx(60 * float(chance_open(torch.tensor(gating.START))))
    optimizer = torch.optim.Adam([gates.log_alpha_G], lr=gating.GATE_RATE)
    prices = []
    for _ in range(200):
        optimizer.zero_grad()
        gates.penalty().backward()
        optimizer.step()
        before = float(gates.expected_numbers().detach())
        gates.raise_price(200)
        prices.append(gates.price)
        assert (len(prices) > 1 and prices[-1] == prices[-2]) == (before <= 30)
    assert gates.price < gating.LAST_PRICE
    expected = gates.expected_numbers().detach()
    assert float(expected) <= 30
    assert float(gates.penalty().detach()) == pytest.approx(gates.price * float(expected) / 60)


# What fits -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_the_best_that_fits():
    rng = random.Random(0)
    for _ in range(300):
        places = [Place("a", "text", "prompt", layer, rng.randint(1, 9)) for layer in range(rng.randint(1, 6))]
        scores = {place: rng.random() for place in places}
        is_open = {place: rng.random() < 0.7 for place in places}
        budget = rng.randint(min(place.num_numbers for place in places), 30)
        kept = strongest(scores, is_open, budget)
        left = budget - sum(place.num_numbers for place in kept)
        assert kept
        assert left >= 0
        opened = [place for place in places if is_open[place]]
        if any(place.num_numbers <= budget for place in opened):
            assert all(is_open[place] for place in kept)
            for place in set(opened) - set(kept):  # no room beside those that are better
                better = sum(one.num_numbers for one in kept if scores[one] > scores[place])
                assert place.num_numbers > budget - better
        else:
            assert len(kept) == 1


@pytest.mark.parametrize("how", [learn, guess])
def test_too_small_a_budget_names_the_least_possible(bench, how):
    more = {"fidelity": BLIND, "learning_rate": 1e-2} if how is learn else {}
    with untouched(bench.setup.model), pytest.raises(ValueError, match=rf"`max_numbers` \(=100\).*{NUM:,}, one layer"):
        how(bench, 100, 4, **more)
    with pytest.raises(ValueError, match=r"`rank` \(=129\) must be from 1 to .*128"):
        how(bench, 10**6, 129, **more)


def test_places_count_what_is_attached(vision_bench):
    setup = vision_bench.setup
    places = places_of(setup, 4)
    slots = {"text": [0, 1, 2, 3], "image": [0, 1, 2, 3], "response": [0, 1, 2, 3], "connector": [0]}
    assert layers_by_slot(places) == {**slots, "vision": [0, 1, 2, 3]}
    some = (places[1], places[3], places[6], places[12])
    with untouched(setup.model), PlacedMethod(places=some).adapted(setup, {"learning_rate": 1e-2}) as adapted:
        assert adapted.num_trained == sum(place.num_numbers for place in some) == 4 * NUM
    layers = {(item.site, item.positions): item.layers for item in config_at(some, "loreft", 4).interventions}
    assert layers == {("text", "question"): (1, 3), ("text", "image"): (2,), ("connector", "image"): (0,)}


# Learned -------------------------------------------------------------------------------------------------------------


def test_learning_leaves_the_base_and_keeps_the_budget(bench, monkeypatch):
    model = bench.setup.model
    seen = []
    first = Gates.__init__

    def watched(self, *args):
        first(self, *args)
        seen.append(self)

    monkeypatch.setattr(Gates, "__init__", watched)
    with untouched(model):
        found, result = learn(bench, 3 * NUM, 4, BLIND, learning_rate=1e-2)
    assert (result.steps, result.num_trained) == (2, 8 * (2 * 2 * 128 + 2))
    assert found.num_numbers == 3 * NUM
    assert len(found.kept) == 3
    assert set(found.kept) < set(found.scores) == set(places_of(bench.setup, 4))
    assert all(0 <= score <= 1 for score in found.scores.values())
    assert seen[0].log_alpha_G.detach().sub(gating.START).abs().min() > 0
    with untouched(model), pytest.raises(ValueError, match=r"was cut off after 1 .*by itself: give more budget"):
        learn(bench, 3 * NUM, 4, Fidelity(4.0, 0, ()), learning_rate=1e-2, limit=0.0)
    monkeypatch.setattr(Gates, "penalty", fail)
    with untouched(model), pytest.raises(KeyError):
        learn(bench, 3 * NUM, 4, BLIND, learning_rate=1e-2)
    monkeypatch.setattr(TaskTrainer, "compute_loss", fail)  # inside a sample
    with untouched(model), pytest.raises(KeyError):
        learn(bench, 3 * NUM, 4, BLIND, learning_rate=1e-2)
    assert len(seen) == 4
    assert [edit.scale for gates in seen for edit in gates.edits] == [1.0] * 32


def test_answers_have_the_deterministic_values(bench, monkeypatch):
    """All gates shut, the answers are the base's."""
    monkeypatch.setattr(Gates, "values", lambda self: torch.zeros_like(self.log_alpha_G.detach()))
    places = places_of(bench.setup, 2)
    method = gating.GatedMethod(places=places, rank=2, max_numbers=10**6)
    gated = gating.GatedBench(**{key: value for key, value in vars(bench).items() if key != "gates"})
    found = {}
    for rate in (1e-2, 3e-1):
        found[rate] = gated.run(method, {"learning_rate": rate}, Fidelity(2.0, None, (0.5, 1.0)))
    base = base_score(bench)
    assert [dev for one in found.values() for _, _, dev in one.curve] == [base] * 4


def base_score(bench):
    method = PlacedMethod(places=places_of(bench.setup, 2)[:1], rank=2)
    return bench.run(method, {"learning_rate": 0.0}, Fidelity(1.0, None, (1.0,))).dev


# Guessed -------------------------------------------------------------------------------------------------------------


def test_a_guess_is_the_same_twice_and_leaves_the_base(vision_bench, monkeypatch):
    model = vision_bench.setup.model
    modes = [module.training for module in model.modules()]
    with untouched(model):
        first = guess(vision_bench, 3 * NUM, 4, num_batches=1)
    second = guess(vision_bench, 3 * NUM, 4, num_batches=1)
    assert [module.training for module in model.modules()] == modes
    assert first.scores == second.scores
    assert first.kept == second.kept
    assert first.num_numbers == 3 * NUM
    assert min(first.scores.values()) == 0  # image tokens behind the last block are not read
    best = sorted(first.scores, key=lambda place: -first.scores[place])[:3]
    assert set(best) == set(first.kept)
    monkeypatch.setattr(TaskTrainer, "compute_loss", fail)
    with untouched(model), pytest.raises(KeyError):
        guess(vision_bench, 3 * NUM, 4, num_batches=1)


def test_a_score_is_the_slope_of_the_loss_times_the_length_of_the_states(bench):
    """By differences: along the direction in which the loss falls fastest, found by the place's own backward pass."""
    setup, model = bench.setup, bench.setup.model
    small = make(num_train=8)  # one batch holds all rows, in whatever order
    scores = guess(small, 3 * NUM, 4, num_batches=1).scores
    examples = setup.examples(small.train, training=True)
    batch = setup.collator(list(examples))
    batch["prompt_mask"] = prompt_from_labels(batch["labels"])
    model.eval()
    for place in (places_of(setup, 4)[number] for number in (0, 1, 3)):
        reft = vlreft.attach(model, config_at([place], "vector", None))
        try:
            (read,) = reft.read({name: value for name, value in batch.items() if name != "labels"})
            length = read.states_BKD[read.valid_BK].norm(dim=-1).mean()
            (vector_D,) = reft.parameters()
            model(**batch).loss.backward()
            direction_D, step = vector_D.grad / vector_D.grad.norm(), 1e-2 * float(length)
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    vector_D.copy_(sign * step * direction_D)
                    losses.append(float(model(**batch).loss))
            slope = (losses[0] - losses[1]) / (2 * step)
        finally:
            reft.detach()
        (score,) = (value for key, value in scores.items() if key == place)
        assert score == pytest.approx(slope * float(length), rel=0.02)


@contextmanager
def only_last(model, site):
    """Let the last block of a stack see nothing of what is before it."""
    block = find_sites(model).by_name[site].blocks[-1]

    def blind(_, args, kwargs):
        return (torch.ones_like(args[0]), *args[1:]), kwargs

    handle = block.register_forward_pre_hook(blind, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_where_one_layer_alone_can_matter_it_is_guessed(bench):
    with only_last(bench.setup.model, "text"):
        found = guess(bench, 8 * NUM, 4)
    assert {place.layer for place in found.kept} == {3}
    assert {place.layer for place, score in found.scores.items() if score > 0} == {3}
    assert {place.layer for place, score in guess(bench, 8 * NUM, 4).scores.items() if score > 0} == {0, 1, 2, 3}


@pytest.mark.slow
def test_where_one_layer_alone_can_matter_it_is_learned(bench):
    with only_last(bench.setup.model, "text"):
        found, _ = learn(bench, 4 * NUM, 4, Fidelity(240.0, 0, ()), learning_rate=1e-2)
    assert {place.layer for place in found.kept} == {3}


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "num_trials"), [("saliency", 3), ("gates", 2)])
def test_what_the_command_writes_is_what_a_run_takes(how, num_trials, tmp_path, capsys):
    arguments = ["demo_lm_code", *FEW, "--how", how, "--trials", str(num_trials), "--max-numbers", str(3 * NUM)]
    record = main([*arguments, "--output", str(tmp_path)])
    best = json.loads((tmp_path / "best.json").read_text())
    config = vlreft.ReftConfig.from_dict(best["config"])
    slots = {"text": "prompt", "response": "response"}
    layers = {slots[slot]: tuple(layers) for slot, layers in record["placement"].items()}
    assert {item.positions: item.layers for item in config.interventions} == layers
    assert {item.rank for item in config.interventions} == {4}
    assert best["num_trained"] == sum(map(len, layers.values())) * NUM <= 3 * NUM
    assert json.loads((tmp_path / "placing.json").read_text()) == json.loads(json.dumps(record))
    assert sum(place["kept"] for place in record["places"]) == sum(map(len, layers.values()))
    rates = [trial["choice"]["learning_rate"] for trial in record["trials"]]
    assert rates == ([0.01, 0.0032, 0.032] if how == "saliency" else [0.01])
    assert best["dev"] == record["dev"] == max(trial["dev"] for trial in record["trials"])
    assert record["budget"]["spent"] == num_trials
    said = capsys.readouterr().out
    assert f"with {best['num_trained']:,} numbers" in said
    assert ("no time to close" in said) == (how == "gates")


@pytest.mark.slow
def test_a_run_trains_what_was_placed(tmp_path):
    main(
        ["demo_lm_code", *FEW, "--how", "saliency", "--trials", "1", "--max-numbers", "2100", "--output", str(tmp_path)]
    )
    best = json.loads((tmp_path / "best.json").read_text())
    few = ["--num-train", "16", "--num-dev", "4", "--num-test", "4", "--output", str(tmp_path / "run")]
    data = run_command.main(["demo_lm_code", "--found", str(tmp_path / "best.json"), *few])
    assert data is not None
    assert data["settings"]["config"] == best["config"]


def test_the_command_refuses_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo_lm_code", *FEW, "--how", "gates", "--trials", "2", "--max-numbers", "5"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "the least possible at this rank is 1,028" in said
    assert "Traceback" not in said


def test_a_budget_that_lasts_for_no_training_says_what_would(bench):
    method = PlacedMethod(places=places_of(bench.setup, 4)[:1])
    full = Fidelity(4.0, None, (1.0,))
    with untouched(bench.setup.model), pytest.raises(ValueError, match="too small for placement and one training"):
        tune(bench, method, full, Budget(1e-3, "seconds"), 0.0)
    with pytest.raises(ValueError, match="was spent on the placement"):
        tune(bench, method, full, Budget(1.0, "trials"), 1.0)
