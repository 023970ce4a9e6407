"""Tables of what the shared tests run over: families of models, interventions, position strings.

Each table takes rows and nothing else: a new family is a `Family` in `FAMILIES`, a new intervention a line in
`INTERVENTIONS`, a new select a line in `SELECTS`. `test_laws.py` says so when a row of the library has none here.
Interventions that put in a source's states have laws of their own, in `test_interchange.py`.

Models are made on the spot from a config, with random weights loud enough for an edit to be heard in the logits. All
families read the same `SAMPLES`; `batch` writes them down as a family wants them.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from family import PAD, Family, Token, llama_sizes, loud, noise, pixels
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import vlreft

ROOT = Path(__file__).parent.parent
ASSETS = ("demo-llava",)  # families whose weights are files, which a checkout may lack

# Families ----------------------------------------------------------------------------------------------------------


def _llama() -> PreTrainedModel:
    return loud(LlamaForCausalLM(LlamaConfig(**llama_sizes())))


def _qwen2() -> PreTrainedModel:
    return loud(Qwen2ForCausalLM(Qwen2Config(**llama_sizes())))


def _gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
    return loud(GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **ids)))


def _llava() -> PreTrainedModel:
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **vision),
        text_config=LlamaConfig(**llama_sizes()),
        image_token_id=60,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    return loud(LlavaForConditionalGeneration(config))


def _qwen25vl() -> PreTrainedModel:
    vision = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"window_size": 56, "fullatt_block_indexes": [1]},
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=llama_sizes(rope_parameters=rope),
        vision_config=vision,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return loud(Qwen2_5_VLForConditionalGeneration(config))


def _demo(folder: str) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        model = LlavaForConditionalGeneration.from_pretrained(ROOT / "assets" / folder)
        model.generation_config.eos_token_id = None  # the tests count generated tokens
        return model.eval()

    return build


def _qwen_patches(pictures: Sequence[int]) -> dict[str, Tensor]:
    """Pictures of 4 x 4 patches of 2 x 3 x 14 x 14 numbers, merged by fours to 4 tokens."""
    patches = torch.cat([noise(picture, 16, 2 * 3 * 14 * 14) for picture in pictures])
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * len(pictures))}


def _qwen_token_types(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (batch["input_ids"] == 60).long()}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", _llama, text="model.layers"),
        Family("qwen2", _qwen2, text="model.layers"),
        Family("gpt2", _gpt2, text="transformer.h", position_ids=True),
        Family(
            "llava",
            _llava,
            text="model.language_model.layers",
            vision="model.vision_tower.encoder.layers",
            media=pixels(28),
            image_tokens=(60,) * 4,
            image_id=60,
            vision_tokens=5,
            num_cls=1,
            grid=(2, 2),
        ),
        Family(
            "qwen2_5_vl",
            _qwen25vl,
            text="model.language_model.layers",
            vision="model.visual.blocks",
            media=_qwen_patches,
            image_tokens=(62, 60, 60, 60, 60, 63),
            image_id=60,
            vision_tokens=16,
            grid=(4, 4),
            states="packed",
            extra=_qwen_token_types,
            takes_fullgraph=False,
        ),
        Family(
            "demo-llava",
            _demo("demo-llava"),
            text="model.language_model.layers",
            vision="model.vision_tower.encoder.layers",
            media=pixels(64),
            image_tokens=(4,) * 64,
            image_id=4,
            vision_tokens=65,
            num_cls=1,
            grid=(8, 8),
            patch_pixels=8,
            first_id=4,
            position_ids=True,
        ),
    )
    if family.name not in ASSETS or (ROOT / "assets" / family.name / "model.safetensors").is_file()
}

# Interventions -----------------------------------------------------------------------------------------------------


def plain_rotation(a_RD: Tensor) -> Tensor:
    """Return the orthonormal rows that Gram and Schmidt make of `a_RD`, by torch's Householder QR."""
    q_DR, r_RR = torch.linalg.qr(a_RD.T)
    return (q_DR * r_RR.diagonal().sign()).T


