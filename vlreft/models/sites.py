"""Sites: where a model's states can be edited, how wide they are, and what its tokens mean, found by structure.

What structure does not tell enough about is a row in `vlreft.models.quirks`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from vlreft.layout import TOWER_SEGMENTS, WORDS, Vocabulary
from vlreft.models.components import Target, find_target
from vlreft.models.quirks import Quirk, quirk_of
from vlreft.models.stacks import VISION_NAMES, Stack, config_of, find_stacks, has_vision_config, tower_path, width_of

# Parameters that are a class token of a tower, in the field's spellings, and further tokens beside it.
CLASS_TOKEN_NAMES = ("class_embedding", "cls_token", "class_token")
REGISTER_NAMES = ("reg_token", "register_tokens", "dist_token", "distillation_token")
# Arguments of a tower that packs pictures in an order of its family's.
PACKING_ARGUMENTS = frozenset({"grid_thw", "image_grid_thw"})
UNKNOWN_ORDER = "in which order its tower packs the patches of a picture is not known"
MERGING = ("grouped", "windows")  # orders of patches in which a merge window becomes an image token
TEXT_STREAMS = ("text", "text_encoder")
KINDS = (*TEXT_STREAMS, "vision")
MARKER_ATTRIBUTES = ("audio_token_id", "audio_token_index")


@dataclass(frozen=True, eq=False)
class Tower:
    """What a vision site knows of its tokens: `module` runs the tower, `num_cls` class tokens, `num_registers` others.

    Class tokens are in front, or behind the patches (`cls_last`). patch_size: pixels, None if unknown. patch_order: of
    a tower that packs its pictures (see `Quirk`), "" if unknown. no_patches: why cls and patches cannot be told;
    no_grid: why no region can be taken. merge: patches that become one image token, along each side. grid: rows and
    columns of patches, where each patch becomes an image token and all pictures have one size.
    """

    module: nn.Module
    num_cls: int = 0
    num_registers: int = 0
    cls_last: bool = False
    patch_size: tuple[int, int] | None = None
    patch_order: str = ""
    no_patches: str = ""
    no_grid: str = ""
    merge: int = 1
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A place where hidden states can be edited.

    name: "text", "text_encoder", "vision", "connector" or the path of a module. blocks: the modules that `layers`
    counts. width: D. owner: the module that runs the blocks. path: where they are. segments: the position segments that
    exist here. stream: whose token ids lay these states out, "" if they are a tower's own; num_live: blocks from 0
    whose output the model reads; `dead_because` says why later ones are dead. drops_cls: whether the model throws the
    class token of the last live block away. sequence_first: states are (T, B, D). is_module: it is one module named by
    its path, no list of blocks; block_around: the block that it is in, if any. no_image_region: why no region can be
    taken of its image tokens.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    width: int
    owner: nn.Module
    path: str
    segments: tuple[str, ...]
    stream: str
    num_live: int
    dead_because: str = ""
    drops_cls: bool = False
    sequence_first: bool = False
    is_module: bool = False
    block_around: nn.Module | None = None
    no_image_region: str = "its tokens are no patches"
    tower: Tower | None = None

    @property
    def no_region(self) -> str:
        """Why no region of a picture can be taken here, "" if it can."""
        if self.stream:
            return self.no_image_region
        tower = self.tower
        if tower is None or tower.no_patches:
            return "its tokens are not those of one picture"
        return tower.no_grid

    def target(self, layer: int, component: str) -> Target:
        """Return the module to hook for a component of a layer. Raises ValueError if there is none."""
        if self.name == "connector":
            if component != "output":
                raise ValueError("site 'connector' is one place, before the first block: leave `component` out")
            return Target(self.blocks[0], self.width, at_input=True)
        if self.is_module:
            return self._module_target(component)
        return find_target(self.blocks[layer], component, self.width, f"site '{self.name}' layer {layer}")

    def _module_target(self, component: str) -> Target:
        module = self.blocks[0]
        if component == "input" and isinstance(module, nn.Linear):
            return Target(module, module.in_features, at_input=True, block=self.block_around)
        if component != "output":
            raise ValueError(f"site '{self.name}' is one module, of which the output is edited: leave `component` out")
        return Target(module, self.width, block=self.block_around)

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
    """Everything that `attach` has to know of a model: sites by name, and what the tokens of each stream mean.

    `quirk`: what is special about its family. `refused`: why a site is not there.
    """

    model: nn.Module
    by_name: Mapping[str, Site]
    vocabularies: Mapping[str, Vocabulary]
    stacks: tuple[Stack, ...]
    quirk: Quirk
    refused: Mapping[str, str]

    @property
    def model_name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def image_stream(self) -> str:
        """The stream that image tokens stand in."""
        return "text_encoder" if "text_encoder" in self.by_name else "text"

    def __getitem__(self, name: str) -> Site:
        """Return a site, by its name or a module's path. Raises ValueError that lists those the model has."""
        if name in self.by_name:
            return self.by_name[name]
        if name in self.refused:
            raise ValueError(f"{self.model_name} has no site '{name}' ({self.refused[name]}); it has {self._have()}")
        if name not in dict(self.model.named_modules()) or not name:
            raise ValueError(
                f"{self.model_name} has no site '{name}'; it has {self._have()}, and every module by its path"
            )
        return self._at_path(name)

    def _have(self) -> str:
        return ", ".join(f"'{known}'" for known in self.by_name) or "none by name"

    def _at_path(self, path: str) -> Site:
        """Make a site of a list of blocks, or of one module, whose output is edited."""
        stack = next((stack for stack in self.stacks if path == stack.path), None)
        module = self.model.get_submodule(path)
        blocks = stack.blocks if stack is not None else (module,)
        width = width_of(stack) if stack is not None else _width_of_output(module, path)
        around = [stack for stack in self.stacks if f"{path}.".startswith(f"{stack.path}.")]
        for outer in around:
            if outer.kind in self.quirk.refuses:
                raise ValueError(f"'{path}' of {self.model_name} cannot be edited: {self.quirk.why}")
        known = next((site for site in self.by_name.values() if around and site.path == around[0].path), None)
        owner = stack.owner if stack is not None else module
        tower = Tower(owner, no_patches="nothing is known of the states of a module named by its path")
        site = Site(path, blocks, width, owner, path, ("prompt",), "", len(blocks), tower=tower)
        if known is not None:
            site = replace(known, name=path, blocks=blocks, width=width, path=path, num_live=len(blocks))
        blocks_around = [block for outer in around for block in outer.blocks if module in block.modules()]
        block_around = next((block for block in blocks_around if block is not module), None)
        return replace(site, is_module=stack is None, block_around=block_around, dead_because="")


