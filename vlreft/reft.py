"""`Reft`, `attach` and `load`: put interventions on the model the user already has, in place, and take them off."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlreft.checkpoint import Base, Checkpoint, check_base, copy_tensors, read_checkpoint, write_checkpoint
from vlreft.config import Intervention, ReftConfig
from vlreft.hooks import Runtime, forget_compiled_graphs
from vlreft.interventions import Edit
from vlreft.layout import text_layout
from vlreft.placed import Placed, Switch
from vlreft.sites import Site, Sites, find_sites

CHILD_NAME = "vlreft"
# Names that an adapter cannot have: those of the attributes of `Adapters`, its parent.
RESERVED_NAMES = frozenset(dir(nn.ModuleDict())) | {"runtime", "was_trainable", "refts"}


class Adapters(nn.ModuleDict):
    """The one child module that `attach` adds to a model: its adapters' parameters by name, and the hooks."""

    def __init__(self, runtime: Runtime, was_trainable: list[nn.Parameter]) -> None:
        """Keep the runtime and what has to be unfrozen again at the end."""
        super().__init__()
        self.runtime = runtime
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

    def __init__(
        self, model: PreTrainedModel, config: ReftConfig, name: str, edits: nn.ModuleDict, switch: Switch, sites: Sites
    ) -> None:
        """Made by `attach` and `load`, not by users."""
        self.model = model
        self.config = config
        self.name = name
        self.edits = edits
        self._switch = switch
        self._sites = sites

    @property
    def is_attached(self) -> bool:
        """Whether the interventions are on the model."""
        return find_reft(self.model, self.name) is self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters, which live in the model too (as `model.vlreft`)."""
        return self.edits.parameters()

    def num_parameters(self) -> int:
        """Count the trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print the trainable numbers, beside those of the frozen base."""
        own = {id(p) for name, p in self.model.named_parameters() if name.startswith(f"{CHILD_NAME}.")}
        base = sum(p.numel() for p in self.model.parameters() if id(p) not in own)
        ours = self.num_parameters()
        print(f"trainable: {ours:,} numbers, {100 * ours / base:.4f} % of the base's {base:,}")  # noqa: T201

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
    def prompt(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Iterator[None]:
        """Say which tokens are the prompt, for forwards inside that continue a cache (`generate` does it by itself).

        Shapes: (B, L) both. Tokens beyond position L count as the answer being generated.
        """
        shape = (input_ids_BL.shape[0], input_ids_BL.shape[1])
        with self.runtime.prompt(input_ids_BL, attention_mask_BL, shape, input_ids_BL.device):
            yield

    def edited(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> list[Tensor | None]:
        """Return which tokens of a prompt each of the config's interventions edits, in the config's order.

        Shapes: (B, L) bool each; None for an intervention in the vision tower, whose tokens are not those of the text.
        """
        shape = (input_ids_BL.shape[0], input_ids_BL.shape[1])
        layout = text_layout(
            shape,
            input_ids_BL.device,
            input_ids_BL=input_ids_BL,
            attention_mask_BL=attention_mask_BL,
            image_token_ids=self._sites.image_token_ids,
        )
        return [
            None if item.site == "vision" else torch.stack(item.parsed_positions.masks(layout)).any(0)
            for item in self.config.interventions
        ]

    def detach(self) -> None:
        """Take the interventions off the model. After the last one it is exactly the model it was."""
        adapters = _adapters(self.model)
        if adapters is None or adapters.refts.get(self.name) is not self:
            raise ValueError(f"the interventions '{self.name}' are not attached any more")
        adapters.runtime.remove(self._switch)
        del adapters.refts[self.name], adapters[self.name]
        if not adapters.refts:
            adapters.runtime.close()
            delattr(self.model, CHILD_NAME)
            for parameter in adapters.was_trainable:
                parameter.requires_grad_(True)
        forget_compiled_graphs()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `reft_config.json`, `reft_model.safetensors` and a model card; the base is not written."""
        tensors = {name: parameter.data for name, parameter in self.edits.named_parameters()}
        write_checkpoint(folder, Checkpoint(self.config, _describe_base(self.model, self._sites), tensors))

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Copy a checkpoint's numbers into these interventions, in place. Raises ValueError if it does not fit."""
        checkpoint = read_checkpoint(folder)
        check_base(checkpoint.base, _describe_base(self.model, self._sites), folder)
        if checkpoint.config != self.config:
            raise ValueError(f"the checkpoint in {folder} has another config: {checkpoint.config}, not {self.config}")
        copy_tensors(checkpoint.tensors, dict(self.edits.named_parameters()), f"the checkpoint in {folder}")

    @property
    def runtime(self) -> Runtime:
        """The model's hooks. Raises ValueError once detached."""
        adapters = _adapters(self.model)
        if adapters is None:
            raise ValueError(f"the interventions '{self.name}' are not attached any more")
        return adapters.runtime

    def _set(self, on: bool) -> None:
        if self._switch.on != on:
            self._switch.on = on
            forget_compiled_graphs()


