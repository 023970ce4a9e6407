"""Interchange: batches with sources, interchange accuracy, and the layer x position grid of activation patching.

    rows = [{"image": base, "question": "...", "answer": "blue", "source": {"image": other, "question": "..."}}, ...]
    collator = InterchangeCollator(vlreft.Collator(processor))
    ReftTrainer(model=model, train_dataset=rows, data_collator=collator, ...).train()  # of a "das", for example
    interchange_accuracy(model, test_rows, collator)
    patch_grid(model, collator, rows, positions=["image", "question:l1"]).plot().savefig("grid.png")

A row is a base run and, under `source`, the run whose states are put into it. Its `answer` is the counterfactual one:
what the model should say if the states that are exchanged are the cause of it.

Shape suffixes: B = rows, L = tokens, V = vocabulary, K = most selected tokens of a row, P = position strings,
N = layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlreft.acting import evaluating, read_states
from vlreft.attaching import attach, make_parts
from vlreft.config import Intervention, ReftConfig
from vlreft.data.collator import Collator
from vlreft.layout import prompt_from_labels
from vlreft.placed import States
from vlreft.positions import parse_positions
from vlreft.reft import Parts, find_only_reft
from vlreft.reuse.rows import to_device
from vlreft.running.hooks import Runtime, forget_compiled_graphs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_NAME = "vlreft_patch_grid"

Rows = Any  # rows by index, with a length


class InterchangeCollator:
    """Turn rows with a `source` into training and generation batches whose `sources` are the prompts of the sources.

    A row is a row of the collator's with a mapping `source` of its own `question`, or `messages`, and image; what the
    source answers does not matter. Under `ReftTrainer` the sources run first, and their states go into the base's run.
    """

    def __init__(self, collator: Collator, *, source_positions: str | None = None) -> None:
        """Take the collator of the rows; `source_positions` say which tokens of the sources are read.

        By default those that the interventions select of the base; as many have to be selected of both.
        """
        if not isinstance(collator, Collator):
            raise TypeError(f"`collator` must be a vlreft.Collator, got {type(collator).__name__}")
        self.collator = collator
        self.source_positions = source_positions

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a training batch, as `Collator` does, with `sources`. Raises ValueError, naming the row."""
        return {**self.collator(examples), "sources": self.sources(examples)}

    def prompts(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a generation batch, as `Collator.prompts` does, with `sources`, which `generate` does not take."""
        return {**self.collator.prompts(examples), "sources": self.sources(examples)}

    def decode(self, generated_ids_BS: Tensor, prompt_length: int) -> list[str]:
        """Give the text behind the prompts, as `Collator.decode` does."""
        return self.collator.decode(generated_ids_BS, prompt_length)

    def sources(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch of the sources' prompts, padded on the right: models that count pads read them right too."""
        sources = [_source_of(example, place) for place, example in enumerate(examples)]
        try:
            batch = self.collator.prompts(sources)
        except ValueError as error:
            raise ValueError(f"the source of {error}") from error
        mask_BL = batch["attention_mask"]
        order_BL = mask_BL.argsort(dim=1, descending=True, stable=True)
        return {
            name: value.gather(1, order_BL) if isinstance(value, Tensor) and value.shape == mask_BL.shape else value
            for name, value in batch.items()
        }


def _source_of(example: Mapping[str, Any], place: int) -> Mapping[str, Any]:
    source = example.get("source") if isinstance(example, Mapping) else None
    if not isinstance(source, Mapping):
        keys = sorted(map(str, example)) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(
            f"row {place} of the batch has no mapping under `source` (its keys are {keys}); put the other run's "
            "`question` and `image` there"
        )
    return source


# Accuracy ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def interchange_accuracy(model: nn.Module, rows: Rows, collator: InterchangeCollator, *, batch_size: int = 32) -> float:
    """Return the share of rows whose counterfactual answer the intervened model gives, in [0, 1].

    An answer counts if every one of its tokens, the end token included, is the likeliest one behind the tokens before
    it: greedy generation would give it. The model has one adapter, with interventions that put in a source's states;
    it runs in evaluation mode, where a learned width is hard. Raises ValueError for an adapter without any of these.
    """
    reft = find_only_reft(model)
    if not any(edit.uses_source for edit in reft.edits.values()):
        raise ValueError(
            f"the interventions '{reft.name}' put in no states of a source, so there is nothing to exchange; use the "
            "methods 'interchange', 'das' or 'boundless_das'"
        )
    num_right = 0
    with evaluating(model):
        for batch in _batches(model, rows, collator, batch_size):
            with reft.sources(batch.sources, collator.source_positions):
                num_right += int(batch.score(model).is_right_B.sum())
    return num_right / len(rows)


class _Score(NamedTuple):
    """Of each row's answer: is_right_B, all tokens are the likeliest; logp_B, the sum of their log-probabilities."""

    is_right_B: Tensor
    logp_B: Tensor


class _Batch(NamedTuple):
    """The model's inputs without the labels, which the answers are read from; and the sources."""

    inputs: dict[str, Any]
    labels_BL: Tensor
    sources: dict[str, Any]

    def score(self, model: nn.Module) -> _Score:
        """Run the model and look at its answers."""
        logits_BLV = model(**self.inputs, prompt_mask=prompt_from_labels(self.labels_BL)).logits[:, :-1].float()
        labels_BL = self.labels_BL[:, 1:].to(logits_BLV.device)
        is_answer_BL = labels_BL >= 0
        is_right_BL = (logits_BLV.argmax(-1) == labels_BL) | ~is_answer_BL
        logp_BL = torch.zeros_like(logits_BLV[..., 0])
        logits_NV = logits_BLV[is_answer_BL]
        logp_BL[is_answer_BL] = -nn.functional.cross_entropy(logits_NV, labels_BL[is_answer_BL], reduction="none")
        return _Score(is_right_BL.all(1).cpu(), logp_BL.sum(1).cpu())


def _batches(model: nn.Module, rows: Rows, collator: InterchangeCollator, batch_size: int) -> Iterator[_Batch]:
    if not isinstance(collator, InterchangeCollator):
        raise TypeError(
            f"`collator` must be a vlreft.InterchangeCollator, got {type(collator).__name__}; wrap it: "
            "InterchangeCollator(collator)"
        )
    if not len(rows):
        raise ValueError("`rows` must hold at least one row")
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        examples = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
        batch = to_device(collator(examples), device)
        labels_BL, sources = batch.pop("labels"), batch.pop("sources")
        yield _Batch(batch, labels_BL, sources)


# Activation patching -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """What patching each place alone does to the counterfactual answer, over the rows.

    accuracy_PN is the interchange accuracy; effect_PN the mean change of the answer's log-probability (natural) against
    the base, whose own figures are `base_accuracy` and `base_logp`. Rows of both are `positions`, columns `layers`; NaN
    where "all" layers leave one out, as the last of a tower for patches that nobody reads.
    """

    site: str
    component: str
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    accuracy_PN: Tensor
    effect_PN: Tensor
    base_accuracy: float
    base_logp: float
    num_rows: int

    @property
    def best(self) -> tuple[int, str]:
        """The layer and positions of the highest accuracy; of several, the one with the largest effect."""
        is_best_PN = self.accuracy_PN == self.accuracy_PN.nan_to_num(-1.0).max()
        row, column = divmod(int(self.effect_PN.where(is_best_PN, -torch.inf).argmax()), len(self.layers))
        return self.layers[column], self.positions[row]

    def plot(self, what: Literal["accuracy", "effect"] = "accuracy") -> "Figure":
        """Return a figure of the grid, layers from left to right, positions from top to bottom; needs matplotlib."""
        from matplotlib.figure import Figure

        if what not in ("accuracy", "effect"):
            raise ValueError(f"`what` (={what!r}) must be 'accuracy' or 'effect'")
        is_accuracy = what == "accuracy"
        values_PN = self.accuracy_PN if is_accuracy else self.effect_PN
        num_positions, num_layers = values_PN.shape
        figure = Figure(figsize=(2.6 + 0.6 * num_layers, 1.6 + 0.32 * num_positions), layout="constrained")
        axes = figure.subplots()
        limit = 1.0 if is_accuracy else float(values_PN.nan_to_num().abs().max()) or 1.0
        colors = {"cmap": "viridis", "vmin": 0.0} if is_accuracy else {"cmap": "RdBu_r", "vmin": -limit}
        image = axes.imshow(values_PN.numpy(), aspect="auto", vmax=limit, **colors)
        axes.set_xticks(range(num_layers), [str(layer) for layer in self.layers])
        axes.set_yticks(range(num_positions), list(self.positions))
        component = "" if self.component == "output" else f", {self.component}"
        axes.set_xlabel(f"layer of '{self.site}'{component}")
        if num_positions * num_layers <= 200:
            for row in range(num_positions):
                for column in range(num_layers):
                    value = float(values_PN[row, column])
                    if value != value:
                        continue
                    is_dark = value < 0.6 if is_accuracy else abs(value) > 0.6 * limit
                    color = "white" if is_dark else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        label = "interchange accuracy" if is_accuracy else "change of the answer's log-probability"
        figure.colorbar(image, ax=axes, label=label)
        return figure


@torch.no_grad()
def patch_grid(
    model: nn.Module,
    collator: InterchangeCollator,
    rows: Rows,
    *,
    positions: Sequence[str],
    layers: str | int | Sequence[int] = "all",
    site: str = "text",
    component: str = "output",
    batch_size: int = 32,
) -> PatchGrid:
    """Put the source's states into the base at one layer and position after another, and see what it says.

    For each batch the sources run once, the base once, and the base again for each cell. The tokens of a position
    string are exchanged together; as many have to be selected of the base as of its source. Adapters on the model act.
    At site "text" a `vlreft.FeatureCache` spares the tower all runs but the first. Raises ValueError or TypeError as
    `attach` does, before anything runs.
    """
    if isinstance(positions, str) or not len(positions):
        raise ValueError(f"`positions` (={positions!r}) must be a list of position strings, e.g. ['question:l1']")
    config = ReftConfig(
        Intervention(
            "interchange",
            site=site,
            layers=layers,
            component=component,
            positions=text,
            tied=True,
            init="reference",
        )
        for text in positions
    )
    holder = attach(model, config, GRID_NAME)  # holds the hooks; the cells are placed one by one
    try:
        with holder.disabled(), evaluating(model):
            cells = make_parts(config, holder.runtime.sites)
            accuracy_C, effect_C, base = _patch_cells(model, collator, rows, holder.runtime, cells, batch_size)
            numbers = sorted({entry.layer for entry in cells.plan})
    finally:
        holder.detach()
    grids = torch.full((2, len(positions), len(numbers)), torch.nan, dtype=torch.float64)
    for entry, accuracy, effect in zip(cells.plan, accuracy_C, effect_C, strict=True):
        grids[:, entry.number, numbers.index(entry.layer)] = torch.stack([accuracy, effect])
    return PatchGrid(
        site=site,
        component=component,
        layers=tuple(numbers),
        positions=tuple(positions),
        accuracy_PN=grids[0],
        effect_PN=grids[1],
        base_accuracy=float(base.is_right_B.float().mean()),
        base_logp=float(base.logp_B.mean()),
        num_rows=len(rows),
    )


def _patch_cells(
    model: nn.Module, collator: InterchangeCollator, rows: Rows, runtime: Runtime, cells: Parts, batch_size: int
) -> tuple[Tensor, Tensor, _Score]:
    """Return accuracy and effect of each cell (C,), and the base's own scores."""
    num_right_C, effect_C = (torch.zeros(len(cells.placed), dtype=torch.float64) for _ in range(2))
    bases: list[_Score] = []
    others = None if collator.source_positions is None else parse_positions(collator.source_positions)
    for batch in _batches(model, rows, collator, batch_size):
        with _placed(runtime, cells, range(len(cells.placed))):
            found = read_states(runtime, cells.switch, batch.sources, others)
        base = batch.score(model)
        bases.append(base)
        for number, placed in enumerate(cells.placed):
            if placed not in found:
                raise ValueError(f"no token of the sources is selected at {placed.where}, '{placed.positions.text}'")
            with _placed(runtime, cells, [number], found[placed]):
                score = batch.score(model)
            num_right_C[number] += score.is_right_B.sum()
            effect_C[number] += (score.logp_B - base.logp_B).sum()
    joined = _Score(torch.cat([base.is_right_B for base in bases]), torch.cat([base.logp_B for base in bases]))
    return num_right_C / len(rows), effect_C / len(rows), joined


@contextmanager
def _placed(runtime: Runtime, cells: Parts, numbers: Sequence[int], states: States | None = None) -> Iterator[None]:
    """Put some cells on the model inside, one of them with states to put in."""
    for number in numbers:
        entry, placed = cells.plan[number], cells.placed[number]
        runtime.place(entry.site, entry.layer, entry.item.component, entry.target, placed)
        if states is not None:
            cells.switch.sources = {placed: states}
    forget_compiled_graphs()
    try:
        yield
    finally:
        runtime.remove(cells.switch)
        cells.switch.sources = None
        forget_compiled_graphs()
