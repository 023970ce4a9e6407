"""Families whose text does not hold a token per image feature, or has two stacks, or an encoder and a decoder.

Where a model puts pictures in front of the text, behind it, or into cross-attention, no id stands for features:
`image_id` is -1. Chameleon, Emu3 and Fuyu have such ids but no tower of blocks to edit. Encoder-decoders read the
prompt (where they have one) in the encoder, and the answer in the decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from family import IMAGE, PAD, WITH_IMAGES, Family, Sample, llama_sizes, loud, noise, pixels
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
    GitConfig,
    GitForCausalLM,
    GotOcr2ForConditionalGeneration,
    GPT2Config,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    Kosmos2_5Config,
    Kosmos2_5ForConditionalGeneration,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    PPChart2TableConfig,
    PPFormulaNetConfig,
    PPFormulaNetForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    UdopConfig,
    UdopForConditionalGeneration,
    ViltConfig,
    ViltForQuestionAnswering,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

# Each row has exactly one picture: these models take a picture a row.
ONE_EACH = (
    Sample((5, IMAGE, 8, 11, 12, 13, 14, 15, 16), (20, 21)),
    Sample((6, IMAGE, 17, 18, 9), (22, 23, 24)),
    Sample((7, 10, IMAGE, 19, 25, 26), (27,)),
)
# Each row has a picture, some have two.
SOME_EACH = (*WITH_IMAGES, ONE_EACH[1])

IMAGE_ID, START_ID, END_ID = 60, 62, 63
NEVER = 99  # an id outside the vocabulary, for models that insist on an end id
COUNTS_PADS = {"left padding": "`generate` with a cache counts the pads in front as positions of the new tokens"}
WANTS_PICTURES = {"no images": "the forward wants `pixel_values`"}

CLIP_SIZES = {
    **{"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPATIAL_SIZES = {
    **{"hidden_size": 24, "output_channels": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32},
}
FAIRSEQ_SIZES = {
    **{"vocab_size": 64, "embed_dim": 32, "layers": 3, "ffn_dim": 48, "attention_heads": 4},
    **{"dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 256},
    **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None},
}


def _make(
    model: Callable[[Any], PreTrainedModel], config: Callable[..., PreTrainedConfig], **fields: Any
) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(7)  # for what `loud` only adds to
            made = model(config(**{name: dict(v) if isinstance(v, dict) else v for name, v in fields.items()}))
        return loud(made.requires_grad_(True))

    return build


def _padded(rows: Sequence[Sequence[int]], side: str, fill: int, more: int = 0) -> Tensor:
    width = max(map(len, rows)) + more
    fills = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for row, f in zip(rows, fills, strict=True)])


def _words(sample: Sample) -> list[int]:
    return [token for token in sample.prompt if token != IMAGE]


def _numbers(samples: Sequence[Sample]) -> list[int]:
    """Number the one picture of each sample that has one, as `Family.pictures` does."""
    return [31 * sample.prompt[0] + sample.prompt.index(IMAGE) for sample in samples if IMAGE in sample.prompt]


def _encoded(
    media: Callable[[Sequence[int]], dict[str, Tensor]],
    *,
    has_prompt: bool = True,
    more: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Callable[[Sequence[Sample], str, bool, int], dict[str, Tensor]]:
    """Write prompts for the encoder and answers for the decoder; answers are padded behind, whatever the side."""

    def write(samples: Sequence[Sample], side: str, answer: bool, more_pads: int) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if has_prompt:
            prompts = [_words(sample) for sample in samples]
            made["input_ids"] = _padded(prompts, side, PAD, more_pads)
            made["attention_mask"] = _padded([[1] * len(prompt) for prompt in prompts], side, 0, more_pads)
        if answer:
            made["labels"] = _padded([sample.answer for sample in samples], "right", -100)
        if pictures := _numbers(samples):
            made |= media(pictures)
        return made | (more(made) if more is not None else {})

    return write


# Pictures in front of the text, or marked by a mask of their own ---------------------------------------------------


def _image_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kosmos is told by a mask, not by an id, which embeddings are features."""
    return {"image_embeds_position_mask": (batch["input_ids"] == IMAGE_ID).long()}


def _flattened_patches(pictures: Sequence[int]) -> dict[str, Tensor]:
    """Pictures of 2 x 3 patches of 48 numbers, each behind its row and column, counted from 1."""
    places = torch.tensor([[row, column] for row in (1, 2) for column in (1, 2, 3)], dtype=torch.float)
    return {"flattened_patches": torch.stack([torch.cat([places, noise(p, 6, 48)], 1) for p in pictures])}


