"""`Workbench`: a base in memory, and trainings on it, one after the other, each of which leaves it as it was."""

import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

import vlreft
from tasks.methods.method import Adapted, Choice, Method
from tasks.methods.reft import ReftMethod
from tasks.search.budget import Meter
from tasks.setups import Setup
from tasks.task import Task
from tasks.training import Job, PlainTrainer, Scoring, TaskTrainer

CACHES = "4GB"  # of features, and of prefixes, each
PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Fidelity:
    """How closely a trial is looked at: epochs of training, dev rows (all if None), shares at which dev is answered."""

    epochs: float
    num_dev: int | None
    rungs: Sequence[float] = (1 / 3, 1.0)


@dataclass(frozen=True)
class Result:
    """What came of one training.

    dev: the metric's value on the dev rows at the end, or where it was stopped. spent: by the meter, dev included;
    seconds: of the training alone, without dev, by the clock. curve: (spent, step, dev). stopped: why, "" if it ran to
    its end. dev_spent: what of `spent` went into answering dev.
    """

    dev: float
    num_trained: int
    spent: float
    seconds: float
    steps: int
    num_steps: int
    peak_memory: int
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    stopped: str = ""
    num_bytes: int = 0
    dev_spent: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class Watch(TrainerCallback):
    """Asks for dev at the rungs, reports what it gave, and stops where that, or the budget, says so."""

    def __init__(self, rungs: Sequence[float], meter: Meter, limit: float, report: Callable[[int, float], bool]):
        self.rungs, self.meter, self.limit, self.report = rungs, meter, limit, report
        self.curve: list[tuple[float, int, float]] = []
        self.stopped = ""
        self.steps: list[int] = []
        self.dev_seconds = self.dev_spent = 0.0
        self._asked = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn shares into steps."""
        self.steps = [max(1, round(share * state.max_steps)) for share in self.rungs]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for dev at a rung; stop where the budget is spent."""
        control.should_evaluate = state.global_step in self.steps
        self._asked = (time.perf_counter(), self.meter.spent)
        if self.meter.spent > self.limit:
            self.stopped = "the budget was spent"
            control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Report the value; stop if it is none of the best at this rung."""
        self.dev_seconds += time.perf_counter() - self._asked[0]
        self.dev_spent += self.meter.spent - self._asked[1]
        value = metrics["eval_score"]
        value = value if math.isfinite(value) else -math.inf  # a correlation of constant answers is no number
        self.curve.append((self.meter.spent, state.global_step, value))
        is_last = state.global_step >= state.max_steps
        if self.report(len(self.curve), value) and not is_last:
            self.stopped = "others were better at this rung"
            control.should_training_stop = True


@dataclass
class Workbench:
    """A task's base and data. settings: arguments of `TrainingArguments` that no method chooses.

    What frozen parts make of the pictures, and of prefixes, is kept from one training to the next: in `features` and
    `prefixes`, where the method leaves these parts alone.
    """

    task: Task
    setup: Setup
    train: datasets.Dataset
    dev: datasets.Dataset
    meter: Meter
    device: str = "cpu"
    eval_batch_size: int = 100
    batch_size: int = 16
    settings: dict[str, Any] = field(default_factory=dict)
    features: vlreft.FeatureCache | None = field(default_factory=lambda: vlreft.FeatureCache(CACHES))
    prefixes: vlreft.KeptPrefixes | None = field(default_factory=lambda: vlreft.KeptPrefixes(CACHES, required=False))

    def run(
        self,
        method: Method,
        choice: Choice,
        fidelity: Fidelity,
        *,
        seed: int = 0,
        limit: float = math.inf,
        report: Callable[[int, float], bool] = lambda _rung, _value: False,
        save_to: Path | None = None,
    ) -> Result:
        """Train once and leave the base as it was. Raises ValueError for a choice that cannot be trained.

        limit: of what the meter may show. report: takes a rung's number, from 1, and the value on dev; True stops.
        save_to: where the trained numbers go.
        """
        self.setup.model.eval()  # as it was loaded; the last training has left it in training mode
        with self.meter.running(), tempfile.TemporaryDirectory(prefix="vlreft-trial-") as name:
            set_seed(seed)
            with method.adapted(self.setup, choice) as adapted, self._cached():
                forget_peak()
                watch = Watch(fidelity.rungs, self.meter, limit, report)
                trainer = self._training(method, adapted, choice, fidelity, seed, Path(name), watch)
                start = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - start - watch.dev_seconds
                num_bytes = 0 if save_to is None else _saved(adapted, save_to)
                values = [value for _, _, value in watch.curve]
                return Result(
                    dev=values[-1] if values else -math.inf,
                    num_trained=adapted.num_trained,
                    spent=self.meter.spent,
                    seconds=seconds,
                    steps=trainer.state.global_step,
                    num_steps=trainer.state.max_steps,
                    peak_memory=peak_memory(self.device),
                    curve=watch.curve,
                    stopped=watch.stopped,
                    num_bytes=num_bytes,
                    dev_spent=watch.dev_spent,
                )

    @contextmanager
    def _cached(self) -> Iterator[None]:
        with ExitStack() as scopes:
            if self.features is not None and self.task.kind == "generate" and "image" in self.task.features:
                scopes.enter_context(self.features.on(self.setup.model, required=False))
            yield

    def dev_rows(self, num_rows: int | None) -> datasets.Dataset:
        """Return dev, or its first rows: the same ones for every trial."""
        return self.dev if num_rows is None else self.dev.select(range(min(num_rows, len(self.dev))))

    def answering(self, method: Method, adapted: Adapted, task: Task, setup: Setup, folder: Path) -> Scoring:
        """Return a trainer that only answers, rows of any task of the same base."""
        args = TrainingArguments(
            str(folder),
            per_device_eval_batch_size=self.eval_batch_size,
            use_cpu=self.device == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        return _trainer(method, adapted, Job(task, setup, args, folder), None)

    def _training(
        self,
        method: Method,
        adapted: Adapted,
        choice: Choice,
        fidelity: Fidelity,
        seed: int,
        folder: Path,
        watch: Watch,
    ) -> Scoring:
        args = TrainingArguments(**self._arguments(choice, fidelity, seed, folder))
        dev = self.dev_rows(fidelity.num_dev)
        job = Job(self.task, self.setup, args, folder, self.train, dev, [watch])
        return _trainer(method, adapted, job, self.prefixes)

    def _arguments(self, choice: Choice, fidelity: Fidelity, seed: int, folder: Path) -> dict[str, Any]:
        return {
            "output_dir": str(folder),
            "num_train_epochs": fidelity.epochs * choice.get("epochs", 1.0),
            "learning_rate": choice["learning_rate"],
            "warmup_steps": choice.get("warmup", 0.06),
            "weight_decay": choice.get("weight_decay", 0.0),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.eval_batch_size,
            "seed": seed,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": self.device == "cpu",
            **self.settings,
        }


def _trainer(method: Method, adapted: Adapted, job: Job, prefixes: vlreft.KeptPrefixes | None) -> Scoring:
    made: Scoring
    if isinstance(method, ReftMethod):
        made = TaskTrainer(job, keep_prefixes=prefixes)
    else:
        made = PlainTrainer(job, model=adapted.model)
    made.silence()
    return made


def _saved(adapted: Adapted, folder: Path) -> int:
    """Save into a folder that is whole or not there."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    num_bytes = adapted.save(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
    return num_bytes


def forget_peak() -> None:
    """Let the peak of memory begin anew, where this machine can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif PEAK.exists():
        PEAK.write_text("5")


def peak_memory(device: str) -> int:
    """Return the most bytes in use since `forget_peak`: the device's on a GPU, else the whole process'."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
