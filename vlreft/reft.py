"""`Reft`, `attach` and `load`: put interventions on the model the user already has, in place, and take them off."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
from vlreft.checkpoint import Base, Checkpoint, check_base, copy_tensors, read_checkpoint, write_checkpoint
from vlreft.config import ReftConfig
from vlreft.edit import Edit
from vlreft.heads import Head, HeadHooks, make_heads, refuse_edits_inside
from vlreft.hooks import Runtime, forget_compiled_graphs
from vlreft.layout import text_layout
from vlreft.placed import Placed, States, Strength, Switch, Where
from vlreft.plan import Entry, plan_edits
from vlreft.positions import parse_positions
from vlreft.sites import Sites, find_sites

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

        In training the numbers of the others get zero gradients. Each group's subspace is orthogonal to those of the
        groups before it: train them in their order, or together, since training one turns those behind it. Raises
        ValueError for an unknown name. Interventions without groups act as ever.
        """
        names = [groups] if isinstance(groups, str) else groups
        given = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        check_groups(given, self._placed)
        with self.changed(groups={name: as_strength(strength) for name, strength in given.items()}):
            yield

    def read(self, batch: Mapping[str, Any], positions: str | None = None) -> list[Read]:
        """Return the states that a batch has at the tokens of each of these interventions, which do not act.

        One for each intervention and module, in the config's order; of other tokens if `positions` is given. The model
        runs once, in evaluation mode, without a graph; other adapters on it act. Raises ValueError where no token is
        selected.
        """
        return reads_of(self._read(batch, positions), self._placed)

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
        if isinstance(batch, Mapping):
            found = self._read(batch, positions)
        else:
            if len(batch) != len(self.config.interventions):
                raise ValueError(
                    f"{len(batch)} sources were given for {len(self.config.interventions)} interventions; give one "
                    "batch for all, or one for each"
                )
            reads = [self._read(one, positions) for one in batch]
            found = {item: reads[item.where.number][item] for item in self._placed if item in reads[item.where.number]}
        with self.changed(sources=found):
            yield

    @contextmanager
    def recording(self) -> Iterator[list[Edited]]:
        """Give a list that holds, afterwards, what each edit made inside did to which tokens, in the order of"""
        forget_compiled_graphs()
        with recording(self._switch) as edits:
            yield edits
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

    def detach(self) -> None:
        """Take the interventions off the model. After the last one it is exactly the model it was."""
        adapters = _adapters(self.model)
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

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `reft_config.json`, `reft_model.safetensors` and a model card; the base is not written."""
        tensors = {name: parameter.data for name, parameter in self._parts.named_parameters()}
        write_checkpoint(folder, Checkpoint(self.config, _describe_base(self.model, self._sites), tensors))

    def fingerprint(self) -> str:
        """Return a hash of what these interventions do: their config, numbers, and whether they are switched on."""
        switch = self._switch
        state = (switch.on, _numbers_of(switch.strength), {k: _numbers_of(v) for k, v in (switch.groups or {}).items()})
        digest = hashlib.sha256(f"{state} {switch.groups is None} {self.config.to_json()}".encode())
        for name, parameter in self._parts.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Copy a checkpoint's numbers into these interventions, in place. Raises ValueError if it does not fit."""
        checkpoint = read_checkpoint(folder)
        check_base(checkpoint.base, _describe_base(self.model, self._sites), folder)
        if checkpoint.config != self.config:
            raise ValueError(f"the checkpoint in {folder} has another config: {checkpoint.config}, not {self.config}")
        copy_tensors(checkpoint.tensors, dict(self._parts.named_parameters()), f"the checkpoint in {folder}")

    @property
    def runtime(self) -> Runtime:
        """The model's hooks. Raises ValueError once detached."""
        adapters = _adapters(self.model)
        if adapters is None:
            raise ValueError(f"the interventions '{self.name}' are not attached any more")
        return adapters.runtime

    def _read(self, batch: Mapping[str, Any], positions: str | None) -> dict[Placed, States]:
        others = None if positions is None else parse_positions(positions)
        if others is not None:
            check_read_positions(others, self._placed)
        forget_compiled_graphs()
        try:
            return read_states(self.model, self._switch, batch, others)
        finally:
            forget_compiled_graphs()

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


def attach(model: nn.Module, config: ReftConfig, name: str = "default") -> Reft:
    """Put interventions on `model`, in place, and freeze everything else in it.

    The model stays the object it was: training, `generate`, pipelines and saving go on with it. New interventions draw
    their start from torch's generator, in float32, on their block's device. Several sets under different names act in
    the order in which they were attached.

    Raises ValueError or TypeError, before anything was changed: a name in use, a site or segment that the model lacks,
    a layer out of range or never read, a rank above the width, a module to train that is not exactly one.
    """
    if not isinstance(config, ReftConfig):
        raise TypeError(f"`config` must be a vlreft.ReftConfig, got {type(config).__name__}")
    sites = _sites_for(model, name)
    return _put_on(config, name, make_parts(config, sites), sites)