def _masked_patches(pictures: Sequence[int]) -> dict[str, Tensor]:
    """Say by the mask, which is the decoder's in other models, that all patches are there."""
    return {**_flattened_patches(pictures), "attention_mask": torch.ones(len(pictures), 6)}


FRONT_ROWS = (
    # The text blocks see the tower's 5 tokens, then the text with its pads.
    Family(
        "git",
        _make(
            *(GitForCausalLM, GitConfig),
            vision_config=CLIP_SIZES,
            **{**llama_sizes(), **NO_DROPOUT},
        ),
        text="git.encoder.layer",
        vision="git.image_encoder.vision_model.encoder.layers",
        media=pixels(28),
        vision_tokens=5,
        num_cls=1,
        grid=(2, 2),
        position_ids=True,
        samples=ONE_EACH,
        refused={"text": "stand before the words"},
        skips={
            "no images": "the loss leaves out the picture's tokens, there or not: ValueError of 4 logits and 14 labels",
            "checkpointing": "RuntimeError: a leaf Variable that requires grad is being used in an in-place operation",
        },
    ),
    # The class token is one of the tokens that the latent queries read.
    Family(
        "kosmos2",
        _make(
            *(Kosmos2ForConditionalGeneration, Kosmos2Config),
            **{"text_config": FAIRSEQ_SIZES, "vision_config": CLIP_SIZES, "latent_query_num": 4},
        ),
        text="text_model.model.layers",
        vision="vision_model.model.encoder.layers",
        media=pixels(28),
        image_tokens=(START_ID, *(IMAGE_ID,) * 4, END_ID),
        image_id=IMAGE_ID,
        vision_tokens=5,
        num_cls=1,
        grid=(2, 2),
        samples=SOME_EACH,
        extra=_image_mask,
        skips={
            **WANTS_PICTURES,
            **COUNTS_PADS,
            "float64": "RuntimeError: its mask is made in float32 of the smallest float64",
        },
    ),
    # Smaller pictures would be filled up with patches of zeros at the end.
    Family(
        "kosmos2_5",
        _make(
            *(Kosmos2_5ForConditionalGeneration, Kosmos2_5Config),
            text_config=FAIRSEQ_SIZES,
            vision_config={
                **{"hidden_size": 24, "patch_embed_hidden_size": 48, "intermediate_size": 32, "head_dim": 12},
                **{"num_hidden_layers": 3, "num_attention_heads": 2, "max_num_patches": 16},
            },
            latent_query_num=4,
        ),
        text="text_model.model.layers",
        vision="vision_model.encoder.layer",
        media=_flattened_patches,
        image_tokens=(START_ID, *(IMAGE_ID,) * 4, END_ID),
        image_id=IMAGE_ID,
        vision_tokens=6,
        grid=(2, 3),
        extra=_image_mask,
        skips={
            "left padding": "behind the prompt, `generate` with a cache counts the pads in front of it as positions"
        },
    ),
)

# Pictures without a tower of blocks --------------------------------------------------------------------------------

CODES = range(40, 48)  # ids of the eight codes that pictures are made of


