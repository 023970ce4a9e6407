"""`SafeTraining`: what a trainer does when a machine dies, a disk fills up, a loss is no number or a user stops it."""

import errno
import logging
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from vlreft.saving.checkpoint import free_space
from vlreft.training.folders import (
    STAGING,
    STATE_NAME,
    all_broken,
    clear_staging,
    last_checkpoint,
    put_back,
    put_in_place,
    retire,
    start_staging,
    why_broken,
)
from vlreft.training.interrupts import Interruptions
from vlreft.training.watch import ERRORS_OF_THE_DEAD, WatchedCollator, WatchedRows, take_numbers

logger = logging.getLogger("vlreft")

MAX_UNSEEN = 64  # losses that may wait on an accelerator to be looked at

if TYPE_CHECKING:
    _TrainerType = Trainer
else:
    _TrainerType = object


class Loss(NamedTuple):
    """The loss of one batch, and the numbers (B,) of its samples where they are known; both still on their device."""

    step: int
    value: Tensor
    numbers_B: Tensor | None


class Losses:
    """The losses of a training that nobody has looked at yet, and the last two that somebody has."""

    def __init__(self) -> None:
        self.unseen: list[Loss] = []
        self.seen: deque[Loss] = deque(maxlen=2)

    def look(self) -> Loss | None:
        """Return the first of the unseen ones that is no finite number; one synchronisation with the device."""
        unseen, self.unseen = self.unseen, []
        if not unseen:
            return None
        self.seen.extend(unseen)
        is_finite = torch.stack([loss.value for loss in unseen]).isfinite().tolist()
        return None if all(is_finite) else unseen[is_finite.index(False)]


