"""`Comparison`: each method is tuned within the same budget and trained with each seed; then the sealed test is opened.

The order is the protocol. Every method's search sees train and dev alone; its best choice is trained with all seeds and
made final; only when all methods' choices are final is any test file read, after each method's manifest says so. The
same call goes on where a killed one stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from optuna.storages import BaseStorage

from tasks.compare.costs import Costs, measure_costs
from tasks.manifest import Manifest
from tasks.methods.method import Method
from tasks.methods.table import METHODS
from tasks.metrics.score import Score
from tasks.protocol import Settings, load_base, load_test
from tasks.search.budget import Budget
from tasks.search.search import Search
from tasks.search.study import open_storage
from tasks.search.trial import Fidelity, Workbench
from tasks.setups import Setup
from tasks.splits import describe_part
from tasks.table import TASKS
from tasks.task import Task, texts_of
from vlreft.training.answers import read_answers

FINAL_RUNGS = (0.125, 0.25, 0.5, 1.0)  # of the final trainings, for their learning curves


@dataclass(frozen=True)
class Plan:
    """What is compared how. budget: for the tuning of each method. own: tasks that the base could do before."""

    methods: tuple[str, ...]
    budget: Budget
    seeds: tuple[int, ...]
    epochs: float
    own: tuple[str, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse methods and tasks that there are not, and no seeds."""
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"there are no methods {unknown}; there are {', '.join(METHODS)}.")
        if unknown := [name for name in self.own if name not in TASKS]:
            raise ValueError(f"there are no tasks {unknown}; there are {', '.join(TASKS)}.")
        if not self.methods or not self.seeds or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"`methods` (={self.methods}) and `seeds` (={self.seeds}) need an entry, none twice.")


