"""Rows of the zoo made of open_clip's classes: plain modules without a transformers config.

A batch holds `image` and `text`, a picture and a text for each sample. Texts are padded to the context length, and no
mask says where; word 29 of the samples is larger than the end id of the rows that pool at the first end id. Forwards
return a tuple (image features, text features, scale, bias if there is one), and a dict of these with
`output_dict=True`; CoCa returns a dict always. Neither has a loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from family import IMAGE, PAD, PAIRS, Family, Sample, loud, noise
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import Transformer
from timm.models import VisionTransformer, register_model
from torch import Tensor, nn

CONTEXT_LENGTH = 12
END = 28
LARGEST = 63
EMBED_DIM = 16

TEXT_CFG = {"context_length": CONTEXT_LENGTH, "vocab_size": 64, "width": 32, "heads": 4, "layers": 3, "eos_id": END}
VIT_CFG = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 14, "image_size": 28}


def _pairs(end: int, size: int, text_length: int) -> Callable[[Sequence[Sample], str, bool, int], dict[str, Tensor]]:
    """Write a text and a picture per sample; there are no labels, and texts are of one length always."""

    def write(samples: Sequence[Sample], side: str, _answer: bool, _more_pads: int) -> dict[str, Tensor]:
        rows = [[*(token for token in sample.prompt if token != IMAGE), end] for sample in samples]
        fills = [[PAD] * (text_length - len(row)) for row in rows]
        pairs = zip(rows, fills, strict=True)
        return {
            "image": torch.stack([noise(31 * sample.prompt[0] + 1, 3, size, size) for sample in samples]),
            "text": torch.tensor([[*f, *row] if side == "left" else [*row, *f] for row, f in pairs]),
        }

    return write


def _made(
    model: Callable[..., nn.Module],
    text: Mapping[str, object],
    vision: Mapping[str, object],
    *,
    embed_dim: int = EMBED_DIM,
    **more: object,
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)  # `loud` moves vectors from where they are
            made = model(embed_dim, vision_cfg={**VIT_CFG, **vision}, text_cfg={**TEXT_CFG, **text}, **more)
        made = loud(made)
        with torch.no_grad():
            for name, parameter in made.named_parameters():  # not among the names that `loud` takes for tables
                if name.endswith("positional_embedding"):
                    parameter.mul_(2.0)
        return made

    return build


@register_model
def tiny_siglip_tower(pretrained: bool = False, **more: Any) -> VisionTransformer:  # noqa: ARG001
    """Build a tower of SigLIP's kind under a name that open_clip can ask timm for; all of timm's own are large."""
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": EMBED_DIM, "depth": 3, "num_heads": 2}
    more = {name: value for name, value in more.items() if name in ("num_classes", "global_pool")}
    return VisionTransformer(**sizes, class_token=False, **more)


def _length_first(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make the towers hold states as [T, B, D]. CLIP's constructor does not pass `batch_first` on, so set it."""

    def rebuild() -> nn.Module:
        made = build()
        for module in made.modules():
            if isinstance(module, Transformer):
                module.batch_first = False
                for block in module.resblocks:
                    block.attn.batch_first = False
        return made

    return rebuild


def _row(
    name: str,
    build: Callable[[], nn.Module],
    text: str,
    vision: str,
    *,
    end: int = END,
    size: int = 28,
    num_cls: int = 1,
    vision_tokens: int = 5,
    grid: tuple[int, int] | None = (2, 2),
    text_length: int = CONTEXT_LENGTH,
    skips: Mapping[str, str] | None = None,
) -> Family:
    return Family(
        name,
        build,
        text=text,
        vision=vision,
        media=lambda pictures: {"image": torch.stack([noise(picture, 3, size, size) for picture in pictures])},
        vision_tokens=vision_tokens,
        num_cls=num_cls,
        grid=grid,
        end_ids=(end,),
        write=_pairs(end, size, text_length),
        samples=PAIRS,
        skips={**SKIPS, **(skips or {})},
    )


SKIPS = {
    "train": "it computes no loss, and takes no labels",
    "generate": "a dual encoder has no generate",
    "left padding": "positions count the pads, and no mask hides them",
}
TEXT, VISION = "transformer.resblocks", "visual.transformer.resblocks"

ROWS: tuple[Family, ...] = (
    # Pooled at the largest id. States are [B, T, D].
    _row("open-clip", _made(CLIP, {}, {}), TEXT, VISION, end=LARGEST),
    # Pooled at the largest id. States are [T, B, D] in both towers.
    _row("open-clip-lnd", _length_first(_made(CLIP, {}, {})), TEXT, VISION, end=LARGEST),
    # Pooled at the largest id; output is a dict.
    _row("open-clip-custom", _made(CustomTextCLIP, {}, {}, output_dict=True), f"text.{TEXT}", VISION, end=LARGEST),
    # Pooled at the first end id; a bias is the fourth of the output.
    _row(
        "open-clip-end",
        _made(CustomTextCLIP, {"pool_type": "eos"}, {}, init_logit_bias=-10.0),
        f"text.{TEXT}",
        VISION,
    ),
    # As SigLIP: pooled at the last position, pads included, without a causal mask. A tower of timm, whose blocks are a
    # Sequential; pictures are pooled by attention, there is no class token.
    _row(
        "open-clip-siglip",
        _made(
            CustomTextCLIP,
            {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
            {"timm_model_name": tiny_siglip_tower.__name__, "timm_pool": "map", "timm_proj": "none", "image_size": 28},
            init_logit_bias=-10.0,
        ),
        f"text.{TEXT}",
        "visual.trunk.blocks",
        num_cls=0,
        vision_tokens=4,
    ),
    # Pooled at the largest id. Another tower of timm, with a class token; what is read is the mean of its
    # patches, so that what the last block makes of the class token goes nowhere.
    _row(
        "open-clip-timm",
        _made(CLIP, {}, {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}),
        TEXT,
        "visual.trunk.blocks",
        end=LARGEST,
        size=160,
        vision_tokens=101,
        grid=(10, 10),
    ),
    # A ResNet has no blocks of tokens: only the text can be edited. Each step in train mode moves its batch norms.
    _row(
        "open-clip-resnet",
        _made(CLIP, {}, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 64}),
        TEXT,
        "",
        end=LARGEST,
        size=64,
        num_cls=0,
        vision_tokens=0,
        grid=None,
    ),
    # Its text tower adds a class token behind the text (12 words, 13 states) and pools it. The decoder reads the states
    # of the words, and those of the picture by blocks of cross-attention between its own (`text_decoder.resblocks` and
    # `text_decoder.cross_attn`).
    _row(
        "open-clip-coca",
        _made(
            CoCa,
            {"embed_cls": True, "output_tokens": True},
            {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 6, "output_tokens": True},
            embed_dim=32,
            multimodal_cfg={
                **{"context_length": CONTEXT_LENGTH, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
            },
        ),
        f"text.{TEXT}",
        VISION,
    ),
)