def _plain_loreft(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    r = plain_rotation(p["rotation"])
    return h + (h @ p["weight"].T + p["bias"] - h @ r.T) @ r


def _plain_direft(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return h + (h @ p["weight"].T + p["bias"]) @ plain_rotation(p["rotation"])


def _plain_noreft(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    v = p["projection"]
    return h + (h @ p["weight"].T + p["bias"] - h @ v.T) @ v


def _plain_nodireft(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return h + (h @ p["weight"].T + p["bias"]) @ p["projection"]


def _plain_consreft(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    r = plain_rotation(p["rotation"])
    return h + (p["bias"] - h @ r.T) @ r


def _plain_lobireft(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return h + p["bias"] @ plain_rotation(p["rotation"])


def _length(h: Tensor) -> Tensor:
    return h.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Method:
    """One row: a method's config fields, what it computes in plain words, and whether it can start as the identity."""

    plain: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    fields: Mapping[str, Any] = field(default_factory=dict)
    has_identity: bool = True


INTERVENTIONS: dict[str, Method] = {
    "loreft": Method(_plain_loreft, {"rank": 3}),
    "direft": Method(_plain_direft, {"rank": 3}),
    "noreft": Method(_plain_noreft, {"rank": 3}),
    "nodireft": Method(_plain_nodireft, {"rank": 3}),
    "consreft": Method(_plain_consreft, {"rank": 3, "init": "reference"}, has_identity=False),
    "lobireft": Method(_plain_lobireft, {"rank": 3}),
    "red": Method(lambda h, p: p["gain"] * h + p["bias"]),
    "vector": Method(lambda h, p: h + p["vector"]),
    "vti": Method(lambda h, p: _length(h) * F.normalize(F.normalize(h, dim=-1) + p["vector"], dim=-1)),
}
IDENTITIES = [name for name, method in INTERVENTIONS.items() if method.has_identity]


def intervention(method: str, **fields: Any) -> vlreft.Intervention:
    """Make an `Intervention` of a method, with the fields that its row needs."""
    return vlreft.Intervention(method, **{**INTERVENTIONS[method].fields, **fields})


def shake(reft: vlreft.Reft, seed: int = 3) -> vlreft.Reft:
    """Move all parameters off their start, so that edits are heard."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reft.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return reft


# Positions ---------------------------------------------------------------------------------------------------------

# Each select of the library, by its class's name, with strings that use it.
SELECTS: dict[str, tuple[str, ...]] = {
    "All": ("all",),
    "First": ("f1", "f4"),
    "Last": ("l1", "l4"),
    "Uniform": ("uniform3",),
    "Slice": ("[1:3]", "[-2:]"),
    "Region": ("rows[0:1]cols[:]", "rows[-1:]cols[1:2]"),
    "Box": ("box[3,0,15,9]",),
}
REGIONS = ("Region", "Box")
TEXT_POSITIONS = (
    *(select for name, selects in SELECTS.items() if name not in REGIONS for select in selects),
    *("prompt", "text:f3+l2", "question:f4+l4", "f1+l1", "response", "response:f2"),
)
IMAGE_POSITIONS = ("image", "image:f2+l1", "image:uniform2", "text:[1:3]+l1")
VISION_POSITIONS = ("patches", "all")
DENSE_VISION_POSITIONS = ("patches:f1+l2", "patches:uniform2", "f2")
CLASS_POSITIONS = ("cls",)


def selectors(family: Family, site: str) -> tuple[str, ...]:
    """Return the position strings to try at a site of a family."""
    if site == "text":
        return TEXT_POSITIONS + (IMAGE_POSITIONS if family.has_image else ())
    if site == "connector":
        return ("image", "image:f1+l1")
    more = CLASS_POSITIONS if family.num_cls else ()
    if family.grid is not None:
        more += tuple(f"patches:{select}" for name in REGIONS for select in SELECTS[name])
    return VISION_POSITIONS + DENSE_VISION_POSITIONS + more


def plain_positions(text: str, row: Sequence[Token]) -> list[int]:
    """Return the indices that a position string selects of a row, by list comprehensions."""
    segment, _, selects = text.partition(":") if re.match(r"[a-z]+:", text) else ("", "", text)
    if text in ("prompt", "text", "image", "question", "response"):
        segment, selects = text, "all"
    prompt = [token for token in row if not token.is_answer]
    last_image = max((token.index for token in prompt if token.is_image), default=-1)
    members = {
        "prompt": prompt,
        "text": [token for token in prompt if not token.is_image],
        "image": [token for token in prompt if token.is_image],
        "question": [token for token in prompt if not token.is_image and token.index > last_image],
        "response": [token for token in row if token.is_answer],
    }[segment or "prompt"]
    indices = [token.index for token in members]
    return sorted({indices[rank] for rank in _plain_ranks(selects.split("+"), len(indices))})


def plain_tower_positions(text: str, family: Family) -> list[int]:
    """Return the indices that a position string selects of one picture's tokens in a tower, in raster order."""
    segment, _, selects = text.partition(":") if re.match(r"[a-z]+:[^,]", text) else ("", "", text)
    if text in ("cls", "patches"):
        segment, selects = text, "all"
    num_cls, first = family.num_cls, 0 if family.cls_last else family.num_cls
    num_patches = family.vision_tokens - num_cls if family.grid is None else math.prod(family.grid)
    everything = list(range(num_cls + num_patches))  # what is left are pads
    if selects.startswith(("rows", "box")):
        return [first + place for place in _plain_region(selects, family)]
    patches = everything[first : first + num_patches]
    members = {"cls": sorted({*everything} - {*patches}), "patches": patches, "": everything}[segment]
    return sorted({members[rank] for rank in _plain_ranks(selects.split("+"), len(members))})


def _plain_region(select: str, family: Family) -> list[int]:
    """Return the raster places of patches in some rows and columns, or of those that share a pixel with a box."""
    assert family.grid is not None
    rows, cols = range(family.grid[0]), range(family.grid[1])
    if select.startswith("rows"):
        bounds = [tuple(int(b) if b else None for b in part.split(":")) for part in re.findall(r"\[(.*?)\]", select)]
        return [row * len(cols) + col for row in rows[slice(*bounds[0])] for col in cols[slice(*bounds[1])]]
    left, top, right, bottom = (int(number) for number in re.findall(r"\d+", select))
    size, inside = family.patch_pixels, []
    for row, col in itertools.product(rows, cols):
        xs, ys = range(col * size, (col + 1) * size), range(row * size, (row + 1) * size)
        if set(xs) & set(range(left, right)) and set(ys) & set(range(top, bottom)):
            inside.append(row * len(cols) + col)
    return inside


def _plain_ranks(selects: Sequence[str], count: int) -> list[int]:
    everything, picked = list(range(count)), []
    is_shared = {select[0] for select in selects} >= {"f", "l"}
    for select in selects:
        if select == "all":
            picked += everything
        elif select.startswith("uniform"):
            num = int(select[len("uniform") :])
            picked += [math.floor((i + 0.5) * count / num) for i in range(num)] if count else []
        elif select.startswith("["):
            start, stop = (int(bound) if bound else None for bound in select[1:-1].split(":"))
            picked += everything[start:stop]
        else:
            num, is_first = int(select[1:]), select[0] == "f"
            if is_shared:
                num = min(num, count // 2 if is_first else math.ceil(count / 2))
            picked += everything[:num] if is_first else everything[max(0, count - num) :]
    return picked


# Watching ----------------------------------------------------------------------------------------------------------


class Spy:
    """Record what one block's edit is given and what it makes of it, in every forward inside `with`.

    before: the states as the block made them (with `of_input`, as they came to it). after: what goes on. kept: copies
    of `before`, taken before the edit could write into it.
    """

    def __init__(self, block: torch.nn.Module, *, of_input: bool = False) -> None:
        """Choose a block; `with` starts to record. Make it after `attach`: its first hook has to come first."""
        self.block, self.of_input = block, of_input
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.kept_after: list[Tensor] = []
        self.handles: list[Any] = []

    def __enter__(self) -> "Spy":
        """Hook the block on both sides of the library's hook."""

        def first(_module: object, args: Any, *more: Any) -> None:
            self.before.append(self._state(args, more))
            self.kept.append(self.before[-1].detach().clone())

        def last(_module: object, args: Any, *more: Any) -> None:
            self.after.append(self._state(args, more))
            self.kept_after.append(self.after[-1].detach().clone())

        if self.of_input:
            register = functools.partial(self.block.register_forward_pre_hook, with_kwargs=True)
        else:
            register = self.block.register_forward_hook
        self.handles = [register(first, prepend=True), register(last)]
        return self

    def __exit__(self, *_: object) -> None:
        """Unhook."""
        for handle in self.handles:
            handle.remove()

    def _state(self, args: Any, more: Any) -> Tensor:
        value = more[0] if not self.of_input else args or list(more[0].values())
        return value[0] if isinstance(value, tuple | list) else value

    def edited(self, call: int = 0) -> Tensor:
        """Return mask_BT (mask_T of a packed tower): where a call's states were changed in any number.

        Copies are compared: a block may go on to write into what it was handed.
        """
        return (self.kept[call] != self.kept_after[call]).any(-1)


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean cross entropy of the labelled tokens, written out."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