def find_sites(model: nn.Module) -> Sites:
    """Find the sites of a model of transformers, open_clip or timm. Raises ValueError if it has no blocks to edit."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a transformers or open_clip model, got {type(model).__name__}")
    _refuse_wrapper(model)
    stacks = tuple(find_stacks(model))
    if not any(stack.kind != "other" for stack in stacks):
        raise ValueError(
            f"{type(model).__name__} cannot be edited: no list of transformer blocks that read text or pictures was "
            "found in it"
        )
    quirk = quirk_of(model.config) if isinstance(model, PreTrainedModel) else Quirk("")
    refused = dict.fromkeys(quirk.refuses, quirk.why)
    if any(_is_inside_transformers(model, stack.path) for stack in stacks):
        refused["text"] = "its text tower is a transformers model, which alone knows the padding: attach to that one"
    main = {kind: stack for kind in KINDS if (stack := _choose(kind, stacks, refused)) is not None}
    vocabularies = _vocabularies(model, quirk, main)
    by_name = {
        kind: _vision_site(model, stack, quirk) if kind == "vision" else _site(stack, vocabularies[kind].segments, kind)
        for kind, stack in main.items()
    }
    _add_connector(by_name, vocabularies, refused)
    return Sites(model, by_name, vocabularies, stacks, quirk, refused)


def _add_connector(by_name: dict[str, Site], vocabularies: Mapping[str, Vocabulary], refused: dict[str, str]) -> None:
    """Add the site where image features enter the blocks that read them among words."""
    stream = "text_encoder" if "text_encoder" in by_name else "text"
    if stream not in by_name or not vocabularies[stream].image_ids or "connector" in refused:
        refused.setdefault("connector", "its image features do not enter the language model at marked tokens")
        return
    text = by_name[stream] = replace(by_name[stream], no_image_region=_no_image_region(by_name.get("vision")))
    by_name["connector"] = replace(text, name="connector", blocks=text.blocks[:1], segments=("image",), num_live=1)


def _refuse_wrapper(model: nn.Module) -> None:
    """Refuse what wraps a transformers model, as peft and DDP do: its calls are not those of the model inside."""
    if isinstance(model, PreTrainedModel) or type(model).__module__.startswith("open_clip"):
        return
    inside = next((path for path, module in model.named_modules() if isinstance(module, PreTrainedModel)), None)
    if inside is not None:
        kind = type(model.get_submodule(inside)).__name__
        raise ValueError(
            f"a {type(model).__name__} wraps a transformers model: attach to that {kind}, `model.{inside}`"
        )


def _is_inside_transformers(model: nn.Module, path: str) -> bool:
    """Whether a part of a model that is none of transformers' is one."""
    if isinstance(model, PreTrainedModel):
        return False
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:number])) for number in range(1, len(parts)))
    return any(isinstance(module, PreTrainedModel) for module in above)


