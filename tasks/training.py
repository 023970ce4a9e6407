"""`TaskTrainer`: `ReftTrainer` that evaluates by the task's own metric on dev, and answers any part into a file."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback, TrainingArguments

from tasks.metrics.score import Score
from tasks.setups import Setup
from tasks.task import Task, texts_of
from vlreft import ReftTrainer
from vlreft.training.answers import AnswerFile


class TaskTrainer(ReftTrainer):
    """Train the interventions on the setup's model; `eval_score` is the metric's value on dev.

    folder: where the answers to dev are written, a file for each evaluation.
    """

    def __init__(
        self,
        task: Task,
        setup: Setup,
        args: TrainingArguments,
        train: datasets.Dataset | None,
        dev: datasets.Dataset | None,
        folder: Path,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=setup.model,
            args=args,
            data_collator=setup.collator,
            train_dataset=None if train is None else setup.examples(train, training=True),
            eval_dataset=dev,
            compute_loss_func=setup.loss,
            callbacks=callbacks,
            generation=setup.generation,
        )
        self.task, self.setup, self.dev, self.folder = task, setup, dev, folder

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer dev and score the answers."""
        assert self.dev is not None
        path = self.folder / f"dev-{self.state.global_step:06d}.jsonl"
        score = self.score(self.answer(self.dev, path, replace=True), self.dev)
        metrics = {f"{metric_key_prefix}_score": score.value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def best_score(self) -> Score:
        """Score dev with the interventions as they are after the training, the best ones: mostly answered before."""
        assert self.dev is not None
        step = self.state.best_global_step or self.state.global_step
        return self.score(self.answer(self.dev, self.folder / f"dev-{step:06d}.jsonl", replace=True), self.dev)

    def answer(self, rows: datasets.Dataset, path: Path, *, base: bool = False, replace: bool = False) -> list[Any]:
        """Answer the rows into a file, the official submission's form beside it; `base` is without interventions."""
        texts = list(texts_of(rows))
        with self.reft.disabled() if base else nullcontext():
            key = hashlib.sha256(f"{self.answers_key()} {len(rows)}".encode()).hexdigest()
            file = AnswerFile(path, key, line=self.task.line, replace=replace)

            def so_far(answers: Sequence[Any]) -> float:
                try:
                    return self.task.metric(answers, texts[: len(answers)]).value
                except ValueError:  # too few rows for this metric yet
                    return math.nan

            return self.setup.answers(self, rows, file, so_far)

    def score(self, answers: Sequence[Any], rows: datasets.Dataset) -> Score:
        """Score answers by the task's metric."""
        return self.task.metric(answers, list(texts_of(rows)))