def load(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Reft:
    """Attach a saved adapter to its base. Raises ValueError for another base, or a file that is not whole and exact."""
    checkpoint = read_checkpoint(folder)
    sites = _sites_for(model, name)
    check_base(checkpoint.base, _describe_base(model, sites), folder)
    with torch.random.fork_rng(devices=[]):  # the start values are thrown away; leave the user's generator alone
        made = make_parts(checkpoint.config, sites)
    copy_tensors(checkpoint.tensors, dict(made.parts.named_parameters()), f"the checkpoint in {folder}")
    return _put_on(checkpoint.config, name, made, sites)


def find_reft(model: nn.Module, name: str | None = None) -> Reft | None:
    """Return the interventions attached to `model` under `name` (by default the first ones), None if there are none."""
    adapters = _adapters(model)
    if adapters is None:
        return None
    return next(iter(adapters.refts.values())) if name is None else adapters.refts.get(name)


def find_refts(model: nn.Module) -> dict[str, Reft]:
    """Return all interventions attached to `model` by their names, in the order in which they were attached."""
    adapters = _adapters(model)
    return {} if adapters is None else dict(adapters.refts)


def find_only_reft(model: nn.Module) -> Reft:
    """Return the interventions attached to `model`. Raises ValueError if there are none, or several sets of them."""
    adapters = _adapters(model)
    names = list(adapters.refts) if adapters is not None else []
    if adapters is None or len(names) != 1:
        got = f"several are attached, {names}" if names else "none are attached"
        raise ValueError(f"one set of interventions is trained at a time and {got}; use `vlreft.attach(model, config)`")
    return adapters.refts[names[0]]


def _adapters(model: nn.Module) -> Adapters | None:
    child = dict(model.named_children()).get(CHILD_NAME) if isinstance(model, nn.Module) else None
    return child if isinstance(child, Adapters) else None


def _sites_for(model: nn.Module, name: str) -> Sites:
    """Return the sites of a model that can have an adapter of this name. Raises ValueError if it cannot."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or name in RESERVED_NAMES:
        raise ValueError(f"`name` (={name!r}) must be letters, digits, '_' and '-', and no attribute of a ModuleDict")
    if find_reft(model, name) is not None:
        raise ValueError(f"interventions named '{name}' are attached already; detach them or choose another `name`")
    adapters = _adapters(model)
    if adapters is not None:
        return adapters.runtime.sites
    sites = find_sites(model)
    if hasattr(model, CHILD_NAME):
        raise ValueError(f"{sites.model_name} has a '{CHILD_NAME}' of its own, where interventions are kept; rename it")
    return sites


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


def make_parts(config: ReftConfig, sites: Sites) -> Parts:
    """Make an adapter's modules; the model is not changed. Raises ValueError for a config that it has no place for."""
    plan, switch, adapters = plan_edits(config, sites), Switch(), _adapters(sites.model)
    present = list(adapters.head_hooks) if adapters is not None else []
    hooked = list(adapters.runtime.hooked.values()) if adapters is not None else []
    heads = make_heads(config.modules_to_save, sites, present, switch)
    planned = [(f"site '{entry.site.name}' layer {entry.layer}", entry.target) for entry in plan]
    earlier = [(f"site '{item.site.name}' layer {item.layer}", item.target) for item in hooked]
    refuse_edits_inside(heads, planned + earlier)
    refuse_edits_inside(present, planned)
    edits = nn.ModuleDict({entry.key: entry.build() for entry in plan})
    parts = nn.ModuleDict(dict(edits.items()))
    if heads:
        parts["modules_to_save"] = nn.ModuleDict({head.name.replace(".", "/"): head.copy for head in heads})
    return Parts(plan, edits, heads, parts, switch, [_place(entry, edits[entry.key], switch) for entry in plan])


def _place(entry: Entry, edit: nn.Module, switch: Switch) -> Placed:
    assert isinstance(edit, Edit)
    where = Where(entry.number, entry.site.name, entry.layer, entry.item.component)
    return Placed(switch, edit, entry.item.parsed_positions, entry.part, where, entry.span)


def _put_on(config: ReftConfig, name: str, made: Parts, sites: Sites) -> Reft:
    """Put what was made on the model."""
    model, adapters = sites.model, _adapters(sites.model)
    if adapters is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        adapters = Adapters(Runtime(model, sites), trainable)
        model.add_module(CHILD_NAME, adapters)
    reft = Reft(config, name, made, sites)
    adapters[name] = made.parts.train(model.training)
    adapters.refts[name] = reft
    for entry, placed in zip(made.plan, made.placed, strict=True):
        adapters.runtime.place(entry.site, entry.layer, entry.item.component, entry.target, placed)
    for head in made.heads:
        adapters.head_hooks.place(head)
    forget_compiled_graphs()
    return reft


def _describe_base(model: nn.Module, sites: Sites) -> Base:
    shape = {name: [len(site.blocks), site.width] for name, site in sites.by_name.items()}
    if not isinstance(model, PreTrainedModel):
        return Base("open_clip", type(model).__name__, "", shape)
    return Base(model.config.model_type, type(model).__name__, model.config.name_or_path or "", shape)