def _no_image_region(vision: Site | None) -> str:
    tower = None if vision is None else vision.tower
    if tower is None or tower.patch_size is None or (tower.grid is None and tower.patch_order not in MERGING):
        return "how its image tokens lie in the picture is not known"
    return ""


def _choose(kind: str, stacks: Sequence[Stack], refused: dict[str, str]) -> Stack | None:
    """Return the one stack of a kind that can be edited, or put the reason why there is none into `refused`."""
    if kind in refused:
        return None
    of_kind = [stack for stack in stacks if stack.kind == kind]
    found = [stack for stack in of_kind if not stack.aside] or of_kind
    if len(found) == 1:
        try:
            width_of(found[0])
            return found[0]
        except ValueError as error:
            refused[kind] = str(error)
            return None
    paths = " and ".join(f"'{stack.path}'" for stack in found)
    refused[kind] = f"no {kind} stack of transformer blocks was found"
    if found:
        refused[kind] = f"{len(found)} {kind} stacks, {paths}: name one of them by its path"
    return None


def _site(stack: Stack, segments: tuple[str, ...], stream: str) -> Site:
    attentions = [module for module in stack.blocks[0].modules() if isinstance(module, nn.MultiheadAttention)]
    return Site(
        stream or "vision",
        stack.blocks,
        width_of(stack),
        stack.owner,
        stack.path,
        segments,
        stream,
        len(stack.blocks),
        sequence_first=any(not attention.batch_first for attention in attentions),
    )


def _vision_site(model: nn.Module, stack: Stack, quirk: Quirk) -> Site:
    tower = _tower(model, stack, quirk)
    segments = tuple(
        s for s in TOWER_SEGMENTS if s == "prompt" or (not tower.no_patches and (s != "cls" or tower.num_cls))
    )
    site = replace(_site(stack, segments, ""), tower=tower)
    read = getattr(config_of(model), "vision_feature_layer", None)
    if read is None:
        return site
    num_blocks = len(stack.blocks)
    states = [read] if isinstance(read, int) else list(read)
    # hidden_states[0] is the embedding, so state k is the output of block k - 1.
    num_live = max(state if state >= 0 else num_blocks + 1 + state for state in states)
    dead_because = f"{type(model).__name__} reads the output of layer {num_live - 1} (vision_feature_layer={read})"
    drops_cls = getattr(config_of(model), "vision_feature_select_strategy", None) == "default"
    return replace(site, num_live=num_live, dead_because=dead_because, drops_cls=drops_cls)


def _tower(model: nn.Module, stack: Stack, quirk: Quirk) -> Tower:
    path = tower_path(model, stack.path)
    if not isinstance(model, PreTrainedModel):
        first = stack.path.partition(".")[0]
        path = first if first.startswith(VISION_NAMES) else ""  # `visual`, or the tower is the model
    module = model.get_submodule(path)
    named = dict(module.named_parameters())
    registers = [parameter for name, parameter in named.items() if name.rpartition(".")[2] in REGISTER_NAMES]
    packs = not PACKING_ARGUMENTS.isdisjoint(inspect.signature(type(module).forward).parameters)
    return Tower(
        module,
        num_cls=sum(1 for name in named if name.rpartition(".")[2] in CLASS_TOKEN_NAMES),
        num_registers=sum(parameter.shape[-2] for parameter in registers),
        cls_last=quirk.cls_last,
        patch_size=_patch_size(module),
        patch_order=quirk.patch_order,
        no_patches=quirk.why if quirk.mixed_tokens else "",
        no_grid=UNKNOWN_ORDER if packs and not quirk.patch_order else "",
        merge=getattr(config_of(module), "spatial_merge_size", 1),
        grid=_fixed_grid(module) if quirk.tokens_are_patches else None,
    )


