"""Placement guessed without training: how much the loss would follow an edit, at every place, from a few batches.

At every place a vector is added to the selected states, which is zero and so changes nothing. One backward pass gives
the loss' gradient with respect to it: the sum, over these states, of the loss' gradients there. A place's score is the
length of that gradient, a mean over the batches, times the mean length of the states: to first order, how much the loss
changes when they all move the same way by a share of their length. That is gradient times activation (Shrikumar et al.
2016, "Not just a black box", arXiv 1605.01713), with the best direction in the place of the activation's own; as
attribution patching has it (Syed, Rager and Conmy 2023, arXiv 2310.10348) it is exact for small edits only, and says
nothing of edits that depend on the state, or act together.

Shape suffixes: B = rows, K = most selected tokens of a row, D = width.
"""

import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, TrainingArguments, set_seed

import vlreft
from tasks.search.gates import Place, Placement, check_affordable, config_at, places_of, strongest
from tasks.search.trial import Workbench
from tasks.training import Job, TaskTrainer
from vlreft.acting import evaluating
from vlreft.layout import prompt_from_labels

NUM_BATCHES = 4


class SaliencyTrainer(TaskTrainer):
    """Looks at a few batches of the training rows as a training would, and trains nothing."""

    def batches(self, num_batches: int) -> Iterator[dict[str, Any]]:
        """Yield the first batches, on the model's device."""
        for batch in islice(self.get_train_dataloader(), num_batches):
            yield self._prepare_inputs(batch)

    def backward(self, inputs: Mapping[str, Any]) -> None:
        """Add the gradients of a batch's loss, the base in evaluation mode."""
        assert isinstance(self.model, nn.Module)
        with evaluating(self.model):
            self.compute_loss(self.model, dict(inputs)).backward()

    def lengths(self, inputs: Mapping[str, Any]) -> list[tuple[float, int]]:
        """Return, for each edit, the sum of the lengths of the states that it is at, and their count."""
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        if isinstance(labels := inputs.get("labels"), Tensor) and isinstance(self.reft.model, GenerationMixin):
            batch["prompt_mask"] = prompt_from_labels(labels)
        reads = self.reft.read(batch)
        return [(float(read.states_BKD.float().norm(dim=-1).sum()), int(read.valid_BK.sum())) for read in reads]


def guess(bench: Workbench, max_numbers: int, rank: int, *, num_batches: int = NUM_BATCHES, seed: int = 0) -> Placement:
    """Score every place; return the best within `max_numbers`, for interventions of this rank.

    Raises ValueError if `max_numbers` is too small for any place, or a place selects no token of a batch.
    """
    places = places_of(bench.setup, rank)
    check_affordable(places, max_numbers)
    with bench.meter.running():
        scores = dict(zip(places, _scores(bench, places, num_batches, seed), strict=True))
        kept = strongest(scores, {place: score > 0 for place, score in scores.items()}, max_numbers)
        return Placement(scores, kept, bench.meter.spent)


def _scores(bench: Workbench, places: tuple[Place, ...], num_batches: int, seed: int) -> list[float]:
    """Return the places' scores; the vectors are off the model again afterwards."""
    set_seed(seed)
    reft = vlreft.attach(bench.setup.model, config_at(places, "vector", None))
    try:
        with tempfile.TemporaryDirectory(prefix="vlreft-saliency-") as name:
            return _looked(_trainer(bench, Path(name), seed), reft, num_batches)
    finally:
        reft.detach()


def _trainer(bench: Workbench, folder: Path, seed: int) -> SaliencyTrainer:
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    sizes = {"per_device_train_batch_size": bench.batch_size, **bench.settings}
    args = TrainingArguments(str(folder), use_cpu=bench.device == "cpu", seed=seed, **{**quiet, **sizes})
    trainer = SaliencyTrainer(Job(bench.task, bench.setup, args, folder, bench.train))
    trainer.silence()
    return trainer


def _looked(trainer: SaliencyTrainer, reft: vlreft.Reft, num_batches: int) -> list[float]:
    """Return ‖mean gradient‖ · mean length of the states, for each edit."""
    edits = list(reft.edits.values())
    sums, counts, seen = [0.0] * len(edits), [0] * len(edits), 0
    for batch in trainer.batches(num_batches):
        trainer.backward(batch)
        for number, (length, count) in enumerate(trainer.lengths(batch)):
            sums[number] += length
            counts[number] += count
        seen += 1
    grads = [next(edit.parameters()).grad for edit in edits]
    norms = [0.0 if grad is None else float(torch.linalg.vector_norm(grad)) / seen for grad in grads]
    return [norm * length / max(1, count) for norm, length, count in zip(norms, sums, counts, strict=True)]
