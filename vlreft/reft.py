"""`Reft`: one set of interventions on a model, how it acts, and how it comes off; and how it is found."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vlreft.acting import (
    Edited,
    Read,
    as_strength,
    check_groups,
    check_read_positions,
    read_states,
    reads_of,
    recording,
)
from vlreft.config import ReftConfig
from vlreft.holding import holding
from vlreft.layout import text_layout
from vlreft.models.sites import Sites
from vlreft.placed import Placed, States, Strength, Switch
from vlreft.plan import Entry
from vlreft.positions import parse_positions
from vlreft.running.beside import without_peft
from vlreft.running.heads import Head, HeadHooks
from vlreft.running.hooks import Runtime, forget_compiled_graphs
from vlreft.saving.card import Metrics
from vlreft.saving.checkpoint import (
    Checkpoint,
    check_base,
    copy_tensors,
    describe_base,
    read_checkpoint,
    write_checkpoint,
)
from vlreft.saving.hub import check_name, push
from vlreft.saving.shards import is_writer, whole

CHILD_NAME = "vlreft"
# Names that an adapter cannot have: those of the attributes of `Adapters`, its parent.
RESERVED_NAMES = frozenset(dir(nn.ModuleDict())) | {"runtime", "head_hooks", "was_trainable", "refts"}


class Adapters(nn.ModuleDict):
    """The one child module that `attach` adds to a model: its adapters' parameters by name, and the hooks."""

    def __init__(self, runtime: Runtime, was_trainable: list[nn.Parameter]) -> None:
        """Keep the runtime and what has to be unfrozen again at the end."""
        super().__init__()
        self.runtime = runtime
        self.head_hooks = HeadHooks(runtime.model)
        self.was_trainable = was_trainable
        self.refts: dict[str, Reft] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to other devices, but not below float32: `model.to(torch.bfloat16)` is about the base."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)


