"""Placement learned in one run: an edit at every place, each behind a gate that pays for the numbers that it keeps.

A gate is a hard-concrete one (Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0
regularization", arXiv 1712.01312, section 2.2): it multiplies an edit by a sample in training, by its deterministic
value else. The penalty is a price on the expected number of trained numbers, which rises until that is affordable.

Shape suffixes: G = gates.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import vlreft
from tasks.methods.method import Adapted, Choice, Space, rates
from tasks.methods.reft import ReftMethod, slots_of
from tasks.search.trial import Fidelity, Result, Watch, Workbench
from tasks.setups import Setup
from tasks.training import Job, Scoring, TaskTrainer
from vlreft.edit import Edit
from vlreft.models.sites import find_sites
from vlreft.positions import parse_positions
from vlreft.reft import find_only_reft

# The paper's own: temperature, and how far the concrete distribution is stretched over both ends of [0, 1].
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 2.0  # log alpha: nearly open
GATE_RATE = 0.1  # learning rate of log alpha; no weight decay
# The price of all places' numbers together, in the loss' own unit; it rises by an equal factor at each step.
FIRST_PRICE, LAST_PRICE = 1e-3, 1e2
GATED_RANK = 2
GATED_SHARE = 0.5  # of the final training's epochs


# Places --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A layer of a slot, at the slot's widest positions. num_numbers: what an intervention there trains."""

    slot: str
    site: str
    positions: str
    layer: int
    num_numbers: int


@dataclass(frozen=True)
class Placement:
    """Which places were kept, and why. scores: of each place, the gate's value or the saliency; spent: by the meter."""

    scores: Mapping[Place, float]
    kept: tuple[Place, ...]
    spent: float
    about: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_numbers(self) -> int:
        """Count what the interventions at the kept places train."""
        return sum(place.num_numbers for place in self.kept)


def layers_by_slot(places: Iterable[Place]) -> dict[str, list[int]]:
    """Return the layers of each slot that has some."""
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(place.slot, []).append(place.layer)
    return found


def by_slot(scores: Mapping[Place, float]) -> dict[str, float]:
    """Return each slot's score, the length of its layers' scores together, best first.

    Of gradients that is the length of the one with respect to all of the slot's edits.
    """
    lengths: dict[str, float] = {}
    for place, score in scores.items():
        lengths[place.slot] = math.hypot(lengths.get(place.slot, 0.0), score)
    return dict(sorted(lengths.items(), key=lambda item: -item[1]))


def places_of(setup: Setup, rank: int) -> tuple[Place, ...]:
    """Return every layer of every slot, slot by slot. Raises ValueError for a rank that one of them is too narrow for.

    Left out are layers that the model never reads. `num_numbers` is that of LoReFT of this rank.
    """
    sites, found = find_sites(setup.model).by_name, []
    for slot in slots_of(setup):
        site, positions = sites[slot.site], slot.positions[-1]
        if not 1 <= rank <= site.width:
            raise ValueError(f"`rank` (={rank}) must be from 1 to the width of site '{slot.site}', {site.width}")
        num = num_in(_intervention(slot.site, positions, [0], "loreft", rank), site.width)
        layers = site.resolve_layers("all", parse_positions(positions).segment)
        found += [Place(slot.name, slot.site, positions, layer, num) for layer in layers]
    if not found:
        raise ValueError(f"{type(setup.model).__name__} has no site that an intervention could sit at")
    return tuple(found)


def num_in(item: vlreft.Intervention, width: int) -> int:
    """Count what one module of an intervention trains."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in item.build(width).parameters())


def _intervention(
    site: str, positions: str, layers: list[int], formula: str, rank: int | None, dropout: float = 0.0
) -> vlreft.Intervention:
    """Return one that has a single module in each layer."""
    tied = "+" in positions
    return vlreft.Intervention(formula, site, layers, positions=positions, rank=rank, tied=tied, dropout=dropout)


def config_at(
    places: Sequence[Place], formula: str, rank: int | None, heads: Sequence[str] = (), dropout: float = 0.0
) -> vlreft.ReftConfig:
    """Return one intervention for each slot, with its layers; the modules come in the places' order, slot by slot."""
    by_slot: dict[tuple[str, str, str], list[int]] = {}
    for place in places:
        by_slot.setdefault((place.slot, place.site, place.positions), []).append(place.layer)
    items = [
        _intervention(site, positions, layers, formula, rank, dropout)
        for (_, site, positions), layers in by_slot.items()
    ]
    return vlreft.ReftConfig(items, heads)


def check_affordable(places: Sequence[Place], max_numbers: int) -> None:
    """Raise ValueError if no place at all is within `max_numbers`, and name the least possible."""
    least = min(places, key=lambda place: place.num_numbers)
    if max_numbers < least.num_numbers:
        raise ValueError(
            f"`max_numbers` (={max_numbers:,}) is too small for a single intervention: the least possible at this rank "
            f"is {least.num_numbers:,}, one layer of slot '{least.slot}'; give at least that, or a lower rank"
        )


