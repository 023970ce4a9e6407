"""`Search`: placement first, then how it is trained, as the ReFT paper's appendix D.2 recommends, within a budget.

The first stage trains briefly and asks only some of dev: the first kind of place with each of a few learning rates, the
other kinds with the best of these, then what TPE makes of them. What is best there is trained as long as it will be in
the end, with other learning rates and the like, and asked all of dev. In both, trials that are behind at a rung are
given up (ASHA; Li et al. 2020, "A system for massively parallel hyperparameter tuning"). The test is not known here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from tasks.methods.method import Choice, Method, Space
from tasks.search.budget import Budget
from tasks.search.study import Done, Stage
from tasks.search.trial import Fidelity, Result, Workbench

FIRST_SHARE = 0.6  # of the budget, for placement, at most
RESERVE = 1.2  # times what the final training of the best placement should cost, which is always left for it
FIRST_LENGTH = 0.5  # of the final training, for placement: at a third, what starts slowly and ends best was given up
NUM_FINALISTS = 4
NUM_DEV_FIRST = 100
NUM_RATES = 3  # learning rates that a placement is tried with, even on the method's logarithmic scale
COMMON: dict[str, BaseDistribution] = {
    "epochs": CategoricalDistribution((0.5, 1.0)),
    "warmup": CategoricalDistribution((0.0, 0.06, 0.2)),
    "weight_decay": CategoricalDistribution((0.0, 0.01)),
}


@dataclass(frozen=True)
class Found:
    """What a search ended with. choice: the best one's; done: all trials of both stages, as (stage, trial)."""

    choice: Choice
    best: Done
    done: list[tuple[str, Done]]
    importances: dict[str, dict[str, float]]
    spent: float