def attach(model: PreTrainedModel, config: ReftConfig, name: str = "default") -> Reft:
    """Put interventions on `model`, in place, and freeze everything else in it.

    The model stays the object it was: training, `generate`, pipelines and saving go on with it. New interventions draw
    their start from torch's generator, in float32, on their block's device. Several sets under different names act in
    the order in which they were attached.

    Raises ValueError or TypeError, before anything was changed: a name in use, a site or segment that the model lacks,
    a layer out of range or never read, a rank above the width.
    """
    if not isinstance(config, ReftConfig):
        raise TypeError(f"`config` must be a vlreft.ReftConfig, got {type(config).__name__}")
    _check_name(model, name)
    adapters = _adapters(model)
    sites = adapters.runtime.sites if adapters is not None else find_sites(model)
    if adapters is None and hasattr(model, CHILD_NAME):
        raise ValueError(f"{sites.model_name} has a '{CHILD_NAME}' of its own, where interventions are kept; rename it")
    plan = _plan(config, sites)
    edits = nn.ModuleDict({key: _build(item, site, layer) for key, item, site, layer, _ in plan})
    if adapters is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        adapters = Adapters(Runtime(model, sites), trainable)
        model.add_module(CHILD_NAME, adapters)
    switch = Switch()
    reft = Reft(model, config, name, edits, switch, sites)
    adapters[name] = edits.train(model.training)
    adapters.refts[name] = reft
    for key, item, site, layer, part in plan:
        edit = edits[key]
        assert isinstance(edit, Edit)
        adapters.runtime.place(site, layer, Placed(switch, edit, item.parsed_positions, part))
    forget_compiled_graphs()
    return reft


def load(model: PreTrainedModel, folder: str | os.PathLike[str], name: str = "default") -> Reft:
    """Attach a saved adapter to its base. Raises ValueError for another base, or a file that is not whole and exact."""
    checkpoint = read_checkpoint(folder)
    check_base(checkpoint.base, _describe_base(model, find_sites(model)), folder)
    with torch.random.fork_rng(devices=[]):  # the start values are thrown away; leave the user's generator alone
        reft = attach(model, checkpoint.config, name)
    try:
        copy_tensors(checkpoint.tensors, dict(reft.edits.named_parameters()), f"the checkpoint in {folder}")
    except ValueError:
        reft.detach()
        raise
    return reft


def find_reft(model: nn.Module, name: str | None = None) -> Reft | None:
    """Return the interventions attached to `model` under `name` (by default the first ones), None if there are none."""
    adapters = _adapters(model)
    if adapters is None:
        return None
    return next(iter(adapters.refts.values())) if name is None else adapters.refts.get(name)


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


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or name in RESERVED_NAMES:
        raise ValueError(f"`name` (={name!r}) must be letters, digits, '_' and '-', and no attribute of a ModuleDict")
    if find_reft(model, name) is not None:
        raise ValueError(f"interventions named '{name}' are attached already; detach them or choose another `name`")


def _plan(config: ReftConfig, sites: Sites) -> list[tuple[str, Intervention, Site, int, int | None]]:
    """Resolve a config on a model: one (key, intervention, site, layer, part) per module to make."""
    plan = []
    for number, item in enumerate(config.interventions):
        site = sites[item.site]
        segment = item.parsed_positions.segment
        if segment not in site.segments:
            have = ", ".join(f"'{name}'" for name in site.segments)
            why = " (the model is text-only)" if sites.image_token_ids == () else ""
            raise ValueError(
                f"positions '{item.positions}': site '{site.name}' of {sites.model_name} has no segment '{segment}'"
                f"{why}; it has {have}"
            )
        for layer in site.resolve_layers(item.layers, segment):  # pyright: ignore[reportArgumentType] - normalised in __post_init__
            if item.rank is not None and item.rank > site.width:
                raise ValueError(
                    f"`rank` (={item.rank}) must be at most the hidden size (={site.width}) of site '{site.name}' "
                    f"layer {layer}; lower `rank`"
                )
            for part, spelling in enumerate(item.parts):
                key = f"{number}:{site.name}:{layer}:{spelling}"
                plan.append((key, item, site, layer, None if item.tied else part))
    return plan


def _build(item: Intervention, site: Site, layer: int) -> Edit:
    device = _device_of(site.blocks[layer])
    if device.type == "meta":
        with torch.device("meta"):
            return item.build(site.width)
    return item.build(site.width).to(device)  # drawn on the CPU: the same start on every device


def _device_of(block: nn.Module) -> torch.device:
    """Return where a block runs: where its parameters are, or where accelerate takes them when it offloads them."""
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]  # accelerate's mark on a module
    for several in hooks:
        for hook in several.hooks if isinstance(several, SequentialHook) else (several,):
            if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return device


def _describe_base(model: PreTrainedModel, sites: Sites) -> Base:
    shape = {name: [len(site.blocks), site.width] for name, site in sites.by_name.items()}
    return Base(model.config.model_type, type(model).__name__, model.config.name_or_path or "", shape)