def _patch_size(tower: nn.Module) -> tuple[int, int] | None:
    """Return the pixels of a patch: the config says it, or the convolution that cuts the picture."""
    size = getattr(config_of(tower), "patch_size", None)
    if size is None:
        cuts = [m for m in tower.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride]
        size = cuts[0].kernel_size if len(cuts) == 1 else None
    if isinstance(size, int):
        return (size, size)
    return (size[0], size[1]) if isinstance(size, tuple | list) and len(size) == 2 else None


def _fixed_grid(tower: nn.Module) -> tuple[int, int] | None:
    """Return rows and columns of patches of a tower whose pictures all have one size, None for others."""
    if "image_sizes" in inspect.signature(type(tower).forward).parameters:
        return None
    size, patch = getattr(config_of(tower), "image_size", None), _patch_size(tower)
    if not isinstance(size, int) or patch is None or size % patch[0] or size % patch[1]:
        return None
    return size // patch[0], size // patch[1]


def _vocabularies(model: nn.Module, quirk: Quirk, main: Mapping[str, Stack]) -> dict[str, Vocabulary]:
    """Say for each stream what its ids mean: image features stand in the encoder's where there is one."""
    streams = {kind: WORDS for kind in main if kind in TEXT_STREAMS}
    if not isinstance(model, PreTrainedModel):
        return {kind: _open_clip_vocabulary(model, main[kind]) for kind in streams}
    if model.config.is_encoder_decoder and "text_encoder" not in streams:
        return streams  # an encoder of pictures; the decoder's tokens are words
    images_in = "text_encoder" if "text_encoder" in streams else "text"
    if images_in not in streams:
        return streams
    streams[images_in] = replace(_images_among(model, quirk), **_pooling(model, quirk))
    return streams


def _images_among(model: PreTrainedModel, quirk: Quirk) -> Vocabulary:
    config = model.config
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id", "video_token_index")]
    image_ids = tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))
    others = [getattr(config, name, None) for name in MARKER_ATTRIBUTES]
    marks = tuple(token_id for token_id in others if isinstance(token_id, int))
    if quirk.marks_only:
        return Vocabulary((), image_ids + marks)
    if quirk.image_mask:
        return Vocabulary((-1,), marks)  # told by a mask, by no id
    if image_ids:
        return Vocabulary(image_ids, marks)
    is_dual = bool(quirk.pools) or config.is_encoder_decoder
    return Vocabulary(None if has_vision_config(config) and not is_dual else (), marks)


def _pooling(model: PreTrainedModel, quirk: Quirk) -> dict[str, int | str]:
    pools = quirk.pools
    if not pools:
        return {}
    config = model.config.get_text_config()
    end, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    if pools == "end" and end == 2:
        pools = "largest"  # OpenAI's first files name a wrong end token; transformers takes the largest id there
    return {"pools": pools, "end_id": -1 if end is None else end, "pad_id": -1 if pad is None else pad}


def _open_clip_vocabulary(model: nn.Module, stack: Stack) -> Vocabulary:
    """Read how open_clip's text tower pools: an attribute of the model, or of its text tower."""
    tower = model.get_submodule(stack.path.partition(".")[0]) if "." in stack.path else model
    pools = getattr(model, "text_pool_type", getattr(tower, "pool_type", None))
    pools = {"argmax": "largest", "eos": "end", "first": "first", "last": "last"}.get(str(pools), "")
    end, pad = (getattr(tower, name, getattr(model, f"text_{name}", None)) for name in ("eos_id", "pad_id"))
    end, pad = (number if isinstance(number, int) else default for number, default in ((end, -1), (pad, 0)))
    # CoCa puts a token of its own behind the text, and pools it.
    num_behind = int(getattr(tower, "cls_emb", None) is not None)
    return Vocabulary((), (), "last" if num_behind else pools, end, pad, num_behind)


def _width_of_output(module: nn.Module, path: str) -> int:
    """Return the width of a module's output, read off its last layer that has one."""
    for layer in reversed(list(module.modules())):
        if isinstance(layer, nn.Linear):
            return layer.out_features
        if isinstance(layer, nn.Embedding):
            return layer.embedding_dim
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() == 1:
            return weight.shape[0]
    raise ValueError(
        f"the width of what module '{path}' gives cannot be read off it; name a module with a linear layer"
    )