def strongest(order: Mapping[Place, float], is_open: Mapping[Place, bool], max_numbers: int) -> tuple[Place, ...]:
    """Return the places to keep, in the order of `order`'s keys: greedily the best by its values that still fit.

    Closed ones are kept only where no open one fits. Raises ValueError if none fits.
    """
    check_affordable(list(order), max_numbers)
    ranked = sorted(order, key=lambda place: -order[place])
    kept = _fitting([place for place in ranked if is_open[place]], max_numbers) or _fitting(ranked, max_numbers)[:1]
    return tuple(place for place in order if place in kept)


def _fitting(ranked: Sequence[Place], max_numbers: int) -> list[Place]:
    kept, left = [], max_numbers
    for place in ranked:
        if place.num_numbers <= left:
            kept.append(place)
            left -= place.num_numbers
    return kept


@dataclass(frozen=True)
class PlacedMethod(ReftMethod):
    """LoReFT at places that are settled: any layers of each slot. What is left to choose is how it is trained."""

    name: str = "placed"
    title: str = "LoReFT, placed"
    places: tuple[Place, ...] = ()
    rank: int = 4

    def space(self, setup: Setup) -> Space:
        """Return what `ReftMethod` has for the training, and no placement."""
        return Space({}, {"learning_rate": rates(*self.learning_rates), **self.training})

    def config(self, setup: Setup, choice: Choice) -> vlreft.ReftConfig:
        """Return the interventions at these places."""
        return config_at(self.places, self.formulas[0], self.rank, setup.heads, choice.get("dropout", 0.0))


# Gates ---------------------------------------------------------------------------------------------------------------


