"""`Run`: train, select on dev, open the sealed test once, report; every step is on record and can be resumed.

The order is the protocol: candidates are trained with the first seed and compared on dev; the best is trained with the
other seeds; the selection is made final; only then are the test's files read, after the manifest says so.
"""

import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import vlreft
from tasks.manifest import Manifest
from tasks.metrics.score import Score
from tasks.setups import Options, Setup, load_setup
from tasks.splits import cut_dev, describe_part, draw_shots, hash_file, refuse_shared, without_shared
from tasks.task import Task
from tasks.training import Job, TaskTrainer

# What a trainer wants to find on a base that is tested without any adapter; it is switched off.
IDLE = vlreft.ReftConfig(vlreft.Intervention("vector", positions="all"))


@dataclass(frozen=True)
class Settings:
    """All that a run's numbers depend on, as JSON has it.

    config: of `vlreft.ReftConfig`; None to evaluate `adapter` as it is, or the base alone.
    training: arguments of `transformers.TrainingArguments`; `learning_rate` is each of `lrs` in turn.
    """

    task: str
    model: str
    data: str | None = None
    train_data: str | None = None
    config: Mapping[str, Any] | None = None
    adapter: str | None = None
    lrs: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0,)
    training: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    shots: int | None = None
    num_train: int | None = None
    num_dev: int | None = None
    num_test: int | None = None
    split_seed: int = 0
    drop_shared: bool = False
    tests: tuple[str, ...] | None = None
    max_length: int | None = None
    overflow: Literal["error", "cut"] = "error"
    prompt: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to do, and no learning rate or seed."""
        for name in ("shots", "num_train", "num_dev", "num_test", "max_length", "eval_batch_size"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"`{name}` (={count}) must be at least 1.")
        if not self.lrs or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`lrs` (={self.lrs}) and `seeds` (={self.seeds}) must have an entry, seeds none twice.")


class Run:
    """One run in one folder; the same call goes on where an interrupted one stopped. Raises: ValueError."""

    def __init__(self, task: Task, source: Task, settings: Settings, folder: Path) -> None:
        """task: what is tested. source: what is trained on, the same one unless the task has no training data."""
        self.task, self.source, self.settings, self.folder = task, source, settings, folder
        self.data = None if settings.data is None else Path(settings.data)
        self.tests = settings.tests or task.parts.tests
        self._refuse_missing_parts()
        self._arguments(folder, lr=1.0, seed=0)
        self.manifest = Manifest(folder, asdict(settings))
        self.setup: Setup | None = None

    def execute(self, reopen: str | None = None) -> dict[str, Any]:
        """Do what is left to do, and return the manifest's data. `reopen` is the reason to open the test again."""
        if not self.manifest.is_final:
            self._select()
        openings = self.manifest.data["test"]["openings"]
        if reopen or not openings or "finished" not in openings[-1]:
            self._test(reopen)
        return self.manifest.data

    # Selection -------------------------------------------------------------------------------------------------------

    def _select(self) -> None:
        if self.settings.config is None:
            adapter = self.settings.adapter
            self.manifest.select({"adapters": [] if adapter is None else [adapter], "lr": None})
            return
        train, dev = load_train_and_dev(self.source, self.settings)
        setup = self.loaded(self.source, train)
        vlreft.attach(setup.model, self._config(setup)).detach()  # a config that does not fit is told before all else
        for name, rows in (("train", train), ("dev", dev)):
            self.manifest.record_data(name, describe_part(rows))
        tried = [self._trial(lr, self.settings.seeds[0], train, dev) for lr in self.settings.lrs]
        best = max(tried, key=_dev_value)
        trials = [best, *(self._trial(best["lr"], seed, train, dev) for seed in self.settings.seeds[1:])]
        self.manifest.select({"lr": best["lr"], "adapters": [trial["adapter"] for trial in trials]})

    def _trial(self, lr: float, seed: int, train: datasets.Dataset, dev: datasets.Dataset) -> dict[str, Any]:
        """Train one candidate, or return its record if that was done before."""
        name = f"lr-{lr}-seed-{seed}"
        if (known := self.manifest.trial(name)) is not None:
            return known
        folder = self.folder / "trials" / name
        setup = self.loaded(self.source, train)
        set_seed(seed)
        reft = vlreft.attach(setup.model, self._config(setup))
        try:
            args = self._arguments(folder, lr, seed)
            trainer = TaskTrainer(Job(self.source, setup, args, folder / "answers", train, dev))
            start, cpu_start = time.perf_counter(), time.process_time()
            trainer.train(resume_from_checkpoint=_whole_checkpoint(folder / "checkpoints"))
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            dev_score = trainer.best_score()
            reft.save_pretrained(folder / "adapter")
            record = {"name": name, "lr": lr, "seed": seed, "dev": _plain(dev_score)}
            record |= {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
            record |= {"adapter": str((folder / "adapter").relative_to(self.folder)), **_trained(trainer, folder)}
        finally:
            reft.detach()
        self.manifest.add_trial(record)
        shutil.rmtree(folder / "checkpoints")
        return record

    def _config(self, setup: Setup) -> vlreft.ReftConfig:
        assert self.settings.config is not None
        config = vlreft.ReftConfig.from_dict(self.settings.config)
        return config if config.modules_to_save else vlreft.ReftConfig(config.interventions, setup.heads)

    def _arguments(self, folder: Path, lr: float, seed: int) -> TrainingArguments:
        arguments: dict[str, Any] = {
            "output_dir": str(folder / "checkpoints"),
            "learning_rate": lr,
            "seed": seed,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 2,  # the best and the last; with 1 the end of the training takes the last away
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": True,
            "logging_steps": 10,
            "report_to": "none",
            "remove_unused_columns": False,
            "per_device_eval_batch_size": self.settings.eval_batch_size,
            "use_cpu": self.settings.device == "cpu",
            **self.settings.training,
        }
        try:
            return TrainingArguments(**arguments)
        except TypeError as error:
            raise ValueError(
                f"the training's arguments are not those of transformers.TrainingArguments: {error}"
            ) from error

    def _test_arguments(self) -> TrainingArguments:
        size, use_cpu = self.settings.eval_batch_size, self.settings.device == "cpu"
        return TrainingArguments(str(self.folder), per_device_eval_batch_size=size, use_cpu=use_cpu, report_to="none")

    # Test ------------------------------------------------------------------------------------------------------------

    def _test(self, reopen: str | None) -> None:
        """Open the test and answer all of its parts, with the base and with each selected adapter."""
        number = self.manifest.open_test(reopen)
        folder = self.folder / ("test" if number == 1 else f"test-{number}")
        scores: dict[str, Any] = {}
        for part in self.tests:
            rows = self.test_rows(part)
            self.manifest.record_data(part, describe_part(rows))
            scores[part] = self._test_part(rows, folder / part)
        self.manifest.close_test(scores)

    def test_rows(self, part: str) -> datasets.Dataset:
        """Load a part of the test. Raises: ValueError before the manifest says that it is open."""
        if not self.manifest.data["test"]["openings"]:
            raise ValueError("the test is sealed until the selection is final")
        return load_test(self.task, part, self.data, self.settings.num_test, self.settings.split_seed)

    def _test_part(self, rows: datasets.Dataset, folder: Path) -> dict[str, Any]:
        setup = self.loaded(self.task, rows)
        adapters = [self.folder / name for name in self.manifest.data["selection"]["adapters"]]
        scores: dict[str, Any] = {"adapters": []}
        for number, adapter in enumerate(adapters or [None]):
            reft = vlreft.attach(setup.model, IDLE) if adapter is None else vlreft.load(setup.model, adapter)
            try:
                trainer = TaskTrainer(Job(self.task, setup, self._test_arguments(), folder))
                if number == 0:
                    scores["base"] = self._scored(trainer, rows, folder / "base.jsonl", base=True)
                if adapter is not None:
                    scores["adapters"].append(self._scored(trainer, rows, folder / f"adapter-{number}.jsonl"))
            finally:
                reft.detach()
        return scores

    def _scored(
        self, trainer: TaskTrainer, rows: datasets.Dataset, path: Path, *, base: bool = False
    ) -> dict[str, Any]:
        score = trainer.score(trainer.answer(rows, path, base=base), rows)
        return {**_plain(score), "answers": str(path.relative_to(self.folder))}

    # Parts and models ------------------------------------------------------------------------------------------------

    def loaded(self, task: Task, rows: datasets.Dataset) -> Setup:
        """The base, loaded once for all trials, and once more where the test is of another kind."""
        if self.setup is None or self.setup.task is not task:
            self.setup = load_base(task, self.settings, rows)
            self.manifest.data.setdefault("base", describe_base(self.setup.model))
        return self.setup

    def _refuse_missing_parts(self) -> None:
        """Look whether the test's files are there, unread, so that their lack does not show after the training."""
        unknown = [part for part in self.tests if part not in self.task.parts.tests]
        if unknown:
            raise ValueError(f"{self.task.name!r} has the tests {list(self.task.parts.tests)}, not {unknown}.")
        for part in self.tests:
            self.task.refuse_missing(part, self.data)


def _trained(trainer: TaskTrainer, folder: Path) -> dict[str, Any]:
    """What a training ended with, for the manifest."""
    reft, state = trainer.reft, trainer.state
    return {
        "adapter_sha256": hash_file(folder / "adapter" / "reft_model.safetensors"),
        "num_trained": {"interventions": reft.num_parameters(), "modules": reft.num_module_parameters()},
        "trained": {name: list(p.shape) for name, p in reft.model.named_parameters() if p.requires_grad},
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "peak_memory": peak_memory(reft.model),
        "curve": [entry for entry in state.log_history if {"loss", "eval_score"} & entry.keys()],
    }


def load_train_and_dev(source: Task, settings: Settings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load what is trained and selected on. Raises ValueError where the two share an example."""
    parts, train_data = source.parts, settings.train_data or settings.data
    assert parts.train is not None
    folder = None if train_data is None else Path(train_data)
    num_dev = parts.num_dev if settings.num_dev is None else settings.num_dev
    train = source.load(parts.train, folder)
    if parts.dev is not None:
        dev = source.load(parts.dev, folder)
        if settings.num_dev is not None:
            dev = dev.select(range(min(settings.num_dev, len(dev))))
    else:
        train, dev = cut_dev(train, parts, num_dev, settings.split_seed)
    if settings.shots is not None:
        train = draw_shots(train, settings.shots, settings.split_seed)
    if settings.num_train is not None:
        train = train.shuffle(seed=settings.split_seed).select(range(min(settings.num_train, len(train))))
    if settings.drop_shared:
        return without_shared(train, dev), dev
    refuse_shared(train, dev)
    return train, dev


def load_base(task: Task, settings: Settings, rows: datasets.Dataset, beside: Setup | None = None) -> Setup:
    """Load the base of some settings, or take that of another setup. Raises ValueError if it cannot be."""
    options = Options(
        device=settings.device,
        dtype=getattr(torch, settings.dtype),
        max_length=settings.max_length,
        overflow=settings.overflow,
        prompt=settings.prompt,
        generation=settings.generation,
    )
    set_seed(settings.seeds[0])  # a head without trained weights starts at random
    try:
        return load_setup(task, settings.model, options, rows, beside)
    except OSError as error:
        raise ValueError(f"the model {settings.model!r} cannot be loaded: {error}") from error


def load_test(task: Task, part: str, folder: Path | None, num_test: int | None, seed: int) -> datasets.Dataset:
    """Load a part of the test, whole or `num_test` rows of it, drawn by the seed."""
    rows = task.load(part, folder)
    return rows if num_test is None else rows.shuffle(seed=seed).select(range(min(num_test, len(rows))))


def describe_base(model: torch.nn.Module) -> dict[str, Any]:
    """What was adapted, and on what machine."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    device = next(model.parameters()).device
    return {
        "class": type(model).__name__,
        "commit": getattr(config, "_commit_hash", None),
        "num_weights": sum(parameter.numel() for parameter in model.parameters()),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "num_threads": torch.get_num_threads(),
    }


def peak_memory(model: torch.nn.Module) -> dict[str, Any]:
    """Return the most memory used so far, in bytes: the device's own count on a GPU, else the whole process'."""
    if next(model.parameters()).device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "cuda allocator"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}


def _dev_value(trial: Mapping[str, Any]) -> float:
    value = trial["dev"]["value"]
    return value if math.isfinite(value) else -math.inf  # a correlation of constant answers is no number


def _plain(score: Score) -> dict[str, Any]:
    """A score without its rows' parts."""
    return {"name": score.name, "value": score.value, "over": score.over, "parts": dict(score.parts)}


def _whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; one that was not is removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        if (Path(last) / "trainer_state.json").is_file():  # the last file that is written
            return last
        for file in Path(last).iterdir():
            file.unlink()
        Path(last).rmdir()
    return None