class Search:
    """The search of one method on one workbench; the same call goes on where another one stopped.

    epochs: how long the final training is at most. identity: what all depends on beside the space, for the studies.
    Raises: ValueError for a method that cannot adapt the base, and for studies that were made for something else.
    """

    def __init__(
        self,
        bench: Workbench,
        method: Method,
        budget: Budget,
        storage: optuna.storages.BaseStorage,
        identity: Mapping[str, Any],
        *,
        epochs: float = 5.0,
        seed: int = 0,
    ) -> None:
        self.bench, self.method, self.budget, self.epochs, self.seed = bench, method, budget, epochs, seed
        self.space: Space = method.space(bench.setup)
        if "learning_rate" not in self.space.training:
            raise ValueError(f"the search space of {method.name!r} is empty: not even a learning rate can be chosen")
        self.rates = coarse(self.space.training["learning_rate"])
        self.middle = self.rates[len(self.rates) // 2]
        self.low = Fidelity(epochs * FIRST_LENGTH, NUM_DEV_FIRST, (0.5, 1.0))
        self.full = Fidelity(epochs, None)
        self.identity = {**identity, "method": method.name, "epochs": epochs, "unit": budget.unit}
        self.storage = storage
        self._is_broad = False  # whether all kinds of places were put in line
        self.first = self._first_stage() if self.space.placement else None
        self.last: Stage | None = None

    # Stages ----------------------------------------------------------------------------------------------------------

    def _first_stage(self) -> Stage:
        space = {**self.space.placement, "learning_rate": CategoricalDistribution(self.rates)}
        name = f"{self.method.name}/placement"
        stage = Stage(self.storage, name, space, self.identity, seed=self.seed, plain=self._plain)
        first, others = self.space.starts[:1], [rate for rate in reversed(self.rates) if rate != self.middle]
        stage.start_with([{**start, "learning_rate": self.middle} for start in first])
        stage.start_with(
            [{**start, "learning_rate": rate} for start in first for rate in others], name="rates", whole=False
        )
        return stage

    def _go_on_with_places(self, stage: Stage) -> None:
        """Let the other kinds of places be tried, with the learning rate that was best for the first kind."""
        rate = next((one.choice["learning_rate"] for one in stage.best(1)), self.middle)
        stage.start_with([{**start, "learning_rate": rate} for start in self.space.starts[1:]], name="places")
        self._is_broad = True

    def _last_stage(self, finalists: list[str]) -> Stage:
        space: dict[str, BaseDistribution] = {**self.space.training, **COMMON}
        if self.first is not None:
            space["placement"] = CategoricalDistribution(tuple(finalists))
        stage = Stage(self.storage, f"{self.method.name}/training", space, self.identity, seed=self.seed)
        plain = {"epochs": 1.0, "warmup": 0.06, "weight_decay": 0.0, "learning_rate": self.middle}
        starts = [plain | ({"dropout": 0.0} if "dropout" in space else {})]
        if self.first is not None:  # each placement with the rate that was best for it
            best = {self._placed(one): one.choice["learning_rate"] for one in self.first.best(10**6)[::-1]}
            starts = [{**starts[0], "placement": one, "learning_rate": best[one]} for one in finalists if one in best]
        stage.start_with(starts)
        return stage

    def run(self) -> Found:
        """Spend what is left of the budget; return the best. Raises ValueError if it did not last for one trial."""
        if self.first is not None:
            self._spend(self.first, self.low)
            if not self.first.best(1):
                raise ValueError(self._too_small(self.first))
            self.last = self._last_stage(self.first.agree("finalists", self._finalists()))
        else:
            self.last = self._last_stage([])
        self._spend(self.last, self.full)
        return self.found()

    def found(self) -> Found:
        """Return the best of what is done."""
        assert self.last is not None
        best = self.last.best(1)
        if not best:
            raise ValueError(self._too_small(self.last))
        stages = [stage for stage in (self.first, self.last) if stage is not None]
        return Found(
            choice=whole_choice(best[0].choice),
            best=best[0],
            done=[(stage.name.rpartition("/")[2], one) for stage in stages for one in stage.done()],
            importances={stage.name.rpartition("/")[2]: stage.importances() for stage in stages},
            spent=self.spent(),
        )

    # Budget ----------------------------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Return what all processes have spent so far."""
        stages = [stage for stage in (self.first, self.last) if stage is not None]
        if self.budget.unit == "trials":
            return float(sum(len(stage.done()) for stage in stages))
        return math.fsum(stage.spent() for stage in stages)

    def _spend(self, stage: Stage, fidelity: Fidelity) -> None:
        """Make trials until the stage's part of the budget is spent."""
        counts = self.budget.unit == "trials"
        while (left := self._limit(stage) - self.spent()) > 0:
            typical = 0.0 if counts else _median([one.result.spent for one in stage.done() if one.is_whole])
            if typical > left and stage.best(1):
                return  # it would be cut off before its end
            if stage is self.first and not self._is_broad and stage.has_started():
                self._go_on_with_places(stage)
            trial = stage.ask()
            if trial is None:
                return
            choice = whole_choice(trial.params)
            report, most = stage.reporter(trial), math.inf if counts else left
            try:
                result = self.bench.run(self.method, choice, fidelity, seed=self.seed, limit=most, report=report)
            except ValueError as error:  # what was drawn goes together no better than this
                stage.fail(trial, str(error))
                if not stage.done() and trial.number >= 10 * len(self.space.starts) + 10:
                    raise
                continue
            stage.tell(trial, self._rounded(result))

    def _finalists(self) -> list[str]:
        """Return the best placements of those that what is left of the budget lasts for, if it does for any."""
        assert self.first is not None
        best, left = self.first.best(10**6), self.budget.amount - self.spent()
        if self.budget.unit != "trials":
            best = [one for one in best if self._whole_cost(one.result) <= left] or best
        return list(dict.fromkeys(map(self._placed, best)))[:NUM_FINALISTS]

    def _plain(self, choice: Choice) -> dict[str, Any]:
        return self.method.plain(self.bench.setup, choice)

    def _placed(self, done: Done) -> str:
        """Return the placement of a trial of the first stage as text."""
        choice = self._plain(done.choice)
        return json.dumps({key: value for key, value in choice.items() if key != "learning_rate"}, sort_keys=True)

    def _limit(self, stage: Stage) -> float:
        """Return what may be spent by the end of a stage: after the first, enough is left to train the best of it."""
        amount = self.budget.amount
        if stage is not self.first:
            return amount
        if self.budget.unit == "trials":
            return min(max(1, int(FIRST_SHARE * amount)), amount - 1)
        kept = [RESERVE * self._whole_cost(one.result) for one in stage.best(1)]
        return min(FIRST_SHARE * amount, amount - math.fsum(kept))

    def _whole_cost(self, result: Result) -> float:
        """Return what a training of the first stage should cost in the last."""
        num_dev = len(self.bench.dev)
        dev_ratio = num_dev / min(NUM_DEV_FIRST, num_dev)
        return (result.spent - result.dev_spent) / FIRST_LENGTH + result.dev_spent * dev_ratio

    @staticmethod
    def _rounded(result: Result) -> Result:
        return replace(result, spent=round(result.spent, 4), seconds=round(result.seconds, 4))

    def _too_small(self, stage: Stage) -> str:
        cut = [one.result for one in stage.done() if one.result.steps]
        if not cut:
            return f"the budget ({self.budget}) was spent before a single trial of {stage.name!r}; give more"
        one = min(cut, key=lambda result: result.spent / max(1, result.steps) * result.num_steps)
        whole = one.spent / max(1, one.steps) * one.num_steps
        final = whole / FIRST_LENGTH if stage is self.first else whole
        need = whole if self.first is None else FIRST_LENGTH * final + RESERVE * final
        return (
            f"the budget ({self.budget}) is too small for one trial: a training of {one.num_steps} steps takes about "
            f"{whole:.3g} {self._unit()}, and {stage.name!r} has a share of the budget; give at least {need:.3g}"
        )

    def _unit(self) -> str:
        return "seconds" if self.budget.unit == "trials" else self.budget.unit


def coarse(rates: BaseDistribution) -> tuple[float, ...]:
    """Return some learning rates of a method's, even on their scale, the ends left out."""
    assert isinstance(rates, FloatDistribution)
    low, high = math.log(rates.low), math.log(rates.high)
    steps = [low + (high - low) * number / (NUM_RATES + 1) for number in range(1, NUM_RATES + 1)]
    return tuple(float(f"{math.exp(step):.2g}") for step in steps)


def whole_choice(choice: Choice) -> dict[str, Any]:
    """Return a choice with its placement's parts beside the others."""
    rest = {key: value for key, value in choice.items() if key != "placement"}
    return {**json.loads(choice.get("placement", "{}")), **rest}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
