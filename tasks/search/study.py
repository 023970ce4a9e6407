"""`Stage`: one of Optuna's studies, with what it may be asked for, whose it is, and what its trials have cost.

Studies lie in Optuna's own storage: SQLite, a journal file, or a database that several machines reach. All that is
known of a trial stands there, so that a search goes on where it was killed, and several processes share it.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError

from tasks.search.trial import Result

optuna.logging.set_verbosity(optuna.logging.WARNING)

IDENTITY, RESULT, OWNER, REASON, START = "identity", "result", "owner", "reason", "start"
PATIENCE = 10.0  # seconds that a trial of another process may take to say what it is
MOST_REPEATS = 30  # times in a row that what is asked for was tried before: then the space is taken for exhausted
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """Open Optuna's storage: a database's address, or `journal:FILE`. Raises ValueError if it cannot be opened."""
    try:
        if where.startswith("journal:"):
            file = where.removeprefix("journal:")
            return optuna.storages.JournalStorage(JournalFileBackend(file))
        if where.startswith("sqlite:///"):
            Path(where.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return _database(where)
    except Exception as error:  # each driver has errors of its own
        raise ValueError(f"the storage {where!r} cannot be opened: {type(error).__name__}: {error}") from error


def _database(where: str) -> optuna.storages.RDBStorage:
    """Open a database; while another process is making its tables, wait."""
    for wait in (0.2, 0.5, 1.0, 2.0):
        try:
            return optuna.storages.RDBStorage(where)
        except (IntegrityError, OperationalError):
            time.sleep(wait)
    return optuna.storages.RDBStorage(where)


@dataclass(frozen=True)
class Done:
    """A finished trial: its number, what was chosen, what came of it. `is_whole`: it ran to its end."""

    number: int
    choice: Mapping[str, Any]
    result: Result
    is_whole: bool

    @property
    def rank(self) -> tuple[float, int]:
        """Order trials by: the best on dev, among equals the one that trains fewest numbers."""
        return (self.result.dev, -self.result.num_trained)


class Stage:
    """One study. space: what is asked for. identity: what its trials depend on; one of another is refused.

    plain: takes a choice, returns one that is equal for all choices that make no difference.
    Raises ValueError for an empty space, and for a study that was made for anything else.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        space: Mapping[str, BaseDistribution],
        identity: Mapping[str, Any],
        *,
        seed: int = 0,
        plain: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        if not space or any(getattr(one, "choices", None) == () for one in space.values()):
            raise ValueError(f"the search space of {name!r} is empty: there is nothing to choose from")
        self.name, self.space, self.storage, self.plain = name, dict(space), storage, plain
        self._known: dict[int, Mapping[str, Any]] = {}
        self._ghosts: set[int] = set()
        # ASHA: at each rung the best half go on.
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        self.study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True, pruner=pruner
        )
        num_begun = len(self.study.get_trials(deepcopy=False))  # who goes on does not draw the same ones again
        self.study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + num_begun, n_startup_trials=12)
        described = {key: json.loads(distribution_to_json(one)) for key, one in self.space.items()}
        self._refuse_another({**identity, "space": described})
        self._bury()

    def _refuse_another(self, identity: Mapping[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))
        known = self.study.user_attrs.get(IDENTITY)
        if known is None:
            self.study.set_user_attr(IDENTITY, identity)
            return
        changed = sorted(key for key in identity.keys() | known.keys() if identity.get(key) != known.get(key))
        if changed:
            shown = "; ".join(f"{key}: it has {known.get(key)!r}, this is {identity.get(key)!r}" for key in changed)
            raise ValueError(
                f"the study {self.name!r} was made for something else ({shown:.600}); name another output or storage"
            )

    def _bury(self) -> None:
        """Fail the trials of this machine's processes that are no more."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get(OWNER)
            if owner is None:  # being asked for this moment, or by a process that was killed then
                is_dead = _age(trial) > 6 * PATIENCE
            else:
                is_dead = owner["host"] == socket.gethostname() and not _is_alive(owner)
            if is_dead:
                self.study.tell(trial.number, state=TrialState.FAIL)

    # Trials ----------------------------------------------------------------------------------------------------------

    def start_with(self, choices: Sequence[Mapping[str, Any]], *, name: str = "starts", whole: bool = True) -> None:
        """Let these be tried next; all processes take those that the first one gives by this name.

        whole: they are not given up at a rung: some kinds of places start slowly and end best.
        """
        for choice in self.agree(name, [dict(choice) for choice in choices]):
            self.study.enqueue_trial(choice, user_attrs={START: whole}, skip_if_exists=True)

    def has_started(self) -> bool:
        """Whether all that was given to `start_with` has been begun, by whatever process."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return not any(START in trial.user_attrs for trial in waiting)

    def ask(self) -> optuna.Trial | None:
        """Return a trial that no process has done or does; None if the space seems exhausted."""
        for _ in range(MOST_REPEATS):
            trial = self.study.ask(fixed_distributions=self.space)
            trial.set_user_attr(OWNER, _me())
            if not self._is_repeated(trial):
                return trial
            self.fail(trial, "it is another trial's twin")
        return None

    def _is_repeated(self, trial: optuna.Trial) -> bool:
        """Whether another trial is the same: a finished one, or one that runs and began before this one.

        What a trial was asked for is written piece by piece, and its owner last, so those before it are waited for.
        """
        deadline, plain = time.monotonic() + PATIENCE, self.plain(trial.params)
        while True:
            others = self.study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
            before = [one for one in others if one.state in FINISHED or one.number < trial.number]
            half = [one.number for one in before if OWNER not in one.user_attrs and one.number not in self._ghosts]
            if not half:
                whole = (one for one in before if one.number != trial.number and OWNER in one.user_attrs)
                return any(self._plainly(one) == plain for one in whole)
            if time.monotonic() > deadline:
                self._ghosts.update(half)  # whoever began them is no more
            time.sleep(0.02)

    def _plainly(self, trial: FrozenTrial) -> Mapping[str, Any]:
        """Return what a trial was asked for, once it is known whole, without what makes no difference."""
        if trial.number not in self._known:
            self._known[trial.number] = self.plain(trial.params)
        return self._known[trial.number]

    def reporter(self, trial: optuna.Trial) -> Callable[[int, float], bool]:
        """Return what takes a rung and its value, and says whether the trial should be given up."""

        def report(rung: int, value: float) -> bool:
            trial.report(value if math.isfinite(value) else -1e9, rung)
            return not trial.user_attrs.get(START) and trial.should_prune()

        return report

    def tell(self, trial: optuna.Trial, result: Result) -> None:
        """Write down what came of a trial."""
        trial.set_user_attr(RESULT, result.to_dict())
        is_whole = not result.stopped and math.isfinite(result.dev)
        self.study.tell(trial, result.dev if is_whole else None, TrialState.COMPLETE if is_whole else TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """Write down that a trial could not be made."""
        trial.set_user_attr(REASON, reason)
        self.study.tell(trial, state=TrialState.FAIL)

    # What is known ---------------------------------------------------------------------------------------------------

    def done(self) -> list[Done]:
        """Return the finished trials, those that were stopped too, in their order."""
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=FINISHED):
            if RESULT in trial.user_attrs:
                result = Result(**trial.user_attrs[RESULT])
                found.append(Done(trial.number, trial.params, result, trial.state == TrialState.COMPLETE))
        return found

    def spent(self) -> float:
        """Return what the finished trials of all processes have cost."""
        return math.fsum(one.result.spent for one in self.done())

    def best(self, count: int) -> list[Done]:
        """Return the best whole trials, best first."""
        return sorted((one for one in self.done() if one.is_whole), key=lambda one: one.rank, reverse=True)[:count]

    def importances(self) -> dict[str, float]:
        """Return how much of the differences each choice explains (Optuna's PED-ANOVA); {} for too few trials."""
        whole = [one for one in self.done() if one.is_whole]
        if len(whole) < 8 or len({one.result.dev for one in whole}) < 2:
            return {}
        return dict(optuna.importance.get_param_importances(self.study))

    def agree(self, name: str, value: Any) -> Any:
        """Return what all processes take for a value: what the first one gave. Numbers of trials are given out once."""
        settled = optuna.create_study(storage=self.storage, study_name=f"{self.name}/{name}", load_if_exists=True)
        if not settled.get_trials(deepcopy=False):
            settled.enqueue_trial({}, user_attrs={name: value})
        return min(settled.get_trials(deepcopy=False), key=lambda trial: trial.number).user_attrs[name]


def _age(trial: FrozenTrial) -> float:
    """The seconds since a trial began."""
    began = trial.datetime_start
    return 0.0 if began is None else (datetime.now() - began).total_seconds()


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def _is_alive(owner: Mapping[str, Any]) -> bool:
    try:
        return psutil.Process(owner["pid"]).create_time() == owner["began"]
    except psutil.NoSuchProcess:
        return False
