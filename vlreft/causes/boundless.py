"""`BoundlessSchedule`: training of boundless DAS, whose width is learned while the edge of its subspace gets sharp."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlreft.causal import BoundlessDAS
from vlreft.reft import find_only_reft


class BoundlessSchedule(TrainerCallback):
    """Cool "boundless_das" interventions from step to step, and let their width cost something.

    For any trainer: `ReftTrainer(..., callbacks=[BoundlessSchedule(penalty=0.1)])`.

    penalty: what the whole width costs, for each intervention, in units of the loss: its gradient is added to that of
        the boundary before each step of the optimizer. The loss that is logged is without it.
    start, end: temperatures of the first and the last step, with equal differences between them, in dimensions: 50 is
        for widths of thousands, and at a temperature of the width all dimensions look alike. Evaluation is hard at any.

    Source: arXiv 2305.08809 and pyvene's tutorial, which goes from 50 to 0.1 and adds the boundaries to the loss (a
    penalty of 1). Differs: the penalty is not clipped with the gradient of the loss, and the boundary is kept between
    one dimension and all of them, since below it would go on to fall and never come back.
    """

    def __init__(self, penalty: float = 1.0, *, start: float = 50.0, end: float = 0.1) -> None:
        """Take the settings. Raises ValueError for a negative penalty, or a temperature that is not above 0."""
        if penalty < 0.0:
            raise ValueError(f"`penalty` (={penalty}) must be at least 0")
        if start <= 0.0 or end <= 0.0:
            raise ValueError(f"the temperatures `start` (={start}) and `end` (={end}) must be above 0")
        self.penalty, self.start, self.end = penalty, start, end
        self.edits: list[BoundlessDAS] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Find the interventions. Raises ValueError if there are none."""
        assert model is not None
        self.edits = [edit for edit in find_only_reft(model).edits.values() if isinstance(edit, BoundlessDAS)]
        if not self.edits:
            raise ValueError("the adapter has no 'boundless_das' interventions, so there is no width to learn")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the step's temperature."""
        done = min(1.0, state.global_step / max(1, state.max_steps - 1))
        for edit in self.edits:
            edit.temperature = self.start + (self.end - self.start) * done

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the penalty's gradient."""
        for edit in self.edits:
            if edit.boundary.grad is not None:
                edit.boundary.grad += self.penalty

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep the boundary where it means something, and the square basis from becoming singular."""
        for edit in self.edits:
            edit.straighten()
            edit.boundary.data.clamp_(1.0 / len(edit.rotation), 1.0)