def _emu3() -> PreTrainedModel:
    model = _make(
        *(Emu3ForConditionalGeneration, Emu3Config),
        vq_config={
            **{"codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32},
            **{"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [3]},
        },
        text_config=llama_sizes(attention_dropout=0.0),
        vocabulary_map={"<image>": IMAGE_ID, "<|extra_200|>": 59}
        | {f"<|visual token {i:06d}|>": code for i, code in enumerate(CODES)},
    )()
    # All pictures lie close together in the space of codes: put the codes there, or one would stand for everything.
    coder, seen = model.model.vqmodel, list[Tensor]()
    handle = coder.quantize.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        coder.encode(**_sized_pictures((1, 2)))
        coder.quantize.embedding.weight.copy_(seen[0].movedim(2, -1).reshape(8, 4))
    handle.remove()
    return model


def _sized_pictures(pictures: Sequence[int]) -> dict[str, Tensor]:
    return {**pixels(4)(pictures), "image_sizes": torch.tensor([[4, 4]] * len(pictures))}


NO_TOWER_ROWS = (
    # Codes take the place of the image ids and are embedded as words are; they cannot be generated.
    Family(
        "chameleon",
        _make(
            *(ChameleonForConditionalGeneration, ChameleonConfig),
            vq_config={
                **{"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 8, "base_channels": 32},
                **{"channel_multiplier": [1, 1], "num_res_blocks": 1},
            },
            vocabulary_map={"<image>": IMAGE_ID} | {f"IMGIMG{'ABCDEFGH'[i]}Z": code for i, code in enumerate(CODES)},
            **llama_sizes(),
        ),
        text="model.layers",
        media=pixels(4),
        image_tokens=(START_ID, *(IMAGE_ID,) * 4, END_ID),
        image_id=IMAGE_ID,
    ),
    # 2 x 2 codes, each row of them with an end of line behind. The coder has batch norm: a forward in train mode moves
    # its running statistics, frozen or not, and with them may change the codes.
    Family(
        "emu3",
        _emu3,
        text="model.text_model.layers",
        media=_sized_pictures,
        image_tokens=(START_ID, *(IMAGE_ID,) * 6, END_ID),
        image_id=IMAGE_ID,
    ),
    Family(
        "fuyu",
        _make(
            *(FuyuForCausalLM, FuyuConfig),
            text_config=llama_sizes(model_type="persimmon", hidden_dropout=0.0, attention_dropout=0.0),
            **{"image_size": 8, "patch_size": 4, "image_token_id": IMAGE_ID},
        ),
        text="model.language_model.layers",
        media=lambda pictures: {"pixel_values": torch.stack([noise(picture, 4, 48) for picture in pictures])},
        image_tokens=(*(IMAGE_ID,) * 4, END_ID),
        image_id=IMAGE_ID,
    ),
)

# Pictures by cross-attention ---------------------------------------------------------------------------------------


def _from_image_on(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which tokens may look at their row's picture: its marker and what comes after."""
    return ((batch["input_ids"] == IMAGE_ID).cumsum(1) > 0).long() * batch["attention_mask"]


def _tiles(pictures: Sequence[int]) -> dict[str, Tensor]:
    """One picture of one tile a row."""
    count = len(pictures)
    return {
        "pixel_values": torch.stack([noise(picture, 1, 1, 3, 28, 28) for picture in pictures]),
        "aspect_ratio_ids": torch.ones(count, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(count, 1, 1, dtype=torch.long),
    }


def _cross_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"cross_attention_mask": _from_image_on(batch)[:, :, None, None]} if "pixel_values" in batch else {}


def _one_picture_a_row(pictures: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([noise(picture, 1, 3, 28, 28) for picture in pictures])}


def _picture_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"image_attention_mask": _from_image_on(batch)[:, :, None]}


BLIP_TEXT = {
    **llama_sizes(eos_token_id=3, sep_token_id=NEVER, label_smoothing=0.0),
    **{"projection_dim": 16, **NO_DROPOUT},
}
BLIP_VISION = {**CLIP_SIZES, "hidden_size": 32, "projection_dim": 16}  # one width: the decoder of VQA reads both


def _shifted_answer(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP's decoder would read the labels themselves, with the -100 in them; its loss shifts them."""
    if "labels" not in batch:
        return {}
    start_B1 = torch.ones(len(batch["labels"]), 1, dtype=torch.long)
    labels_BT = torch.cat([-100 * start_B1, batch["labels"]], 1)
    ids_BT = torch.cat([start_B1, batch["labels"].clamp(min=PAD)], 1)
    return {"labels": labels_BT, "decoder_input_ids": ids_BT, "decoder_attention_mask": (ids_BT != PAD).long()}


def _opened(build: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Open the gates wide that start shut and that `loud` opens by a crack."""

    def build_opened() -> PreTrainedModel:
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate" in name.rpartition(".")[2]:
                    parameter.fill_(1.0)
        return model

    return build_opened


class PadsItself(Family):
    """A family whose `generate` says `pad_token_id` itself and takes no second one."""

    def generation(self, num_tokens: int = 4, **more: Any) -> dict[str, Any]:
        """Return greedy arguments of `generate` without the pad id."""
        arguments = super().generation(num_tokens, **more)
        del arguments["pad_token_id"]
        return arguments


ABSOLUTE = {"left padding": "its positions are the places in the row, pads counted, and the forward takes no others"}

CROSS_ROWS = (
    # Text block 2 is the cross-attention; it is not called for a batch without pictures. A picture's 4 patches and
    # class token are filled up to 8. A second tower, `model.vision_model.global_transformer.layers`, comes behind the
    # first; the states behind blocks 0 and 1 of the first are joined to what it makes.
    Family(
        "mllama",
        _opened(
            _make(
                *(MllamaForConditionalGeneration, MllamaConfig),
                text_config=llama_sizes(cross_attention_layers=[2], bos_token_id=1),
                vision_config={
                    **{"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_global_layers": 2},
                    **{"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 72},
                    **{"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0, 1]},
                },
                image_token_index=IMAGE_ID,
            )
        ),
        text="model.language_model.layers",
        vision="model.vision_model.transformer.layers",
        media=_tiles,
        image_tokens=(IMAGE_ID,),
        vision_positions=("all",),
        vision_tokens=8,
        num_cls=1,
        samples=ONE_EACH,
        extra=_cross_mask,
    ),
    # `model.gated_cross_attn_layers` stand in front of text blocks 0 and 2 and add to the states.
    Family(
        "idefics",
        _make(
            *(IdeficsForVisionText2Text, IdeficsConfig),
            vision_config={
                **{"embed_dim": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
                **{"image_size": 28, "patch_size": 14},
            },
            **llama_sizes(num_hidden_layers=4, cross_layer_interval=2, alpha_type="vector"),
        ),
        text="model.layers",
        vision="model.vision_model.encoder.layers",
        media=_one_picture_a_row,
        image_tokens=(START_ID, IMAGE_ID, END_ID),
        vision_tokens=5,
        num_cls=1,
        grid=(2, 2),
        samples=ONE_EACH,
        extra=_picture_mask,
        takes_fullgraph=False,
        skips=WANTS_PICTURES,
    ),
    # `generate` writes its start id over the first token of the prompt and drops the last, an end id; it never stops,
    # as it takes `sep_token_id` for the end.
    PadsItself(
        "blip",
        _make(BlipForConditionalGeneration, BlipConfig, text_config=BLIP_TEXT, vision_config=BLIP_VISION),
        text="text_decoder.bert.encoder.layer",
        vision="vision_model.encoder.layers",
        media=pixels(28),
        vision_tokens=5,
        num_cls=1,
        grid=(2, 2),
        end_ids=(3,),
        samples=ONE_EACH,
        skips={**WANTS_PICTURES, **ABSOLUTE},
    ),
    # The forward returns a loss and no logits.
    PadsItself(
        "blip_vqa",
        _make(BlipForQuestionAnswering, BlipConfig, text_config=BLIP_TEXT, vision_config=BLIP_VISION),
        text="text_decoder.bert.encoder.layer",
        text_encoder="text_encoder.encoder.layer",
        vision="vision_model.encoder.layers",
        media=pixels(28),
        vision_tokens=5,
        num_cls=1,
        grid=(2, 2),
        samples=ONE_EACH,
        write=_encoded(pixels(28), more=_shifted_answer),
        skips={
            **{**WANTS_PICTURES, **ABSOLUTE},
            "batching": "the decoder reads the prompt's pads: its cross-attention drops the mask",
            "checkpointing": "RuntimeError: a leaf Variable that requires grad is being used in an in-place operation",
        },
    ),
)

# Encoder-decoders, and pictures behind the text --------------------------------------------------------------------

T5_SIZES = {"d_kv": 8, "d_ff": 48, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}


def _boxes(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UDOP is told where each word stands on the page; these lie within the page's upper left patch."""
    places_BT = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    left_BT = 0.03 * places_BT
    box_BT4 = torch.stack([left_BT, left_BT, left_BT + 0.02, left_BT + 0.02], -1)
    return {"bbox": box_BT4 * batch["attention_mask"][:, :, None]}


def _written_so_far(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PP-FormulaNet makes no decoder input of the labels."""
    if "labels" not in batch:
        return {}
    start_B1 = torch.ones(len(batch["labels"]), 1, dtype=torch.long)
    return {"decoder_input_ids": torch.cat([start_B1, batch["labels"][:, :-1].clamp(min=PAD)], 1)}


def _answer_numbers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ViLT sorts questions into answers; the labels are scores, here of the answer's first token."""
    if "labels" not in batch:
        return {}
    return {"labels": torch.nn.functional.one_hot(batch["labels"][:, 0], 32).float()}


def _vit_gpt2() -> PreTrainedModel:
    decoder = GPT2Config(
        **{"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None},
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**CLIP_SIZES, **NO_DROPOUT), decoder)
    config.decoder_start_token_id = config.decoder.decoder_start_token_id = 1
    config.pad_token_id = PAD
    return loud(VisionEncoderDecoderModel(config))


ENCODER_ROWS = (
    Family(
        "pix2struct",
        _make(
            *(Pix2StructForConditionalGeneration, Pix2StructConfig),
            text_config={
                **{"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0},
                **T5_SIZES,
                **{"pad_token_id": PAD, "eos_token_id": None},
            },
            vision_config={
                **{"hidden_size": 32, "patch_embed_hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
                **{**T5_SIZES, "seq_len": 16},
            },
        ),
        text="decoder.layer",
        vision="encoder.encoder.layer",
        media=_masked_patches,
        vision_tokens=6,
        grid=(2, 3),
        samples=ONE_EACH,
        write=_encoded(_masked_patches, has_prompt=False),
        skips={
            "no images": "the picture is all it reads",
            "checkpointing": "ValueError: Pix2StructForConditionalGeneration does not support activation checkpointing",
        },
    ),
    Family(
        "vision_encoder_decoder",
        _vit_gpt2,
        text="decoder.transformer.h",
        vision="encoder.layers",
        media=pixels(28),
        vision_tokens=5,
        num_cls=1,
        grid=(2, 2),
        samples=ONE_EACH,
        write=_encoded(pixels(28), has_prompt=False),
        skips={"no images": "the picture is all it reads"},
    ),
    Family(
        "pp_formulanet",
        _make(
            *(PPFormulaNetForConditionalGeneration, PPFormulaNetConfig),
            text_config={
                **{"vocab_size": 64, "d_model": 32, "decoder_layers": 3, "decoder_ffn_dim": 48},
                **{"decoder_attention_heads": 4, "dropout": 0.0, "max_position_embeddings": 64},
                **{"pad_token_id": PAD, "bos_token_id": 1, "decoder_start_token_id": 1},
                **{"eos_token_id": None, "forced_eos_token_id": None},
            },
            vision_config={
                **SPATIAL_SIZES,
                **{"post_conv_in_channels": 16, "post_conv_mid_channels": 16, "post_conv_out_channels": 16},
                "decoder_hidden_size": 32,
            },
        ),
        text="model.decoder.layers",
        vision="model.encoder.layers",
        media=pixels(32),
        vision_tokens=64,
        grid=(8, 8),
        states="spatial",
        samples=ONE_EACH,
        write=_encoded(pixels(32), has_prompt=False, more=_written_so_far),
        skips={"no images": "the picture is all it reads"},
    ),
    # Patches of the page without words on them, three of four here, are appended to the prompt inside the encoder.
    Family(
        "udop",
        _make(
            *(UdopForConditionalGeneration, UdopConfig),
            **{"vocab_size": 64, "d_model": 32, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4},
            **{
                "d_kv": 8,
                "d_ff": 48,
                "dropout_rate": 0.0,
                "image_size": 32,
                "patch_size": 16,
                "max_2d_position_embeddings": 64,
            },
            **{"pad_token_id": PAD, "eos_token_id": None, "decoder_start_token_id": PAD},
        ),
        text="decoder.block",
        text_encoder="encoder.block",
        media=pixels(32),
        samples=ONE_EACH,
        write=_encoded(pixels(32), more=_boxes),
        takes_fullgraph=False,
        refused={"text_encoder": "stand behind the words"},
        skips={
            "batching": "pads behind a prompt stand between it and the picture and are counted in relative positions",
            "checkpointing": "RuntimeError: a leaf Variable that requires grad is being used in an in-place operation",
        },
    ),
    Family(
        "vilt_vqa",
        _make(
            *(ViltForQuestionAnswering, ViltConfig),
            **{**CLIP_SIZES, **NO_DROPOUT, "vocab_size": 64, "max_image_length": -1, "num_labels": 32},
        ),
        text="vilt.encoder.layer",
        media=pixels(28),
        samples=ONE_EACH,
        write=_encoded(pixels(28), more=_answer_numbers),
        takes_fullgraph=False,
        refused={"text": "stand behind the words"},
        skips={**WANTS_PICTURES, **ABSOLUTE, "generate": "it sorts questions into answers and writes none"},
    ),
)

# The class of GOT-OCR 2: spatial states, an id for each feature ----------------------------------------------------

SPATIAL_ROWS = (
    Family(
        "pp_chart2table",
        _make(
            *(GotOcr2ForConditionalGeneration, PPChart2TableConfig),
            text_config=llama_sizes(model_type="qwen2"),
            vision_config=SPATIAL_SIZES,
            **{"image_token_index": IMAGE_ID, "image_seq_length": 4},
        ),
        text="model.language_model.layers",
        vision="model.vision_tower.layers",
        media=pixels(32),
        image_tokens=(START_ID, *(IMAGE_ID,) * 4, END_ID),
        image_id=IMAGE_ID,
        vision_tokens=64,
        grid=(8, 8),
        states="spatial",
    ),
)

ROWS: tuple[Family, ...] = (*FRONT_ROWS, *NO_TOWER_ROWS, *CROSS_ROWS, *ENCODER_ROWS, *SPATIAL_ROWS)
