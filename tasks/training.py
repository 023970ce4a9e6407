"""Trainers that evaluate by the task's own metric on dev, and answer any part into a file.

`TaskTrainer` trains interventions, `PlainTrainer` whatever else was put on a base, or the base itself: one loop, one
collator, one way to answer, one metric.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from tasks.metrics.score import Score
from tasks.setups import Answering, Setup
from tasks.task import Task, texts_of
from vlreft import Collator, KeptPrefixes, ReftTrainer
from vlreft.training.answers import AnswerFile, answer_all


@dataclass(frozen=True)
class Job:
    """What a trainer is to do. folder: where the answers to dev are written, a file for each evaluation."""

    task: Task
    setup: Setup
    args: TrainingArguments
    folder: Path
    train: datasets.Dataset | None = None
    dev: datasets.Dataset | None = None
    callbacks: Sequence[TrainerCallback] = ()

    def arguments(self) -> dict[str, Any]:
        """Return what any `transformers.Trainer` is told of it; the model is the trainer's own."""
        setup = self.setup
        return {
            "args": self.args,
            "data_collator": setup.collator,
            "train_dataset": None if self.train is None else setup.examples(self.train, training=True),
            "eval_dataset": self.dev,
            "compute_loss_func": setup.loss,
            "callbacks": list(self.callbacks),
        }


class Scoring(Trainer):
    """The part that all trainers of a task share; `eval_score` is the metric's value on dev."""

    job: Job

    def silence(self) -> None:
        """Print nothing, whatever the arguments say of bars."""
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def without_edits(self) -> AbstractContextManager[None]:
        """Let the base answer inside."""
        raise NotImplementedError

    def answers_key(self) -> str:
        """Return a hash of what answers depend on."""
        raise NotImplementedError

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer dev and score the answers."""
        metrics = {f"{metric_key_prefix}_score": self._dev_score(self.state.global_step).value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def best_score(self) -> Score:
        """Score dev with the interventions as they are after the training, the best ones: mostly answered before."""
        return self._dev_score(self.state.best_global_step or self.state.global_step)

    def _dev_score(self, step: int) -> Score:
        dev = self.job.dev
        assert dev is not None
        return self.score(self.answer(dev, self.job.folder / f"dev-{step:06d}.jsonl", replace=True), dev)

    def answer(self, rows: datasets.Dataset, path: Path, *, base: bool = False, replace: bool = False) -> list[Any]:
        """Answer the rows into a file, the official submission's form beside it; `base` is without interventions."""
        texts = list(texts_of(rows))
        with self.without_edits() if base else nullcontext():
            key = hashlib.sha256(f"{self.answers_key()} {len(rows)}".encode()).hexdigest()
            file = AnswerFile(path, key, line=self.job.task.line, replace=replace)

            def so_far(answers: Sequence[Any]) -> float:
                try:
                    return self.job.task.metric(answers, texts[: len(answers)]).value
                except ValueError:  # too few rows for this metric yet
                    return math.nan

            return self.job.setup.answers(cast(Answering, self), rows, file, so_far)

    def score(self, answers: Sequence[Any], rows: datasets.Dataset) -> Score:
        """Score answers by the task's metric."""
        return self.job.task.metric(answers, list(texts_of(rows)))


class TaskTrainer(Scoring, ReftTrainer):
    """Train the interventions on the setup's model."""

    def __init__(self, job: Job, *, keep_prefixes: KeptPrefixes | None = None) -> None:
        self.job, setup = job, job.setup
        super().__init__(setup.model, **job.arguments(), generation=setup.generation, keep_prefixes=keep_prefixes)

    def without_edits(self) -> AbstractContextManager[None]:
        """Let the base answer inside."""
        return self.reft.disabled()

    def answers_key(self) -> str:
        """Return a hash of interventions, generation, batch and base."""
        return ReftTrainer.answers_key(self)


class PlainTrainer(Scoring):
    """Train what is trainable in `model`, which is the setup's base or stands around it."""

    def __init__(self, job: Job, *, model: nn.Module) -> None:
        self.job, self.adapted = job, model
        super().__init__(model, **job.arguments())
        if job.setup.loss is not None:
            self.label_names = ["labels"]  # the model's forward, which they are read off else, knows of none

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the trainer's own optimizer, which keeps in float32 what the base has in less."""
        if self.optimizer is None:
            step_in_float32(super().create_optimizer(model))
        return cast(torch.optim.Optimizer, self.optimizer)

    def answers_key(self) -> str:
        """Return a hash of the trained numbers and of how the answers are made."""
        digest = hashlib.sha256(f"{self.job.setup.generation} {self.args.per_device_eval_batch_size}".encode())
        for name, parameter in self.adapted.named_parameters():
            if parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def predict_answers(
        self, dataset: Any, *, file: AnswerFile | None = None, score: Callable[[Sequence[str]], float] | None = None
    ) -> list[str]:
        """Generate an answer for each example, as `ReftTrainer.predict_answers` does, in one process."""
        collator, model = self.job.setup.collator, self.adapted
        assert isinstance(collator, Collator)

        def answer(examples: list[Any]) -> list[str]:
            batch = self._prepare_inputs(collator.prompts(examples))
            with torch.no_grad():
                ids_BS = model.generate(**batch, **self.job.setup.generation)  # pyright: ignore[reportCallIssue]
            return collator.decode(ids_BS, batch["input_ids"].shape[1])

        was_training, size = model.training, self.args.per_device_eval_batch_size
        model.eval()
        try:
            is_shown = not self.args.disable_tqdm
            return answer_all(answer, dataset, range(len(dataset)), size, file=file, score=score, is_shown=is_shown)
        finally:
            model.train(was_training)


def step_in_float32(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer step on float32 copies of parameters in half precision, which follow their copy.

    A step of a usual learning rate is less than half of what tells two bfloat16 numbers apart, and would be lost.
    """
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                group["params"][place] = copy = nn.Parameter(parameter.detach().float())
                pairs.append((parameter, copy))

    def take_gradients(*_: Any) -> None:
        for parameter, copy in pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def give_back(*_: Any) -> None:
        for parameter, copy in pairs:
            parameter.copy_(copy)
            copy.grad = None

    if pairs:
        optimizer.register_step_pre_hook(take_gradients)
        optimizer.register_step_post_hook(give_back)