class Comparison:
    """One comparison in one folder, with a folder for each method. Raises: ValueError before anything is spent."""

    def __init__(
        self, task: Task, settings: Settings, plan: Plan, bench: Workbench, identity: Mapping[str, Any], folder: Path
    ) -> None:
        """Look whether every method can adapt the base, and whether the test's files are there, unread."""
        self.task, self.settings, self.plan, self.bench, self.folder = task, settings, plan, bench, folder
        self.tests = settings.tests or task.parts.tests
        data = None if settings.data is None else Path(settings.data)
        for part in self.tests:
            task.refuse_missing(part, data)
        self.identity = dict(identity)
        for name in plan.methods:
            METHODS[name].space(bench.setup)
        self.manifests = {name: self._manifest(name) for name in plan.methods}
        self.storage: BaseStorage = open_storage(f"sqlite:///{(folder / 'study.db').absolute()}")

    def _manifest(self, name: str) -> Manifest:
        plan = {"budget": asdict(self.plan.budget), "seeds": list(self.plan.seeds), "epochs": self.plan.epochs}
        known = {**plan, "own": list(self.plan.own), "seed": self.plan.seed, "identity": self.identity}
        return Manifest(self.folder / name, {"method": name, **known, "run": asdict(self.settings)})

    def execute(self) -> dict[str, Any]:
        """Do what is left to do; return each method's record, by name."""
        for name in self.plan.methods:
            if not self.manifests[name].is_final:
                self._select(name)
        for name in self.plan.methods:
            openings = self.manifests[name].data["test"]["openings"]
            if not openings or "finished" not in openings[-1]:
                self._test(name)
        return {name: manifest.data for name, manifest in self.manifests.items()}

    # Selection -------------------------------------------------------------------------------------------------------

    def _select(self, name: str) -> None:
        """Tune a method within the budget, train its best choice with each seed, and make that final."""
        manifest, method = self.manifests[name], METHODS[name]
        if "found" not in manifest.data:
            found = Search(
                self.bench,
                method,
                self.plan.budget,
                self.storage,
                self.identity,
                epochs=self.plan.epochs,
                seed=self.plan.seed,
            ).run()
            manifest.data["found"] = {
                "choice": dict(found.choice),
                "dev": found.best.result.dev,
                "spent": found.spent,
                "importances": found.importances,
                "trials": [
                    {"stage": stage, "number": one.number, "choice": dict(one.choice), **one.result.to_dict()}
                    for stage, one in found.done
                ],
            }
            manifest.write()
        choice = manifest.data["found"]["choice"]
        for seed in self.plan.seeds:
            if manifest.trial(f"seed-{seed}") is None:
                place = self.folder / name / f"seed-{seed}"
                fidelity = Fidelity(self.plan.epochs, None, FINAL_RUNGS)
                result = self.bench.run(method, choice, fidelity, seed=seed, save_to=place)
                manifest.add_trial({"name": f"seed-{seed}", "seed": seed, "adapter": place.name, **result.to_dict()})
        manifest.select({"choice": choice, "adapters": [trial["adapter"] for trial in manifest.data["trials"]]})

    # Test ------------------------------------------------------------------------------------------------------------

    def _test(self, name: str) -> None:
        """Open the test for one method. Raises ValueError while any method's choice is not final."""
        if waiting := [other for other, manifest in self.manifests.items() if not manifest.is_final]:
            raise ValueError(f"the test is sealed until the choices of {', '.join(waiting)} are final")
        self.manifests[name].open_test(None)
        scores: dict[str, Any] = {}
        for task, part in self._parts():
            rows = self.test_rows(task, part)
            self.manifests[name].record_data(f"{task.name}/{part}", describe_part(rows))
            scores[f"{task.name}/{part}"] = self._scores(name, task, part, rows)
        self.manifests[name].close_test(scores)

    def _parts(self) -> list[tuple[Task, str]]:
        own = [(TASKS[name], part) for name in self.plan.own for part in TASKS[name].parts.tests]
        return [*((self.task, part) for part in self.tests), *own]

    def test_rows(self, task: Task, part: str) -> datasets.Dataset:
        """Load a part of a test. Raises ValueError before every method's choice is final."""
        if not all(manifest.is_final for manifest in self.manifests.values()):
            raise ValueError("the test is sealed until every method's choice is final")
        data = None if self.settings.data is None or task is not self.task else Path(self.settings.data)
        return load_test(task, part, data, self.settings.num_test, self.settings.split_seed)

    def _scores(self, name: str, task: Task, part: str, rows: datasets.Dataset) -> dict[str, Any]:
        """Score the base, and the method with each seed."""
        setup, method, manifest = self._setup(task, rows), METHODS[name], self.manifests[name]
        found: dict[str, Any] = {"adapters": []}
        choice = manifest.data["selection"]["choice"]
        for place in manifest.data["selection"]["adapters"]:
            with method.adapted(self.bench.setup, choice) as adapted:
                adapted.load(self.folder / name / place)
                file = self.folder / name / "test" / f"{task.name}-{part}-{place}.jsonl"
                trainer = self.bench.answering(method, adapted, task, setup, self.folder / name)
                score = trainer.score(trainer.answer(rows, file), rows)
            found["adapters"].append({**_plain(score), "answers": str(file.relative_to(self.folder))})
        found["base"] = self._base_score(task, part, rows, setup)
        return found

    def _base_score(self, task: Task, part: str, rows: datasets.Dataset, setup: Setup) -> dict[str, Any]:
        """Score the base; the first method's answers of it serve the others."""
        method = METHODS["loreft"]
        space = method.space(self.bench.setup)
        with method.adapted(self.bench.setup, {**space.starts[0], "learning_rate": 1.0}) as adapted:
            trainer = self.bench.answering(method, adapted, task, setup, self.folder)
            with trainer.without_edits():
                file = self.folder / "base" / f"{task.name}-{part}.jsonl"
                score = trainer.score(trainer.answer(rows, file), rows)
        return {**_plain(score), "answers": str(file.relative_to(self.folder))}

    def _setup(self, task: Task, rows: datasets.Dataset) -> Setup:
        return load_base(task, self.settings, rows, beside=self.bench.setup)

    # Afterwards ------------------------------------------------------------------------------------------------------

    def answers(self, name: str, task: Task, part: str) -> list[list[Any]]:
        """Read a method's answers to a test part, of each seed."""
        scores = self.manifests[name].data["test"]["scores"][f"{task.name}/{part}"]["adapters"]
        return [read_answers(self.folder / score["answers"]) for score in scores]

    def texts(self, task: Task, part: str) -> list[Mapping[str, Any]]:
        """Return a test part's rows without their pictures."""
        return list(texts_of(self.test_rows(task, part)))

    def costs(self, names: Sequence[str]) -> dict[str, Costs]:
        """Measure what answering costs with each method, beside the base."""
        chosen = {name: self.manifests[name].data["selection"]["choice"] for name in names}
        return measure_costs(self.bench, {name: (METHODS[name], choice) for name, choice in chosen.items()})


def possible(names: Sequence[str], setup: Setup) -> tuple[list[str], dict[str, str]]:
    """Return those of the methods that can adapt a base, and of the others why they cannot."""
    can: list[str] = []
    cannot: dict[str, str] = {}
    for name in names:
        method: Method = METHODS[name]
        try:
            method.space(setup)
            can.append(name)
        except ValueError as error:
            cannot[name] = str(error)
    return can, cannot


def _plain(score: Score) -> dict[str, Any]:
    return {"name": score.name, "value": score.value, "over": score.over, "parts": dict(score.parts)}
