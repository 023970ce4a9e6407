"""Stacks: the lists of transformer blocks in a model, and which of them read text and which read pictures.

Nothing is looked up by a family's name. A stack is an outermost list of blocks; what it reads follows from the
sub-config of its nearest ancestor that has one, or, in models without configs (open_clip's, timm's), from its path.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# Parts of a path that tell a stack which is not the one meant by "text" or "vision": it is reached by its path.
SIDE_STACKS = {
    "cross": "cross-attention between other blocks",
    "video": "a tower for videos beside the one for images",
    "high_res": "a second tower for the same images",
    "global_transformer": "blocks behind those of the tower proper",
}
PICTURE_INPUTS = ("pixel_values", "flattened_patches")
SOUND_INPUTS = ("input_features", "input_values")
VISION_NAMES = ("vision", "visual", "image")


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of blocks. kind: "text", "text_encoder", "vision" or "other"; aside: why it is not the main one."""

    path: str
    blocks: tuple[nn.Module, ...]
    kind: str
    owner: nn.Module
    aside: str = ""


def find_stacks(model: nn.Module) -> list[Stack]:
    """Return every stack of a model, in the order of its modules."""
    stacks = []
    for path, blocks in _outermost_stacks(model):
        kind = _kind_by_config(model, path) if isinstance(model, PreTrainedModel) else _kind_by_path(model, path)
        aside = next((why for part, why in SIDE_STACKS.items() if part in path.lower()), "")
        owner = model.get_submodule(owner_path(model, path))
        stacks.append(Stack(path, tuple(blocks.children()), kind, owner, aside))
    return _tell_encoder_from_decoder(stacks)


def config_of(module: nn.Module) -> PreTrainedConfig | None:
    """Return a module's own config, None where it has none."""
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def owner_path(model: nn.Module, path: str) -> str:
    """Return the path of the module that runs a stack: the nearest ancestor with a config, else the parent."""
    above = path.rpartition(".")[0]
    if not isinstance(model, PreTrainedModel):
        return above
    while above and config_of(model.get_submodule(above)) is None:
        above = above.rpartition(".")[0]
    return above


def tower_path(model: nn.Module, path: str) -> str:
    """Return the path of the outermost module around a stack that has the stack's own config."""
    owner = tower = owner_path(model, path)
    config = config_of(model.get_submodule(owner))
    while owner and config is not None:
        owner = owner.rpartition(".")[0]
        if config_of(model.get_submodule(owner)) is config:
            tower = owner
    return tower


def sub_configs(config: PreTrainedConfig, name: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the sub-configs by name, innermost first, the root last under the name ""."""
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if isinstance(sub, PreTrainedConfig):
            yield from sub_configs(sub, key)
    yield name, config


def has_vision_config(config: PreTrainedConfig) -> bool:
    """Whether a part of the config is about pictures."""
    return any(_is_vision_name(name) for name, _ in sub_configs(config))


def width_of(stack: Stack) -> int:
    """Return the width D of a stack's states. Raises ValueError if its blocks do not agree on one."""
    widths = {_width_of_block(block) for block in stack.blocks} - {None}
    if not widths:
        widths = {getattr(config_of(stack.owner), "hidden_size", None)} - {None}  # OLMo's norms have no weights
    if len(widths) == 1:
        return int(next(iter(widths)))  # pyright: ignore[reportArgumentType] - None was taken out
    if widths:
        several = " and ".join(str(width) for width in sorted(widths, key=str))
        raise ValueError(f"the blocks at '{stack.path}' have different widths, {several}: name one by its path")
    raise ValueError(f"the width of the blocks at '{stack.path}' cannot be read: they have no normalisation layer")


def _width_of_block(block: nn.Module) -> int | None:
    """Read the width off the block's shallowest normalisation: configs name it in a dozen ways, some misleading."""
    modules = sorted(block.named_modules(), key=lambda item: item[0].count(".") + bool(item[0]))
    for name, module in modules:
        weight = getattr(module, "weight", None)
        if "norm" in f"{type(module).__name__} {name}".lower() and weight is not None and weight.dim() == 1:
            return weight.shape[0]
    return None


def _outermost_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack}.") for stack in found)
        if not inside and isinstance(module, nn.ModuleList | nn.Sequential) and _is_stack(module):
            found.append(path)
            yield path, module


def _is_stack(blocks: nn.Module) -> bool:
    items = list(blocks.children())
    if any(_only_convolves(item) for item in items):
        return False  # what turns sound into frames
    if items and all(isinstance(item, GradientCheckpointingLayer) for item in items):
        return True
    has_attention = [any("att" in name.lower() for name, _ in item.named_children()) for item in items]
    return bool(items) and len({type(item) for item in items}) == 1 and all(has_attention)


def _only_convolves(item: nn.Module) -> bool:
    kinds = {type(module) for module in item.modules()}
    return nn.Conv1d in kinds and not any(issubclass(kind, nn.Linear) for kind in kinds)


def _kind_by_config(model: PreTrainedModel, path: str) -> str:
    """Return what a stack reads, by its owner's place among the sub-configs."""
    owner_config = config_of(model.get_submodule(owner_path(model, path)))
    named = list(sub_configs(model.config))
    matches = [name for name, config in named if config is owner_config]
    matches = matches or [name for name, config in named if type(config) is type(owner_config)]
    takes = model.main_input_name
    for name in matches:
        if _is_vision_name(name):
            return "vision"
        if name in ("", "encoder") and takes in SOUND_INPUTS:
            return "text" if "decoder" in path else "other"
        if name == "":
            return _kind_by_inputs(model, path)
        if name == "encoder":  # of two models put together
            return "vision" if takes in PICTURE_INPUTS else "text"
        if "text" in name or name in ("llm_config", "decoder"):
            return "text"
    return "other"


def _kind_by_inputs(model: PreTrainedModel, path: str) -> str:
    """Return what the stack of a model without parts reads, by what its forward takes."""
    names = inspect.signature(type(model).forward).parameters
    if "input_ids" in names or "decoder_input_ids" in names:
        return "text"
    if "decoder" in path:
        return "other"  # queries for objects
    takes_pictures = any(name.startswith(PICTURE_INPUTS) or name.endswith("grid_thw") for name in names)
    return "vision" if takes_pictures else "other"


def _kind_by_path(model: nn.Module, path: str) -> str:
    parts = path.lower().split(".")
    if any(part.startswith(VISION_NAMES) for part in parts):
        return "vision"
    if any("decoder" in part for part in parts):
        return "other"  # CoCa's captioner reads features of text and pictures, not tokens
    has_words = any(isinstance(module, nn.Embedding) for module in model.modules())
    return "text" if has_words else "vision"


def _tell_encoder_from_decoder(stacks: list[Stack]) -> list[Stack]:
    """Of two text stacks, one of them a decoder, the other is the encoder."""
    main = [stack for stack in stacks if stack.kind == "text" and not stack.aside]
    decoders = [stack for stack in main if "decoder" in stack.path]
    if len(main) < 2 or len(decoders) != 1:
        return stacks
    encoders = [stack for stack in main if stack is not decoders[0]]
    return [replace(stack, kind="text_encoder") if stack in encoders else stack for stack in stacks]


def _is_vision_name(name: str) -> bool:
    return "vision" in name or name.startswith("image")
