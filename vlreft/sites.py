"""Sites: where a model's blocks are, how wide its states are, and what its tokens mean, found by structure.

No family is looked up by name. A stack is an outermost list of transformer blocks; which stack is text and which is
vision follows from the sub-config of its nearest ancestor that has one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# Parameters that are a class token of a tower, in the field's two spellings.
CLASS_TOKEN_NAMES = ("class_embedding", "cls_token")


@dataclass(frozen=True, eq=False)
class Site:
    """A place where hidden states can be edited.

    name: "text", "vision" or "connector". blocks: the modules whose output is edited (of "connector": text block 0,
    whose input is edited). width: D. owner: the module that runs the blocks. num_live: blocks from 0 whose output the
    model reads; `dead_because` says why later ones are dead. num_cls: class tokens in front (vision). segments: the
    position segments that exist here. drops_cls: whether the model throws the class token of the last live block away
    (vision). path: where the blocks are in the model, for messages only.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    width: int
    owner: nn.Module
    path: str
    segments: tuple[str, ...]
    num_live: int
    dead_because: str = ""
    num_cls: int = 0
    drops_cls: bool = False

    @property
    def edits_input(self) -> bool:
        """Whether the edit acts on the input of the block rather than on its output."""
        return self.name == "connector"

    def resolve_layers(self, layers: str | tuple[int, ...], segment: str) -> tuple[int, ...]:
        """Return block numbers from 0. Raises ValueError for a layer that is not there, or whose edit is never read."""
        drops = self.drops_cls and segment == "cls"
        num_live = self.num_live - 1 if drops else self.num_live
        dead_because = f"the model drops the class token behind layer {num_live}" if drops else self.dead_because
        if layers == "all":
            return tuple(range(num_live))
        resolved = []
        for layer in layers:
            assert isinstance(layer, int)
            if not -len(self.blocks) <= layer < len(self.blocks):
                raise ValueError(
                    f"layer {layer} is out of range: site '{self.name}' has {len(self.blocks)} layer"
                    f"{'s' if len(self.blocks) > 1 else ''}, 0 to {len(self.blocks) - 1}"
                )
            resolved.append(layer % len(self.blocks))
            if resolved[-1] >= num_live:
                raise ValueError(
                    f"layer {layer} of site '{self.name}' can never matter: {dead_because}; "
                    f"use layers 0 to {num_live - 1}"
                )
        if len(set(resolved)) != len(resolved):
            raise ValueError(f"`layers` (={list(layers)}) names a layer of site '{self.name}' twice")
        return tuple(resolved)


@dataclass(frozen=True, eq=False)
class Sites:
    """Everything that `attach` has to know of a model.

    `image_token_ids`: ids that stand for image features in `input_ids`; () for a text-only model, None if unknown.
    """

    by_name: Mapping[str, Site]
    image_token_ids: tuple[int, ...] | None
    model_name: str
    refused: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Site:
        """Return a site. Raises ValueError that lists those the model has."""
        if name in self.by_name:
            return self.by_name[name]
        have = ", ".join(f"'{known}'" for known in self.by_name)
        why = f" ({self.refused[name]})" if name in self.refused else ""
        raise ValueError(f"{self.model_name} has no site '{name}'{why}; it has {have}")