def sampled(log_alpha_G: Tensor, u_G: Tensor) -> Tensor:
    """Return hard-concrete samples in [0, 1] from uniform ones in (0, 1): equations 10 and 11."""
    s_G = torch.sigmoid((u_G.log() - (-u_G).log1p() + log_alpha_G) / BETA)
    return (s_G * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def settled(log_alpha_G: Tensor) -> Tensor:
    """Return the deterministic values in [0, 1] that stand for the samples after training: equation 13."""
    return (log_alpha_G.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def chance_open(log_alpha_G: Tensor) -> Tensor:
    """Return the chance of each gate to be other than 0: equation 12, the expected L0."""
    return torch.sigmoid(log_alpha_G - BETA * math.log(-GAMMA / ZETA))


class Gates:
    """A gate for each of some edits. costs: the numbers that each would train; max_numbers: what all may cost.

    log_alpha_G is the one parameter; `price` what all the numbers cost together, in the loss' unit.
    """

    def __init__(self, edits: Sequence[Edit], costs: Sequence[int], max_numbers: int) -> None:
        self.edits, self.max_numbers = tuple(edits), max_numbers
        device = next(self.edits[0].parameters()).device
        self.cost_G = torch.tensor([float(cost) for cost in costs], device=device)
        self.log_alpha_G = nn.Parameter(torch.full((len(self.edits),), START, device=device))
        self.price = FIRST_PRICE

    def sample(self) -> Tensor:
        """Draw a value for each gate from torch's generator."""
        tiny = torch.finfo(torch.float32).eps
        return sampled(self.log_alpha_G, torch.rand_like(self.log_alpha_G).clamp(tiny, 1.0 - tiny))

    def values(self) -> Tensor:
        """Return the deterministic values, without a graph."""
        return settled(self.log_alpha_G.detach())

    def expected_numbers(self) -> Tensor:
        """Return how many trained numbers are behind open gates, in expectation."""
        return (chance_open(self.log_alpha_G) * self.cost_G).sum()

    def penalty(self) -> Tensor:
        """Return what the expected numbers cost."""
        return self.price * self.expected_numbers() / self.cost_G.sum()

    def raise_price(self, num_steps: int) -> None:
        """Raise the price by a step of `num_steps` from the first to the last, while too many numbers are kept."""
        if float(self.expected_numbers().detach()) > self.max_numbers:
            self.price *= (LAST_PRICE / FIRST_PRICE) ** (1 / num_steps)

    @contextmanager
    def acting(self, values_G: Tensor) -> Iterator[None]:
        """Multiply each edit by its value inside; afterwards, also after an exception, `scale` is what it was."""
        before = [edit.scale for edit in self.edits]
        try:
            for edit, scale, value in zip(self.edits, before, values_G.unbind(), strict=True):
                # Broadcasts over the states as the number that it stands in for does, and has a gradient.
                edit.scale = cast(float, scale * value.to(next(edit.parameters()).device))
            yield
        finally:
            for edit, scale in zip(self.edits, before, strict=True):
                edit.scale = scale


class Pricing(TrainerCallback):
    """Raises the price after each step, and clears the gates' gradients, which no model does: they are in none."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do both."""
        self.gates.log_alpha_G.grad = None
        self.gates.raise_price(state.max_steps)


class GatedTrainer(TaskTrainer):
    """Trains interventions and their gates, these in a group of the optimiser's own; no checkpoint has the gates.

    Raises ValueError for several processes, between which gradients of gates would not be averaged.
    """

    def __init__(self, job: Job, *, keep_prefixes: vlreft.KeptPrefixes | None, gates: Gates) -> None:
        if job.args.world_size > 1:
            raise ValueError(f"gates are trained in one process, there are {job.args.world_size}")
        super().__init__(replace(job, callbacks=[*job.callbacks, Pricing(gates)]), keep_prefixes=keep_prefixes)
        self.gates = gates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the trainer's own, and let it train the gates too."""
        optimizer = super().create_optimizer(model)
        optimizer.add_param_group({"params": [self.gates.log_alpha_G], "lr": GATE_RATE, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a step behind one sample of the gates, backward pass included; return the loss without the penalty."""
        with self.gates.acting(self.gates.sample()):
            loss = super().training_step(model, inputs, num_items_in_batch)
        # Data do not enter it, so it has a backward pass of its own, in equal parts where gradients are accumulated.
        (self.gates.penalty() / self.current_gradient_accumulation_steps).backward()
        return loss

    def answer(self, rows: datasets.Dataset, path: Path, *, base: bool = False, replace: bool = False) -> list[Any]:
        """Answer with the gates' deterministic values."""
        with self.gates.acting(self.gates.values()):
            return super().answer(rows, path, base=base, replace=replace)

    def answers_key(self) -> str:
        """Return a hash of the gates' values too."""
        return f"{super().answers_key()} {self.gates.values().tolist()}"


# Learning a placement ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gated(Adapted):
    """A base with interventions behind gates, which are not part of what is trained and saved."""

    gates: Gates | None = None


@dataclass(frozen=True)
class GatedMethod(PlacedMethod):
    """LoReFT at all of the places, each behind a gate. max_numbers: what the gates may keep, by the places' count."""

    name: str = "gated"
    max_numbers: int = 0

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Attach the interventions inside, with their gates."""
        with super().adapted(setup, choice) as adapted:
            edits = [cast(Edit, edit) for edit in find_only_reft(setup.model).edits.values()]
            gates = Gates(edits, [place.num_numbers for place in self.places], self.max_numbers)
            yield Gated(adapted.model, adapted.parameters, adapted.save_own, adapted.load_own, gates)


class GatedBench(Workbench):
    """A workbench whose trainings are of gates; `gates` are those of the last one."""

    gates: Gates

    def _training(
        self,
        method: Any,
        adapted: Adapted,
        choice: Choice,
        fidelity: Fidelity,
        seed: int,
        folder: Path,
        watch: Watch,
    ) -> Scoring:
        assert isinstance(adapted, Gated)
        assert adapted.gates is not None
        self.gates = adapted.gates
        # The gates go on to move at the same rate while the price rises.
        arguments = {**self._arguments(choice, fidelity, seed, folder), "lr_scheduler_type": "constant_with_warmup"}
        args, dev = TrainingArguments(**arguments), self.dev_rows(fidelity.num_dev)
        job = Job(self.task, self.setup, args, folder, self.train, dev, [watch])
        made = GatedTrainer(job, keep_prefixes=self.prefixes, gates=self.gates)
        made.silence()
        return made


def learn(
    bench: Workbench,
    max_numbers: int,
    rank: int,
    fidelity: Fidelity,
    *,
    learning_rate: float,
    seed: int = 0,
    limit: float = math.inf,
) -> tuple[Placement, Result]:
    """Train once with gates at all places; return the strongest within `max_numbers`, and what came of the training.

    rank: of the interventions that will be finished, by which places are counted; behind gates they have a low one.
    Raises ValueError if `max_numbers` is too small for any place, or the training was cut off by `limit`.
    """
    places = places_of(bench.setup, rank)
    check_affordable(places, max_numbers)
    method = GatedMethod(places=places, rank=min(rank, GATED_RANK), max_numbers=max_numbers)
    gated = GatedBench(**{one.name: getattr(bench, one.name) for one in fields(Workbench)})
    short = replace(fidelity, epochs=fidelity.epochs * GATED_SHARE)
    result = gated.run(method, {"learning_rate": learning_rate}, short, seed=seed, limit=limit)
    if result.stopped:
        need = result.spent / max(1, result.steps) * result.num_steps
        raise ValueError(
            f"the gates' training of {result.num_steps} steps was cut off after {result.steps} ({result.stopped}); it "
            f"takes about {need:.3g} {bench.meter.unit} by itself: give more budget, or fewer epochs"
        )
    return _kept(gated.gates, places, result.spent), result


def _kept(gates: Gates, places: Sequence[Place], spent: float) -> Placement:
    values = dict(zip(places, gates.values().tolist(), strict=True))
    order = dict(zip(places, gates.log_alpha_G.tolist(), strict=True))  # values that are cut off at 1 are equal
    kept = strongest(order, {place: value > 0 for place, value in values.items()}, gates.max_numbers)
    about = {"price": gates.price, "expected_numbers": float(gates.expected_numbers().detach())}
    return Placement(values, kept, spent, about)
