"""Rows of the zoo for dual encoders of transformers: a text tower and an image tower, compared at the end.

A batch holds a text and a picture for each sample, and neither tower sees the other's. Texts end with an end id and are
padded as the family's own processor pads. A word of the samples is larger than the end id of most rows, so that "the
largest id" and "the first end id" are different places.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from family import IMAGE, PAD, PAIRS, Family, Sample, loud, noise, pixels
from torch import Tensor, nn
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BlipConfig,
    BlipForImageTextRetrieval,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegModel,
    GroupViTConfig,
    GroupViTModel,
    MetaClip2Config,
    MetaClip2Model,
    Owlv2Config,
    Owlv2Model,
    OwlViTConfig,
    OwlViTModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

END = 28
LARGEST = 63
MAX_LENGTH = 16  # what the processors of the SigLIP families pad to

Media = Callable[[Sequence[int]], dict[str, Tensor]]


def _pairs(
    media: Media, end: int, *, pad: int = PAD, pads_to_max: bool = False, loss: Mapping[str, Tensor]
) -> Callable[[Sequence[Sample], str, bool, int], dict[str, Tensor]]:
    """Write a text and a picture per sample; the SigLIP families pad to the full length and get no mask."""

    def write(samples: Sequence[Sample], side: str, answer: bool, more_pads: int) -> dict[str, Tensor]:
        rows = [[*(token for token in sample.prompt if token != IMAGE), end] for sample in samples]
        width = MAX_LENGTH if pads_to_max else max(map(len, rows)) + more_pads

        def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            fills = [[fill] * (width - len(row)) for row in values]
            pairs = zip(values, fills, strict=True)
            return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for row, f in pairs])

        made = {"input_ids": padded(rows, pad)}
        if not pads_to_max:
            made["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        pictures = [31 * sample.prompt[0] + 1 for sample in samples]
        return made | media(pictures) | (loss if answer else {})

    return write


PIXELS = pixels(28)
CONTRASTIVE = {"return_loss": torch.tensor(True)}


def _naflex(num_slots: int) -> Media:
    """Pictures of 2 x 3 patches of 3 x 4 x 4 numbers in `num_slots` places, pads behind."""

    def media(pictures: Sequence[int]) -> dict[str, Tensor]:
        patches = torch.zeros(len(pictures), num_slots, 3 * 4 * 4)
        for row, picture in enumerate(pictures):
            patches[row, :6] = noise(picture, 6, 3 * 4 * 4)
        mask = (torch.arange(num_slots) < 6).int().repeat(len(pictures), 1)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[2, 3]] * len(pictures)),
        }

    return media


TEXT_SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"max_position_embeddings": 32, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END},
}
VISION_SIZES = {
    **{"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
BERT_LIKE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _dual(
    model: Callable[..., nn.Module],
    config: Callable[..., Any],
    text: Mapping[str, object],
    vision: Mapping[str, object],
    **more: object,
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        sizes = {"text_config": {**TEXT_SIZES, **text}, "vision_config": {**VISION_SIZES, **vision}}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)  # `loud` moves vectors from where they are, and some models draw theirs
            made = model(config(**sizes, **more))
        return loud(made)

    return build


SKIPS = {
    "left padding": "positions count the pads, or what is pooled is a pad's state",
    "generate": "a dual encoder has no generate",
}


def _row(
    name: str,
    build: Callable[[], nn.Module],
    text: str,
    vision: str,
    *,
    media: Media = PIXELS,
    end: int = END,
    pad: int = PAD,
    pads_to_max: bool = False,
    num_cls: int = 1,
    vision_tokens: int = 5,
    grid: tuple[int, int] | None = (2, 2),
    loss: Mapping[str, Tensor] = CONTRASTIVE,
    refused: Mapping[str, str] | None = None,
    skips: Mapping[str, str] = SKIPS,
) -> Family:
    return Family(
        name,
        build,
        text=text,
        vision=vision,
        media=media,
        vision_tokens=vision_tokens,
        num_cls=num_cls,
        grid=grid,
        end_ids=(end,),
        write=_pairs(media, end, pad=pad, pads_to_max=pads_to_max, loss=loss),
        samples=PAIRS,
        refused=refused or {},
        skips=skips,
    )


TEXT, VISION = "text_model.encoder.layers", "vision_model.encoder.layers"
SIGLIP_TEXT = {"projection_size": 24, "max_position_embeddings": MAX_LENGTH}

ROWS: tuple[Family, ...] = (
    # Its text is pooled at the largest id, as OpenAI's checkpoints say `eos_token_id=2`; pads are end ids too.
    _row(
        "clip",
        _dual(CLIPModel, CLIPConfig, {"eos_token_id": 2}, {}, projection_dim=16),
        TEXT,
        VISION,
        end=LARGEST,
        pad=LARGEST,
    ),
    # Pooled at the first end id.
    _row("clip-end", _dual(CLIPModel, CLIPConfig, {}, {}, projection_dim=16), TEXT, VISION, pad=END),
    # Pooled at the first end id, without the exception for 2.
    _row("metaclip_2", _dual(MetaClip2Model, MetaClip2Config, {}, {}, projection_dim=16), TEXT, VISION),
    # Pooled at the first end id.
    _row("clipseg", _dual(CLIPSegModel, CLIPSegConfig, {}, {}, projection_dim=16), TEXT, VISION, pad=END),
    # Pooled at the last position, which is a pad as a rule. Pictures are pooled by attention, there is no class token.
    _row(
        "siglip",
        _dual(SiglipModel, SiglipConfig, SIGLIP_TEXT, {}),
        TEXT,
        VISION,
        pads_to_max=True,
        num_cls=0,
        vision_tokens=4,
    ),
    # Pooled at the last position. Pictures are patches already, with a mask; here each has as many as there are.
    *(
        _row(
            name,
            _dual(
                Siglip2Model,
                Siglip2Config,
                SIGLIP_TEXT,
                {"patch_size": 4, "num_patches": 16},
            ),
            TEXT,
            VISION,
            media=_naflex(num_slots),
            pads_to_max=True,
            num_cls=0,
            vision_tokens=num_slots,
            grid=(2, 3),
        )
        # In the second, each picture has 6 patches and 2 pads behind them.
        for name, num_slots in (("siglip2", 6), ("siglip2-pads", 8))
    ),
    # Pooled at the first position.
    _row(
        "altclip",
        _dual(AltCLIPModel, AltCLIPConfig, {"project_dim": 16, **BERT_LIKE}, {}, projection_dim=16),
        "text_model.roberta.encoder.layers",
        VISION,
    ),
    # Pooled at the first position.
    _row(
        "chinese_clip",
        _dual(ChineseCLIPModel, ChineseCLIPConfig, BERT_LIKE, {}, projection_dim=16),
        "text_model.encoder.layer",
        VISION,
    ),
    # Pooled at the first position. Its matching head would let the text see the picture: `use_itm_head=False`.
    _row(
        "blip-retrieval",
        _dual(
            BlipForImageTextRetrieval,
            BlipConfig,
            {"encoder_hidden_size": 24},
            {},
            image_text_hidden_size=16,
        ),
        "text_encoder.encoder.layer",
        VISION,
        media=lambda pictures: {**PIXELS(pictures), "use_itm_head": torch.tensor(False)},
        loss={},
        skips={
            "train": "it computes no loss, and takes no labels",
            "checkpointing": "RuntimeError: a leaf Variable that requires grad is being used in an in-place operation",
            **SKIPS,
        },
    ),
    # Pooled at the largest id. It takes several texts per picture, as rows; here one.
    _row(
        "owlvit",
        _dual(OwlViTModel, OwlViTConfig, {}, {}, projection_dim=16),
        TEXT,
        VISION,
        end=LARGEST,
        skips={
            "checkpointing": "reentrant: block 0 of the tower warns that none of its inputs needs a gradient",
            **SKIPS,
        },
    ),
    # Pooled as OWL-ViT is.
    _row(
        "owlv2",
        _dual(Owlv2Model, Owlv2Config, {}, {}, projection_dim=16),
        TEXT,
        VISION,
        end=LARGEST,
        skips={
            "checkpointing": "reentrant: block 0 of the tower warns that none of its inputs needs a gradient",
            **SKIPS,
        },
    ),
    # Pooled at the first end id. Its tower has three stages, each with a list of blocks of its own, and ends each but
    # the last with fewer tokens than it began with (20, of which 4 are group tokens behind the patches; then 6; then
    # 2): no one stack can be edited by layer.
    _row(
        "groupvit",
        _dual(
            GroupViTModel,
            GroupViTConfig,
            {},
            {
                **{"depths": (2, 1, 1), "num_group_tokens": (4, 2, 0), "num_output_groups": (4, 2, 2)},
                **{"num_hidden_layers": 4, "hidden_size": 32, "image_size": 56},
            },
            projection_dim=16,
            projection_intermediate_dim=24,
        ),
        TEXT,
        "",
        media=pixels(56),
        num_cls=0,
        vision_tokens=0,
        grid=None,
        refused={"vision": "vision stack"},
        skips={
            "checkpointing": "in train mode its groups are drawn by chance (Gumbel): no two steps have one gradient",
            **SKIPS,
        },
    ),
)