class SafeTraining(_TrainerType):
    """Make a Trainer subclass lose nothing; `ReftMixin` has it.

    Checkpoints are whole or not there. `train(resume_from_checkpoint=True)` finds the last whole one. Ctrl-C and
    SIGTERM save at the end of the step (of a logged step, with several processes, which must agree) and stop; a second
    one stops at once. A loss that is no finite number ends the training before anything is saved: at once on the CPU,
    elsewhere, where looking costs a synchronisation, before the next log, evaluation or checkpoint.
    """

    _staging: Path | None = None
    _watched: WatchedRows | None = None
    _numbers_B: Tensor | None = None
    _interruptions: Interruptions | None = None
    _losses: Losses | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, as `transformers.Trainer` does.

        Raises ValueError if there is no whole checkpoint to resume from; FloatingPointError for a loss that is no
        number; OSError where a checkpoint cannot be written; RuntimeError naming the samples that a data-loader worker
        died at.
        """
        folder = self._folder_to_resume(resume_from_checkpoint)
        self._losses = Losses()
        with Interruptions() as self._interruptions:
            try:
                output = super().train(folder, trial, ignore_keys_for_eval)
            except ERRORS_OF_THE_DEAD as error:
                where = self._watched.dead_worker(error) if self._watched is not None else None
                if where is None:
                    raise
                raise RuntimeError(f"a data-loader worker died {where}{self._last_good()} ({error})") from error
        if self._interruptions.asked is not None:  # too late to stop anything
            self._interruptions.stop("the training had come to its end")
        if folder is not None and self.args.should_save:  # killed after its last save, before older ones had gone
            retire(Path(super()._get_output_dir(trial)), self.args.save_total_limit, self.state.best_model_checkpoint)
        return output

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the trainer's own step; on the CPU, where looking is free, its loss must be a finite number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._losses is not None:
            self._losses.unseen.append(Loss(self.state.global_step + 1, loss, self._numbers_B))
            if _looking_is_free(loss) or len(self._losses.unseen) >= MAX_UNSEEN:
                self._refuse_broken_losses(self._losses)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the checkpoint was the last one: transformers would train one step more (5.24)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _folder_to_resume(self, given: str | bool | None) -> str | None:
        if given is None or given is False:
            return None
        if not isinstance(given, bool):
            if (why := why_broken(given)) is not None:
                raise ValueError(f"training cannot go on from {given}: {why}")
            return given
        run_dir = Path(str(self.args.output_dir))
        if self.args.should_save:
            put_back(run_dir)
        self.accelerator.wait_for_everyone()
        folder = last_checkpoint(run_dir)
        if folder is None:
            broken = all_broken(run_dir)
            what = f"no whole checkpoint: {'; '.join(broken)}" if broken else "no checkpoint"
            raise ValueError(f"there is nothing to resume from in {run_dir}: {what}")
        logger.info("going on from %s", folder)
        return folder

    # Losses ----------------------------------------------------------------------------------------------------------

    def _refuse_broken_losses(self, losses: Losses) -> None:
        """Raise FloatingPointError, naming the step and its samples, if one of the losses so far is no number."""
        if (bad := losses.look()) is None:
            return
        told = f"the loss of step {bad.step} is {bad.value.item()}: {self._samples_of(bad)}"
        if _looking_is_free(bad.value) and not self._is_finite():
            before = losses.seen[0]
            told += "; the trained numbers were broken before it"
            told += f", by step {before.step}: {self._samples_of(before)}" if before is not bad else ""
        raise FloatingPointError(
            f"{told}{self._last_good()}; look at these samples, lower `learning_rate`, or train in float32"
        )

    def _is_finite(self) -> bool:
        assert self.model is not None
        trained = [p for p in self.model.parameters() if p.requires_grad and not p.is_meta]
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        return all(bool(shard.isfinite().all()) for shard in shards)

    def _samples_of(self, loss: Loss) -> str:
        if loss.numbers_B is None or self._watched is None:
            return "which samples it had is not known, as the training data have no numbers"
        return self._watched.names(loss.numbers_B.tolist())

    def _last_good(self) -> str:
        """Return, for an error, which checkpoint to go on from."""
        last = last_checkpoint(str(self.args.output_dir))
        return f"; the last good checkpoint is {last}" if last else "; there is no checkpoint yet"

    # Samples ---------------------------------------------------------------------------------------------------------

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """Let the batches of a training know the numbers of their samples."""
        if not is_training or not self.is_in_train or isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        from datasets import Dataset

        own, collator, rows = self.data_collator, self.data_collator, dataset
        if isinstance(dataset, Dataset):
            rows = self._remove_unused_columns(dataset, description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description)
        self._watched = WatchedRows(rows, collator, self.args.dataloader_num_workers, batch_size)
        sampler = None if sampler_fn is None else lambda _: sampler_fn(rows)
        self.data_collator = self._watched.collate
        try:
            return super()._get_dataloader(self._watched, description, batch_size, sampler, is_training, dataloader_key)
        finally:
            self.data_collator = own

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, WatchedCollator):  # the one inside has it done
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _prepare_inputs(self, inputs: Any) -> Any:
        self._numbers_B = take_numbers(inputs)
        return super()._prepare_inputs(inputs)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Look at the losses before anything is made of them; save and stop if that was asked for."""
        stops = self._is_interrupted()
        if stops:
            self.control.should_save, self.control.should_evaluate = True, False
        if self._losses and (self.control.should_log or self.control.should_save or self.control.should_evaluate):
            self._refuse_broken_losses(self._losses)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stops and self._interruptions is not None:
            step, folder = self.state.global_step, last_checkpoint(str(self.args.output_dir))
            self._interruptions.stop(
                f"stopped at step {step}; {folder} is what resume_from_checkpoint=True goes on from"
            )

    def _is_interrupted(self) -> bool:
        asked = self._interruptions is not None and self._interruptions.asked is not None
        if self.args.world_size == 1:
            return asked
        if not (self.control.should_log or self.control.should_save):
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.args.device), "sum"))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint elsewhere, and give it its name when all of it is on disk; older ones go after that."""
        run_dir, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        self._refuse_broken_numbers()
        is_writer = self.args.should_save
        try:
            if is_writer:
                start_staging(run_dir)
            self.accelerator.wait_for_everyone()
            self._staging = run_dir / STAGING
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(self._staging / name):
                self.state.best_model_checkpoint = str(run_dir / name)
            if is_writer:
                self.state.save_to_json(str(self._staging / name / STATE_NAME))
            self.accelerator.wait_for_everyone()
            if is_writer:
                put_in_place(run_dir, name)
            self.accelerator.wait_for_everyone()  # all of them find it now
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_of_torch_save(error):
                raise
            clear_staging(run_dir)
            raise self._cannot_write(run_dir / name, error) from error
        finally:
            self._staging = None
        if is_writer:
            retire(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it has not got its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _refuse_broken_numbers(self) -> None:
        if not self._is_finite():
            samples = f", {self._samples_of(self._losses.seen[-1])}" if self._losses and self._losses.seen else ""
            raise FloatingPointError(
                f"the trained numbers are not finite after step {self.state.global_step}{samples}; they are not saved"
                f"{self._last_good()}; look at these samples, or lower `learning_rate`"
            )

    def _cannot_write(self, folder: Path, error: OSError | RuntimeError) -> OSError:
        assert self.model is not None
        tensors = [p for p in self.model.parameters() if p.requires_grad]
        states = self.optimizer.state_dict()["state"].values() if isinstance(self.optimizer, Optimizer) else ()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        number, why = errno.EIO, "not all of a file could be written"
        if isinstance(error, OSError):
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            number, why = cause.errno or errno.EIO, cause.strerror or str(cause)
        return OSError(
            number,
            f"{folder} cannot be written: {why}; it needs about {num_bytes:,} bytes{free_space(folder)}"
            f"{self._last_good()}",
        )


def _looking_is_free(loss: Tensor) -> bool:
    """Whether a number can be read without waiting for a device."""
    return loss.device.type == "cpu"


def _is_of_torch_save(error: RuntimeError) -> bool:
    """Whether an error comes from torch's serialisation, which has no type of its own for a disk that is full.

    That a data-loader worker died is raised from a signal's handler, wherever the process is.
    """
    if str(error).startswith("DataLoader worker"):
        return False
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return torch.serialization.__file__ in files