def find_sites(model: nn.Module) -> Sites:
    """Find the sites of a transformers model. Raises ValueError if it has no text stack that vlreft can edit."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    stacks: dict[str, list[tuple[str, nn.Module]]] = {"text": [], "vision": []}
    for path, blocks in _outermost_stacks(model):
        kind = _kind_of(model, path)
        if kind in stacks:
            stacks[kind].append((path, blocks))
    refused = {}
    for kind, found in stacks.items():
        if len(found) > 1:
            paths = " and ".join(path for path, _ in found)
            refused[kind] = f"two {kind} stacks, {paths}, and vlreft cannot tell which is meant"
        elif not found:
            refused[kind] = f"no {kind} stack of transformer blocks was found"
    if "text" in refused:
        raise ValueError(f"{name} cannot be edited: {refused['text']}")
    return _assemble(model, name, stacks, refused)


def _assemble(
    model: PreTrainedModel, name: str, stacks: Mapping[str, list[tuple[str, nn.Module]]], refused: dict[str, str]
) -> Sites:
    image_token_ids = _image_token_ids(model)
    sites: dict[str, Site] = {}
    segments = ("prompt", "response")
    if image_token_ids is not None:
        segments = ("prompt", "text", "question", "response") + (("image",) if image_token_ids else ())
    path, blocks = stacks["text"][0]
    text = _site(model, "text", path, blocks, segments)
    sites["text"] = text
    if "vision" not in refused:
        sites["vision"] = _vision_site(model, *stacks["vision"][0])
    if image_token_ids:
        sites["connector"] = Site("connector", text.blocks[:1], text.width, text.owner, path, ("image",), 1)
    else:
        refused["connector"] = "its image features do not enter the language model at marked tokens"
    return Sites(sites, image_token_ids, name, refused)


def _site(model: nn.Module, name: str, path: str, blocks: nn.Module, segments: tuple[str, ...]) -> Site:
    items = tuple(blocks.children())
    owner = model.get_submodule(_owner_path(model, path))
    return Site(name, items, _width(items[0], path), owner, path, segments, len(items))


def _vision_site(model: PreTrainedModel, path: str, blocks: nn.Module) -> Site:
    num_blocks, tower = len(tuple(blocks.children())), _tower(model, path)
    num_cls = sum(1 for name, _ in tower.named_parameters() if name.rpartition(".")[2] in CLASS_TOKEN_NAMES)
    num_live, dead_because = num_blocks, ""
    if (read := getattr(model.config, "vision_feature_layer", None)) is not None:
        states = [read] if isinstance(read, int) else list(read)
        # hidden_states[0] is the embedding, so state k is the output of block k - 1.
        num_live = max(state if state >= 0 else num_blocks + 1 + state for state in states)
        dead_because = f"{type(model).__name__} reads the output of layer {num_live - 1} (vision_feature_layer={read})"
    site = _site(model, "vision", path, blocks, ("prompt", "patches") + (("cls",) if num_cls else ()))
    drops_cls = getattr(model.config, "vision_feature_select_strategy", None) == "default"
    return replace(site, num_live=num_live, dead_because=dead_because, num_cls=num_cls, drops_cls=drops_cls)


def _outermost_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack}.") for stack in found)
        if not inside and isinstance(module, nn.ModuleList | nn.Sequential) and _is_stack(module):
            found.append(path)
            yield path, module


def _is_stack(blocks: nn.Module) -> bool:
    items = list(blocks.children())
    if items and all(isinstance(item, GradientCheckpointingLayer) for item in items):
        return True
    has_attention = [any("att" in name.lower() for name, _ in item.named_children()) for item in items]
    return bool(items) and len({type(item) for item in items}) == 1 and all(has_attention)


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def _owner_path(model: nn.Module, path: str) -> str:
    while path:
        path = path.rpartition(".")[0]
        if _config_of(model.get_submodule(path)) is not None:
            return path
    return path


def _kind_of(model: PreTrainedModel, path: str) -> str:
    """Return "text", "vision" or "other" for the stack at `path`, by its owner's place among the sub-configs."""
    owner_config = _config_of(model.get_submodule(_owner_path(model, path)))
    named = list(_sub_configs(model.config))
    matches = [name for name, config in named if config is owner_config]
    matches = matches or [name for name, config in named if type(config) is type(owner_config)]
    for name in matches:
        if "vision" in name or name.startswith("image"):
            return "vision"
        if "text" in name or name in ("", "llm_config", "decoder"):
            return "vision" if model.main_input_name == "pixel_values" and not _has_text(model) else "text"
    return "other"


def _has_text(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings() is not None and isinstance(model.get_input_embeddings(), nn.Embedding)


def _sub_configs(config: PreTrainedConfig, name: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the sub-configs by name, innermost first, the root last under the name ""."""
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if isinstance(sub, PreTrainedConfig):
            yield from _sub_configs(sub, key)
    yield name, config


def _tower(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the outermost module above `path` that has the tower's own config."""
    owner = _owner_path(model, path)
    config, tower = _config_of(model.get_submodule(owner)), owner
    while owner:
        owner = owner.rpartition(".")[0]
        if _config_of(model.get_submodule(owner)) is config:
            tower = owner
    return model.get_submodule(tower)


def _width(block: nn.Module, path: str) -> int:
    """Return D, read off the block's shallowest normalisation: configs name it in a dozen ways, some misleading."""
    modules = sorted(block.named_modules(), key=lambda item: item[0].count(".") + bool(item[0]))
    for name, module in modules:
        weight = getattr(module, "weight", None)
        if "norm" in f"{type(module).__name__} {name}".lower() and weight is not None and weight.dim() == 1:
            return weight.shape[0]
    raise ValueError(f"the hidden width of the blocks at '{path}' cannot be read: they have no normalisation layer")


def _image_token_ids(model: PreTrainedModel) -> tuple[int, ...] | None:
    config = model.config
    image_token_id = getattr(config, "image_token_id", None)
    if isinstance(image_token_id, int):
        return (image_token_id,)
    has_vision = any("vision" in name or name.startswith("image") for name, _ in _sub_configs(config))
    return None if has_vision else ()