class Reft:
    """One set of interventions on one model: the handle that `attach` and `load` return."""

    def __init__(self, config: ReftConfig, name: str, made: "Parts", sites: Sites) -> None:
        """Made by `attach` and `load`, not by users."""
        self.model = sites.model
        self.config = config
        self.name = name
        self.edits = made.edits
        self._heads = made.heads
        self._parts = made.parts
        self._switch = made.switch
        self._placed = made.placed
        self._sites = sites

    @property
    def is_attached(self) -> bool:
        """Whether the interventions are on the model."""
        return find_reft(self.model, self.name) is self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters, also those of `modules_to_save`; they live in the model (`model.vlreft`)."""
        return self._parts.parameters()

    def num_parameters(self) -> int:
        """Count the trainable numbers of the interventions, as papers do: without those of `modules_to_save`."""
        return _num_in(self.edits)

    def num_module_parameters(self) -> int:
        """Count the trainable numbers of `modules_to_save`."""
        return sum(_num_in(head.copy) for head in self._heads)

    def print_trainable_parameters(self) -> None:
        """Print the trainable numbers, beside those of the frozen base; those of `modules_to_save` apart."""
        own = {id(p) for name, p in self.model.named_parameters() if name.startswith(f"{CHILD_NAME}.")}
        base = sum(p.numel() for p in self.model.parameters() if id(p) not in own)
        ours, apart = self.num_parameters(), ", ".join(f"{_num_in(head.copy):,} in {head.name}" for head in self._heads)
        line = f"{100 * ours / base:.4f} % of the base's {base:,}"
        line = f"{ours:,} numbers in interventions, {line}; {apart}" if apart else f"{ours:,} numbers, {line}"
        print(f"trainable: {line}")  # noqa: T201

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch these interventions off inside, and back on afterwards, also after an exception.

        Where no others are attached, what runs inside is the frozen base, bit for bit.
        """
        before = self._switch.on
        self._set(False)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def scaled(self, strength: float | Sequence[float] | Tensor) -> Iterator[None]:
        """Multiply the strength of these interventions inside: by one number, or by one for each row of the batch.

        0 is the frozen base, bit for bit, 1 what was trained; the config's `scale` stays a factor of its own. Raises
        ValueError or TypeError for what is no finite number, in a forward for another number of rows.
        """
        with self.changed(strength=as_strength(strength)):
            yield

    @contextmanager
    def groups(self, groups: str | Sequence[str] | Mapping[str, Any]) -> Iterator[None]:
        """Let only some groups of the interventions act inside, by name, or with a strength each.

        What is trained inside are these groups alone: the numbers of the others get zero gradients, an optimiser that
        steps inside leaves them as they are, with weight decay and momentum too, and their subspaces do not turn,
        whatever the order of training. Raises ValueError for an unknown name. Interventions without groups act, and
        train, as ever.
        """
        names = [groups] if isinstance(groups, str) else groups
        given = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        check_groups(given, self._placed)
        strengths = {name: as_strength(strength) for name, strength in given.items()}
        on = [name for name, strength in strengths.items() if bool(torch.as_tensor(strength).any())]
        edits = [placed.edit for placed in self._placed]
        with self.changed(groups=strengths), holding(edits, on, lambda: self._switch.groups is strengths):
            yield

    @property
    def acting_groups(self) -> tuple[str, ...] | None:
        """The groups that act now, None where nothing was said of them and all do."""
        return None if self._switch.groups is None else tuple(self._switch.groups)

    def read(self, batch: Mapping[str, Any], positions: str | None = None) -> list[Read]:
        """Return the states that a batch has at the tokens of each of these interventions, which do not act.

        One for each intervention and module, in the config's order; of other tokens if `positions` is given. The model
        runs once, in evaluation mode, without a graph; other adapters on it act. Raises ValueError where no token is
        selected.
        """
        forget_compiled_graphs()
        try:
            return reads_of(self._read(batch, positions), self._placed)
        finally:
            forget_compiled_graphs()

    @contextmanager
    def sources(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], positions: str | None = None
    ) -> Iterator[None]:
        """Let interchange interventions put the states of `batch` into the forwards, and `generate`s, inside.

        batch: a batch of model inputs, a row for each row of the base; or several, one for each intervention of the
            config. It runs once, in evaluation mode, without a graph and without these interventions.
        positions: which tokens of the source are read, by default those that the interventions select of the base. The
            first selected one goes to the first, and so on: as many have to be selected of both.
        """
        with self.changed(sources=None):
            self._switch.sources = self._read_sources(batch, positions)
            forget_compiled_graphs()
            yield

    @contextmanager
    def recording(self) -> Iterator[list[Edited]]:
        """Give a list that holds, afterwards, what each edit made inside did to which tokens, in their order."""
        forget_compiled_graphs()
        try:
            with recording(self._switch) as edits:
                yield edits
        finally:
            forget_compiled_graphs()

    @contextmanager
    def prompt(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Iterator[None]:
        """Say which tokens are the prompt, for forwards inside that continue a cache (`generate` does it by itself).

        Shapes: (B, L) both. Tokens beyond position L count as the answer being generated.
        """
        shape = (input_ids_BL.shape[0], input_ids_BL.shape[1])
        with self.runtime.prompt(input_ids_BL, attention_mask_BL, shape, input_ids_BL.device):
            yield

    def edited(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> list[Tensor | None]:
        """Return which tokens of a prompt each of the config's interventions edits, in the config's order.

        Shapes: (B, L) bool each; None for an intervention whose tokens are not those of the text.
        """
        shape = (input_ids_BL.shape[0], input_ids_BL.shape[1])
        found: list[Tensor | None] = []
        for item in self.config.interventions:
            site = self._sites[item.site]
            if not site.stream:
                found.append(None)
                continue
            layout = text_layout(
                shape,
                input_ids_BL.device,
                self._sites.vocabularies[site.stream],
                input_ids_BL=input_ids_BL,
                attention_mask_BL=attention_mask_BL,
            )
            found.append(torch.stack(item.parsed_positions.masks(layout)).any(0))
        return found

    @contextmanager
    def boxes(self, boxes: Sequence[Sequence[int]]) -> Iterator[None]:
        """Say which part of each picture `box` means in the forwards inside: left, top, right, bottom in pixels.

        One box per picture, in the order in which the tower sees them, or one for all. The pixels are those of the
        picture as the model is given it, after its processor. Raises ValueError for a box without area.
        """
        for box in boxes:
            if len(box) != 4 or min(box) < 0 or box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError(f"the box {list(box)} must be (left, top, right, bottom) in pixels, with some area")
        with self.runtime.boxes(torch.tensor([list(box) for box in boxes])):
            yield

    def requires_grad_(self, is_on: bool = True) -> None:
        """Train these interventions (say so after `peft.get_peft_model`, which freezes them), or leave them alone."""
        self._switch.is_frozen = not is_on
        for parameter in self.parameters():
            parameter.requires_grad_(is_on)

    def detach(self) -> None:
        """Take the interventions off the model. After the last one it is exactly the model it was."""
        adapters = find_adapters(self.model)
        if adapters is None or adapters.refts.get(self.name) is not self:
            raise ValueError(f"the interventions '{self.name}' are not attached any more")
        adapters.runtime.remove(self._switch)
        adapters.head_hooks.remove(self._switch)
        del adapters.refts[self.name], adapters[self.name]
        if not adapters.refts:
            adapters.runtime.close()
            delattr(self.model, CHILD_NAME)
            for parameter in adapters.was_trainable:
                parameter.requires_grad_(True)
        forget_compiled_graphs()

    def save_pretrained(self, folder: str | os.PathLike[str], *, metrics: Metrics | None = None) -> None:
        """Write `reft_config.json`, `reft_model.safetensors` and a model card; all ranks call it under FSDP.

        metrics: names and values for the card, e.g. {"VQAv2 val accuracy": 78.2}.
        """
        tensors = {name: whole(parameter) for name, parameter in self._parts.named_parameters()}
        if all(is_writer(parameter) for parameter in self.parameters()):
            write_checkpoint(folder, Checkpoint(self.config, describe_base(self.model, self._sites), tensors), metrics)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        message: str = "",
        token: str | None = None,
        metrics: Metrics | None = None,
    ) -> str:
        """Upload to the hub under a name as "user/name", in one commit; return the address. All ranks call it.

        metrics: as for `save_pretrained`. Raises ValueError for a bad name; what the hub says to a missing login or
        right is raised as it comes. `vlreft.load(model, "user/name")` takes it from there.
        """
        check_name(name)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics)
            is_here = all(is_writer(parameter) for parameter in self.parameters())
            return push(folder, name, private=private, message=message, token=token) if is_here else ""

    def fingerprint(self) -> str:
        """Return a hash of what these interventions do: their config, numbers, and whether they are switched on."""
        switch = self._switch
        state = (switch.on, _numbers_of(switch.strength), {k: _numbers_of(v) for k, v in (switch.groups or {}).items()})
        digest = hashlib.sha256(f"{state} {switch.groups is None} {self.config.to_json()}".encode())
        for name, parameter in self._parts.named_parameters():
            digest.update(name.encode())
            digest.update(whole(parameter).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Copy a checkpoint's numbers into these interventions, in place. Raises ValueError if it does not fit."""
        checkpoint = read_checkpoint(folder)
        check_base(checkpoint.base, describe_base(self.model, self._sites), folder)
        if checkpoint.config != self.config:
            raise ValueError(f"the checkpoint in {folder} has another config: {checkpoint.config}, not {self.config}")
        copy_tensors(checkpoint.tensors, dict(self._parts.named_parameters()), f"the checkpoint in {folder}")

    @property
    def runtime(self) -> Runtime:
        """The model's hooks. Raises ValueError once detached."""
        adapters = find_adapters(self.model)
        if adapters is None:
            raise ValueError(f"the interventions '{self.name}' are not attached any more")
        return adapters.runtime

    def _read(self, batch: Mapping[str, Any], positions: str | None) -> dict[Placed, States]:
        others = None if positions is None else parse_positions(positions)
        if others is not None:
            check_read_positions(others, self._placed)
        return read_states(self.runtime, self._switch, batch, others)

    def _read_sources(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], positions: str | None
    ) -> dict[Placed, States]:
        if isinstance(batch, Mapping):
            return self._read(batch, positions)
        if len(batch) != len(self.config.interventions):
            raise ValueError(
                f"{len(batch)} sources were given for {len(self.config.interventions)} interventions; give one batch "
                "for all, or one for each"
            )
        reads = [self._read(one, positions) for one in batch]
        return {item: reads[item.where.number][item] for item in self._placed if item in reads[item.where.number]}

    def _set(self, on: bool) -> None:
        if self._switch.on != on:
            self._switch.on = on
            forget_compiled_graphs()

    @contextmanager
    def changed(self, **fields: Any) -> Iterator[None]:
        """Set fields of the switch inside, for the library's own use."""
        before = {name: getattr(self._switch, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(self._switch, name, value)
            forget_compiled_graphs()
            yield
        finally:
            for name, value in before.items():
                setattr(self._switch, name, value)
            forget_compiled_graphs()


def find_reft(model: nn.Module, name: str | None = None) -> Reft | None:
    """Return the interventions attached to `model` under `name` (by default the first ones), None if there are none."""
    adapters = find_adapters(model)
    if adapters is None:
        return None
    return next(iter(adapters.refts.values())) if name is None else adapters.refts.get(name)


def find_refts(model: nn.Module) -> dict[str, Reft]:
    """Return all interventions attached to `model` by their names, in the order in which they were attached."""
    adapters = find_adapters(model)
    return {} if adapters is None else dict(adapters.refts)


def find_only_reft(model: nn.Module) -> Reft:
    """Return the interventions attached to `model`. Raises ValueError if there are none, or several sets of them."""
    adapters = find_adapters(model)
    names = list(adapters.refts) if adapters is not None else []
    if adapters is None or len(names) != 1:
        got = f"several are attached, {names}" if names else "none are attached"
        raise ValueError(f"one set of interventions is trained at a time and {got}; use `vlreft.attach(model, config)`")
    return adapters.refts[names[0]]


def find_adapters(model: nn.Module) -> Adapters | None:
    """Return what `attach` has put on a model, or on the one inside a `PeftModel`; None if there is nothing."""
    model = without_peft(model)
    child = dict(model.named_children()).get(CHILD_NAME) if isinstance(model, nn.Module) else None
    return child if isinstance(child, Adapters) else None


def _numbers_of(strength: Strength) -> list[float] | float:
    return strength.tolist() if isinstance(strength, Tensor) else strength


def _num_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, eq=False)
class Parts:
    """What an adapter consists of, before it is on the model; `parts` holds the edits and the copies of heads."""

    plan: list[Entry]
    edits: nn.ModuleDict
    heads: list[Head]
    parts: nn.ModuleDict
    switch: Switch
    placed: list[Placed]
