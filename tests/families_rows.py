"""Families whose image tokens are written out in `input_ids`: one row of the tower's states a picture or a tile.

A few towers here hold their states otherwise (packed, or as a map); `states` says so. Where a picture is several tiles,
`vision_tokens` and `grid` are of one tile.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from family import IMAGE, PAD, SAMPLES, WITH_IMAGES, Family, Sample, llama_sizes, loud, noise, pixels
from torch import Tensor

IMAGE_ID, VIDEO_ID, START_ID, END_ID = 60, 61, 62, 63
FOUR = (IMAGE_ID,) * 4
TEXT = "model.language_model.layers"
ENCODER = "model.vision_tower.encoder.layers"


def _tiny(model: Callable[[Any], Any], config: Callable[..., Any], **fields: Any) -> Callable[[], Any]:
    """Return what builds a model; configs change the dictionaries that they are given, so each gets its own.

    Weights are not tied: with these, a model would only say its last token again.
    """
    fields = {"tie_word_embeddings": False, **fields}

    def build() -> Any:
        with torch.random.fork_rng():  # `loud` adds to what is drawn for biases and class tokens
            torch.manual_seed(0)
            return loud(model(config(**copy.deepcopy(fields))))

    return build


def _text(kind: str = "llama", **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **llama_sizes(**more)}


def _tower(kind: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {"model_type": kind, **sizes, "image_size": 28, "patch_size": 14, **more}


# Arguments -----------------------------------------------------------------------------------------------------------


def _sized_pixels(size: int) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    return lambda pictures: {**pixels(size)(pictures), "image_sizes": torch.tensor([[size, size]] * len(pictures))}


def _tiles(pictures: Sequence[int]) -> dict[str, Tensor]:
    """Pictures of 28 x 56, as the whole made small and two tiles."""
    tiles = torch.stack([noise(picture, 3, 3, 28, 28) for picture in pictures])
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[28, 56]] * len(pictures))}


def _by_row(per_picture: int) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return what gives each row of the batch its pictures, filled up with empty ones."""

    def extra(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" not in batch:
            return {}
        flat = batch["pixel_values"]
        counts = ((batch["input_ids"] == IMAGE_ID).sum(1) // per_picture).tolist()
        filled = flat.new_zeros(len(counts), max(counts), *flat.shape[1:])
        for row, pictures in zip(filled, flat.split(counts), strict=True):
            row[: len(pictures)] = pictures
        return {"pixel_values": filled}

    return extra


def _types(name: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return what marks the image tokens."""
    return lambda batch: {name: (batch["input_ids"] == IMAGE_ID).long()}


def _paligemma_types(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0 for the prompt, whose tokens see each other, 1 for the answer, as PaliGemma's processor has them."""
    labels = batch.get("labels")
    return {"token_type_ids": torch.zeros_like(batch["input_ids"]) if labels is None else (labels != -100).long()}


# LLaVA and its kin ---------------------------------------------------------------------------------------------------

GRID = {"image_grid_pinpoints": [[28, 56], [56, 28]]}
CLIP = {"vision_config": _tower("clip_vision_model"), "image_token_index": IMAGE_ID}
SIGLIP = _tower("siglip_vision_model", vision_use_head=False)
CLASS_ROWS: dict[str, Any] = {"text": TEXT, "vision": ENCODER, "vision_tokens": 5, "num_cls": 1, "grid": (2, 2)}
PATCH_ROWS: dict[str, Any] = {"text": TEXT, "vision": ENCODER, "vision_tokens": 4, "grid": (2, 2)}
ONE_IMAGE: dict[str, Any] = {"media": pixels(28), "image_tokens": FOUR, "image_id": IMAGE_ID}
FOURTEEN: dict[str, Any] = {
    **{"media": _tiles, "image_tokens": (IMAGE_ID,) * 14, "image_id": IMAGE_ID},  # 4 + 2 x 4, and 2 line ends
    "states": "tiles",
}

LLAVAS = (
    Family(
        "llava_pixtral",
        _tiny(
            tf.LlavaForConditionalGeneration,
            tf.LlavaConfig,
            text_config=_text("mistral"),
            vision_config=_tower("pixtral", hidden_size=32),
            image_token_index=IMAGE_ID,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        **{**PATCH_ROWS, "vision": "model.vision_tower.transformer.layers"},
        **{**ONE_IMAGE, "media": _sized_pixels(28)},
        states="packed",
        takes_fullgraph=False,
    ),
    Family(  # the last block of the tower feeds nothing
        "llava_next",
        _tiny(tf.LlavaNextForConditionalGeneration, tf.LlavaNextConfig, text_config=_text(), **CLIP, **GRID),
        **CLASS_ROWS,
        **FOURTEEN,
        takes_fullgraph=False,
    ),
    Family(  # the last block of the tower feeds nothing
        "llava_next_video",
        _tiny(
            tf.LlavaNextVideoForConditionalGeneration,
            tf.LlavaNextVideoConfig,
            text_config=_text(),
            video_token_index=VIDEO_ID,
            **CLIP,
            **GRID,
        ),
        **CLASS_ROWS,
        **FOURTEEN,
        takes_fullgraph=False,
    ),
    Family(
        "llava_onevision",
        _tiny(
            tf.LlavaOnevisionForConditionalGeneration,
            tf.LlavaOnevisionConfig,
            text_config=_text("qwen2"),
            vision_config=SIGLIP,
            image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID,
            **GRID,
        ),
        **PATCH_ROWS,
        **FOURTEEN,
        takes_fullgraph=False,
    ),
    Family(
        "vipllava",
        _tiny(
            tf.VipLlavaForConditionalGeneration,
            tf.VipLlavaConfig,
            text_config=_text(),
            vision_feature_layer=[-1, -2],
            **CLIP,
        ),
        **CLASS_ROWS,
        **ONE_IMAGE,
    ),
    Family(  # the last block of the tower feeds nothing; `model.video_tower` is a second one, for films
        "video_llava",
        _tiny(
            tf.VideoLlavaForConditionalGeneration,
            tf.VideoLlavaConfig,
            text_config=_text(),
            video_token_index=VIDEO_ID,
            **CLIP,
        ),
        **{**CLASS_ROWS, "vision": "model.image_tower.encoder.layers"},
        **{**ONE_IMAGE, "media": lambda pictures: {"pixel_values_images": pixels(28)(pictures)["pixel_values"]}},
        takes_fullgraph=False,
    ),
)

# Gemma ---------------------------------------------------------------------------------------------------------------

GEMMA = {"head_dim": 8, "eos_token_id": None, "sliding_window": 64}
GEMMA_IDS = {"image_token_index": IMAGE_ID, "boi_token_index": START_ID, "eoi_token_index": END_ID}

GEMMAS = (
    Family(
        "paligemma",
        _tiny(
            tf.PaliGemmaForConditionalGeneration,
            tf.PaliGemmaConfig,
            text_config=_text("gemma", head_dim=8),
            vision_config=SIGLIP,
            image_token_index=IMAGE_ID,
            projection_dim=32,
        ),
        **PATCH_ROWS,
        **ONE_IMAGE,
        extra=_paligemma_types,
    ),
    Family(
        "gemma3",
        _tiny(
            tf.Gemma3ForConditionalGeneration,
            tf.Gemma3Config,
            text_config=_text("gemma3_text", **GEMMA),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            **GEMMA_IDS,
        ),
        **PATCH_ROWS,
        **{**ONE_IMAGE, "image_tokens": (START_ID, *FOUR, END_ID)},
        extra=_types("token_type_ids"),
    ),
)

# Idefics and what took its layout ------------------------------------------------------------------------------------

IDEFICS: dict[str, Any] = {"text": "model.text_model.layers", "vision": "model.vision_model.encoder.layers"}

IDEFICSES = (
    Family(
        "idefics2",
        _tiny(
            tf.Idefics2ForConditionalGeneration,
            tf.Idefics2Config,
            text_config=_text("mistral"),
            vision_config=_tower("idefics2_vision"),
            perceiver_config={
                **{"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2},
                **{"resampler_head_dim": 8, "num_key_value_heads": 1},
            },
            image_token_id=IMAGE_ID,
        ),
        **{**PATCH_ROWS, **IDEFICS},
        **{**ONE_IMAGE, "image_tokens": (IMAGE_ID,) * 3},
        extra=_by_row(3),
    ),
    *(
        Family(
            name,
            _tiny(
                model,
                config,
                text_config=_text(),
                vision_config=_tower(f"{name}_vision", image_size=56),
                image_token_id=IMAGE_ID,
                scale_factor=2,
            ),
            **IDEFICS,
            vision_tokens=16,
            grid=(4, 4),
            **{**ONE_IMAGE, "media": pixels(56)},
            extra=_by_row(4),
        )
        for name, model, config in (
            ("idefics3", tf.Idefics3ForConditionalGeneration, tf.Idefics3Config),
            ("smolvlm", tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig),
        )
    ),
)

# Towers whose patches are merged by fours ----------------------------------------------------------------------------

MERGED: dict[str, Any] = {
    **{"text": TEXT, "vision": ENCODER, "vision_tokens": 16, "grid": (4, 4)},
    **ONE_IMAGE,
    "media": pixels(56),
}
SIGLIP_56 = {**SIGLIP, "image_size": 56}


class _Llama4ForConditionalGeneration(tf.Llama4ForConditionalGeneration):
    """Llama 4, whose forward asks (transformers 5.24.0) its text model's output for `image_outputs`, which it lacks."""

    def __init__(self, config: tf.Llama4Config) -> None:
        super().__init__(config)
        self.language_model.register_forward_hook(_say_no_image_outputs)


def _say_no_image_outputs(_module: object, _args: object, output: Any) -> None:
    output.image_outputs = None


MERGING = (
    *(
        Family(
            name,
            _tiny(
                model,
                config,
                text_config=_text("qwen2"),
                vision_config=_tower(f"{name}_vision", image_size=56, **drop),
                image_token_id=IMAGE_ID,
                image_seq_length=4,
            ),
            **{**MERGED, "vision": f"model.vision_tower.{vision}", "vision_tokens": 17},
            num_cls=1,
        )
        for name, model, config, vision, drop in (
            ("internvl", tf.InternVLForConditionalGeneration, tf.InternVLConfig, "encoder.layer", {}),
            (
                *("qianfan_ocr", tf.QianfanOCRForConditionalGeneration, tf.QianfanOCRConfig),
                *("layers", {"drop_path_rate": 0.0}),
            ),
        )
    ),
    Family(
        "mistral3",
        _tiny(
            tf.Mistral3ForConditionalGeneration,
            tf.Mistral3Config,
            text_config=_text("mistral"),
            vision_config=_tower("pixtral", hidden_size=32, image_size=56),
            image_token_index=IMAGE_ID,
        ),
        **{**MERGED, "vision": "model.vision_tower.transformer.layers", "media": _sized_pixels(56)},
        states="packed",
        takes_fullgraph=False,
    ),
    Family(
        "aya_vision",
        _tiny(
            tf.AyaVisionForConditionalGeneration,
            tf.AyaVisionConfig,
            text_config=_text("cohere2", sliding_window=64),
            vision_config=SIGLIP_56,
            image_token_index=IMAGE_ID,
        ),
        **MERGED,
    ),
    Family(
        "cohere2_vision",
        _tiny(
            tf.Cohere2VisionForConditionalGeneration,
            tf.Cohere2VisionConfig,
            text_config=_text("cohere2", sliding_window=64),
            vision_config=SIGLIP_56,
            image_token_id=IMAGE_ID,
            alignment_intermediate_size=64,
        ),
        **MERGED,
    ),
    Family(  # its tower's blocks are called by keyword and return tuples; its class token is the last one
        # Under reentrant checkpointing, blocks that are called by keyword get no gradient from the base alone.
        "llama4",
        _tiny(
            _Llama4ForConditionalGeneration,
            tf.Llama4Config,
            text_config=_text(
                "llama4_text",
                **{"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "interleave_moe_layer_step": 2},
            ),
            vision_config=_tower(
                "llama4_vision_model",
                **{"image_size": 56, "vision_output_dim": 24, "intermediate_size": 96},
                **{"projector_input_dim": 24, "projector_output_dim": 24},
            ),
            **GEMMA_IDS,
        ),
        text="language_model.model.layers",
        vision="vision_model.model.layers",
        vision_tokens=17,
        num_cls=1,
        cls_last=True,
        grid=(4, 4),
        skips={"reentrant": "its tower calls blocks by keyword, which reentrant checkpoints give no gradient"},
        **{**ONE_IMAGE, "media": pixels(56)},
    ),
)

# DeepSeek and Janus --------------------------------------------------------------------------------------------------

SAM = {
    **{"image_size": 32, "patch_size": 4, "output_channels": 8, "window_size": 4, "global_attn_indexes": [1]},
    **{"mlp_dim": 48, "num_pos_feats": 8},
}

DEEPSEEKS = (
    Family(
        "deepseek_vl",
        _tiny(
            tf.DeepseekVLForConditionalGeneration,
            tf.DeepseekVLConfig,
            text_config=_text(),
            vision_config=SIGLIP,
            image_token_id=IMAGE_ID,
        ),
        **{**PATCH_ROWS, "vision": "model.vision_model.encoder.layers"},
        **ONE_IMAGE,
    ),
    Family(  # `model.high_res_vision_model.vision_encoder.layers` is a second tower, which sees the picture larger
        "deepseek_vl_hybrid",
        _tiny(
            tf.DeepseekVLHybridForConditionalGeneration,
            tf.DeepseekVLHybridConfig,
            text_config=_text(),
            vision_config=SIGLIP,
            high_res_vision_config=_tower("sam_vision_model", **SAM),
            image_token_id=IMAGE_ID,
        ),
        **{**PATCH_ROWS, "vision": "model.vision_model.encoder.layers"},
        **{
            **ONE_IMAGE,
            "media": lambda pictures: {
                **pixels(28)(pictures),
                "high_res_pixel_values": pixels(32)(pictures)["pixel_values"],
            },
        },
    ),
    Family(  # `model.vqmodel` and the generation head are for pictures that it makes
        "janus",
        _tiny(
            tf.JanusForConditionalGeneration,
            tf.JanusConfig,
            text_config=_text(),
            vision_config=_tower("janus_vision_model", projection_dim=32, num_image_tokens=4, mlp_ratio=2.0),
            vq_config={
                **{"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32},
                **{"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32},
                **{"image_token_embed_dim": 32, "num_hidden_layers": 1},
            },
            image_token_id=IMAGE_ID,
        ),
        **{**PATCH_ROWS, "vision": "model.vision_model.encoder.layers"},
        **ONE_IMAGE,
    ),
    Family(
        "got_ocr2",
        _tiny(
            tf.GotOcr2ForConditionalGeneration,
            tf.GotOcr2Config,
            text_config=_text("qwen2"),
            vision_config=_tower("", **SAM),
            image_token_index=IMAGE_ID,
            image_seq_length=4,
        ),
        text=TEXT,
        vision="model.vision_tower.layers",
        vision_tokens=64,
        grid=(8, 8),
        states="spatial",
        **{**ONE_IMAGE, "media": pixels(32)},
    ),
)

# Others --------------------------------------------------------------------------------------------------------------

PERCEPTION = {
    **{"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 14, "img_size": [28, 28], "ref_feat_shape": [2, 2]},
    **{"global_pool": "", "class_token": True},
}

OTHERS = (
    Family(
        "ovis2",
        _tiny(
            tf.Ovis2ForConditionalGeneration,
            tf.Ovis2Config,
            text_config=_text("qwen2"),
            vision_config=_tower("ovis2_vision", vocab_size=24, num_visual_indicator_tokens=2),
            image_token_id=IMAGE_ID,
            visual_indicator_token_ids=[START_ID, END_ID],
            vocab_size=64,
            hidden_size=32,
        ),
        **{**PATCH_ROWS, "vision": "model.vision_tower.transformer.encoder.layers"},
        **{**ONE_IMAGE, "image_tokens": (START_ID, *FOUR, END_ID)},
        takes_fullgraph=False,
    ),
    Family(
        "perception_lm",
        _tiny(
            tf.PerceptionLMForConditionalGeneration,
            tf.PerceptionLMConfig,
            text_config=_text(),
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_tiny_patch16_384",
                "model_args": PERCEPTION,
            },
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
        ),
        **{**CLASS_ROWS, "vision": "model.vision_tower.timm_model.blocks"},
        **{**ONE_IMAGE, "media": lambda pictures: {"pixel_values": pixels(28)(pictures)["pixel_values"][:, None]}},
    ),
    Family(
        "aria",
        _tiny(
            tf.AriaForConditionalGeneration,
            tf.AriaConfig,
            text_config=_text("aria_text", moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1),
            vision_config=_tower("idefics3_vision"),
            projector_patch_to_query_dict={4: 3},
            image_token_index=IMAGE_ID,
        ),
        **PATCH_ROWS,
        **{**ONE_IMAGE, "image_tokens": (IMAGE_ID,) * 3},
    ),
)

# Granite -------------------------------------------------------------------------------------------------------------

GRANITE = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.35}


def _granite_tiles(pictures: Sequence[int]) -> dict[str, Tensor]:
    """Pictures of 56 x 112, as the whole made small and two tiles."""
    tiles = torch.stack([noise(picture, 3, 3, 56, 56) for picture in pictures])
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[56, 112]] * len(pictures))}


def _by_row_masked(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `_by_row`, and say which pictures are true ones."""
    made = _by_row(4)(batch)
    return {**made, "pixel_attention_mask": (made["pixel_values"] != 0).flatten(2).any(2)} if made else made


GRANITES = (
    Family(  # features are added to its text states again behind blocks
        "granite4_vision",
        _tiny(
            tf.Granite4VisionForConditionalGeneration,
            tf.Granite4VisionConfig,
            text_config=_text("granite4_vision_text", **GRANITE),
            vision_config=_tower("siglip_vision_model", vision_use_head=False, hidden_size=64, image_size=56),
            qformer_config={
                **{"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32},
                **{"cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False},
                **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 8},
            },
            image_token_index=IMAGE_ID,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[56, 112], [112, 56]],
            downsample_rate="1/2",
            deepstack_layer_map=[[1, 0], [-1, 1]],
            spatial_target_layers=[0, 1, 2, 2],
            projector_dropout=0.0,
        ),
        text=TEXT,
        vision=ENCODER,
        vision_tokens=16,
        grid=(4, 4),
        **{**FOURTEEN, "media": _granite_tiles},
        takes_fullgraph=False,
    ),
    Family(  # features are added to its text states again behind blocks
        "granite_docling",
        _tiny(
            tf.GraniteDoclingForConditionalGeneration,
            tf.GraniteDoclingConfig,
            text_config=_text("granite_docling_text", **GRANITE),
            vision_config=_tower(
                "granite_docling_vision",
                **{"image_size": 56, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]},
                use_fine_route=False,
            ),
            image_token_id=IMAGE_ID,
            pad_token_id=PAD,
        ),
        **{**MERGED, **IDEFICS},
        extra=_by_row_masked,
    ),
)

# BLIP-2 --------------------------------------------------------------------------------------------------------------

OPT = {
    **{"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.0},
    **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None},
}
QFORMER = {
    **{"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
BLIP: dict[str, Any] = {
    **{**CLASS_ROWS, "text": "language_model.model.decoder.layers", "vision": "vision_model.encoder.layers"},
    **ONE_IMAGE,
}
BLIP_SKIPS = {"no images": "forward and generate ask for pixel_values"}
ONE_EACH = (SAMPLES[0], Sample((6, 17, IMAGE, 18, 9), (22, 23, 24)), Sample((7, IMAGE, 10, 19, 25, 26), (27,)))


def _instruction(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Q-Former reads the prompt too, in a row of its own."""
    is_text = (batch["attention_mask"] == 1) & (batch["input_ids"] < IMAGE_ID)
    if "labels" in batch:
        is_text &= batch["labels"] == -100
    rows = [ids[chosen] for ids, chosen in zip(batch["input_ids"], is_text, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {"qformer_input_ids": ids, "qformer_attention_mask": (ids != PAD).long()}


def _films(pictures: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([noise(picture, 2, 3, 28, 28) for picture in pictures])}


BLIPS = (
    Family(
        "blip2",
        _tiny(
            tf.Blip2ForConditionalGeneration,
            tf.Blip2Config,
            text_config=OPT,
            vision_config=_tower("blip_2_vision_model"),
            qformer_config=QFORMER,
            num_query_tokens=4,
            image_text_hidden_size=8,
            image_token_index=IMAGE_ID,
        ),
        **BLIP,
        samples=WITH_IMAGES,
        skips=BLIP_SKIPS,
    ),
    Family(
        "instructblip",
        _tiny(
            tf.InstructBlipForConditionalGeneration,
            tf.InstructBlipConfig,
            text_config=OPT,
            vision_config=_tower("instructblip_vision_model"),
            qformer_config=QFORMER,
            num_query_tokens=4,
            image_token_index=IMAGE_ID,
        ),
        **BLIP,
        extra=_instruction,
        samples=ONE_EACH,
        skips=BLIP_SKIPS,
    ),
    Family(  # a picture is a film of two frames
        "instructblipvideo",
        _tiny(
            tf.InstructBlipVideoForConditionalGeneration,
            tf.InstructBlipVideoConfig,
            text_config=OPT,
            vision_config=_tower("instructblipvideo_vision_model"),
            qformer_config=QFORMER,
            num_query_tokens=2,
            video_token_index=VIDEO_ID,
        ),
        **{**BLIP, "media": _films, "image_tokens": (VIDEO_ID,) * 4, "image_id": VIDEO_ID},
        states="tiles",
        extra=_instruction,
        samples=ONE_EACH,
        skips=BLIP_SKIPS,
    ),
)

# Pictures that come as patches ---------------------------------------------------------------------------------------

GEMMA4_GRID = torch.tensor([[x, y] for y in range(4) for x in range(4)])


def _patches(picture: int) -> Tensor:
    """A picture of 4 x 4 patches of 4 x 4 pixels."""
    return noise(picture, 16, 3 * 4 * 4)


def _gemma4_patches(pictures: Sequence[int]) -> dict[str, Tensor]:
    patches = torch.stack([_patches(picture).sigmoid() for picture in pictures])
    return {"pixel_values": patches, "image_position_ids": GEMMA4_GRID.expand(len(pictures), -1, -1)}


def _siglip2_patches(pictures: Sequence[int]) -> dict[str, Tensor]:
    patches = torch.stack([_patches(picture) for picture in pictures])
    sizes = torch.tensor([[4, 4]] * len(pictures))
    return {"pixel_values": patches, "spatial_shapes": sizes, "pixel_attention_mask": torch.ones(patches.shape[:2])}


def _molmo_crops(pictures: Sequence[int]) -> dict[str, Tensor]:
    """One crop a picture; each of its four tokens is pooled from a square of four patches."""
    squares = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": torch.stack([_patches(picture) for picture in pictures]),
        "image_token_pooling": torch.cat([squares + 16 * i for i in range(len(pictures))]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * len(pictures)),
        "image_num_crops": torch.ones(len(pictures), dtype=torch.long),
    }


def _minicpm_strip(pictures: Sequence[int]) -> dict[str, Tensor]:
    """All patches of all pictures side by side; a picture has 8 x 8 of them."""
    strip = torch.cat([noise(picture, 3, 4, 64 * 4) for picture in pictures], dim=-1)
    return {"pixel_values": strip[None], "target_sizes": torch.tensor([[8, 8]] * len(pictures))}


PATCHED = (
    Family(
        "gemma4",
        _tiny(
            tf.Gemma4ForConditionalGeneration,
            tf.Gemma4Config,
            text_config=_text(
                "gemma4_text",
                **GEMMA,
                global_head_dim=8,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=64,
                layer_types=["sliding_attention", "full_attention", "full_attention"],
            ),
            vision_config={
                **_tower("gemma4_vision", patch_size=4, num_key_value_heads=2, head_dim=12),
                **{"pooling_kernel_size": 2, "position_embedding_size": 8},
            },
            audio_config=None,
            image_token_id=IMAGE_ID,
            boi_token_id=START_ID,
            eoi_token_id=END_ID,
            video_token_id=VIDEO_ID,
        ),
        text=TEXT,
        vision=ENCODER,
        vision_tokens=16,
        grid=(4, 4),
        **{**ONE_IMAGE, "media": _gemma4_patches, "image_tokens": (START_ID, *FOUR, END_ID)},
        extra=_types("mm_token_type_ids"),
    ),
    Family(
        "lfm2_vl",
        _tiny(
            tf.Lfm2VlForConditionalGeneration,
            tf.Lfm2VlConfig,
            text_config=_text("lfm2", layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
            vision_config={
                **_tower("siglip2_vision_model", vision_use_head=False, patch_size=4),
                "num_patches": 16,
            },
            image_token_id=IMAGE_ID,
            projector_hidden_size=32,
        ),
        text=TEXT,
        vision=ENCODER,
        vision_tokens=16,
        grid=(4, 4),
        **{**ONE_IMAGE, "media": _siglip2_patches},
    ),
    Family(  # adds the features to the image tokens' own embeddings; all image tokens of a row see each other
        "molmo2",
        _tiny(
            tf.Molmo2ForConditionalGeneration,
            tf.Molmo2Config,
            text_config={**_text("molmo2_text", head_dim=8), "additional_vocab_size": 8},
            vision_config={
                **_tower("molmo2_vision", image_size=[16, 16], patch_size=4, num_key_value_heads=2, head_dim=12),
            },
            adapter_config={
                **{"vision_feature_layer": [2, 0], "hidden_size": 24, "num_attention_heads": 2, "head_dim": 12},
                **{"num_key_value_heads": 2, "intermediate_size": 48, "text_hidden_size": 32},
            },
            image_patch_id=IMAGE_ID,
            image_start_token_id=START_ID,
            image_end_token_id=END_ID,
        ),
        text=TEXT,
        vision="model.vision_tower.layers",
        vision_tokens=16,
        **{**ONE_IMAGE, "media": _molmo_crops, "image_tokens": (START_ID, *FOUR, END_ID)},
        extra=_types("mm_token_type_ids"),
    ),
    Family(  # its tower merges patches by fours behind block 1
        "minicpmv4_6",
        _tiny(
            tf.MiniCPMV4_6ForConditionalGeneration,
            tf.MiniCPMV4_6Config,
            text_config=_text(
                "qwen3_5_text",
                head_dim=8,
                layer_types=["linear_attention", "full_attention", "linear_attention"],
                **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
                **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4},
            ),
            vision_config=_tower("minicpmv4_6_vision", image_size=32, patch_size=4),
            insert_layer_id=1,
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
        ),
        text=TEXT,
        vision=ENCODER,
        vision_tokens=64,
        grid=(8, 8),
        states="packed",
        **{**ONE_IMAGE, "media": _minicpm_strip},
        takes_fullgraph=False,
    ),
    Family(
        "step3p7",
        _tiny(
            tf.Step3p7ForConditionalGeneration,
            tf.Step3p7Config,
            text_config=_text(
                "step3p7_text",
                **{"head_dim": 8, "num_experts_per_tok": 1, "num_local_experts": 2, "n_routed_experts": 2},
                **{"moe_intermediate_size": 16, "share_expert_dim": 16, "sliding_window": 64},
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                mlp_layer_types=["dense", "sparse", "sparse"],
            ),
            vision_config=_tower("step3p7_vision", image_size=32, patch_size=4, mlp_ratio=1.5),
            image_token_id=IMAGE_ID,
        ),
        text=TEXT,
        vision="model.vision_model.layers",
        vision_tokens=64,
        grid=(8, 8),
        **{**ONE_IMAGE, "media": pixels(32)},
        takes_fullgraph=False,
    ),
)

# No transformer for a tower ------------------------------------------------------------------------------------------

CONVOLUTIONS = (
    Family(
        "fast_vlm",
        _tiny(
            tf.FastVlmForConditionalGeneration,
            tf.FastVlmConfig,
            text_config=_text("qwen2"),
            vision_config={
                **{"model_type": "timm_wrapper", "architecture": "fastvit_t8", "hidden_size": 32},
                "model_args": {
                    **{"layers": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "inference_mode": True},
                    **{"layer_scale_init_value": 0.1},
                },
            },
            image_token_index=IMAGE_ID,
        ),
        text=TEXT,
        **{**ONE_IMAGE, "media": pixels(64)},
        skips={"train": "batch norms in the tower: train() changes the features and moves the running statistics"},
    ),
    Family(  # its text states are four streams (4, B, T, D)
        "gemma3n",
        _tiny(
            tf.Gemma3nForConditionalGeneration,
            tf.Gemma3nConfig,
            text_config=_text(
                "gemma3n_text",
                **{**GEMMA, "vocab_size": 74, "vocab_size_per_layer_input": 58, "hidden_size_per_layer_input": 8},
                **{"laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0, 0.0]},
                layer_types=["sliding_attention", "full_attention", "full_attention"],
            ),
            vision_config={
                **{"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"},
                **{
                    "vocab_offset": 58,
                    "vocab_size": 8,
                    "model_args": {"channel_multiplier": 0.0625, "msfa_output_resolution": 2},
                },
            },
            audio_config={
                **{"vocab_offset": 66, "vocab_size": 8, "hidden_size": 16, "conf_num_attention_heads": 2},
                **{"conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 4], "input_feat_size": 16},
            },
            vision_soft_tokens_per_image=4,
            **{"image_token_id": IMAGE_ID, "boi_token_id": 62, "eoi_token_id": 63},
            **{"boa_token_id": 66, "eoa_token_id": 67, "audio_token_id": 68},
        ),
        text=TEXT,
        refused={"text": "several residual streams", "connector": "several residual streams"},
        **{**ONE_IMAGE, "media": pixels(64)},
    ),
)

# Encoder-decoders ----------------------------------------------------------------------------------------------------


def _writer(
    image_tokens: Sequence[int], media: Callable[[Sequence[int]], dict[str, Tensor]]
) -> Callable[[Sequence[Sample], str, bool, int], dict[str, Tensor]]:
    """Return what writes the prompts for the encoder and the answers, as labels, for the decoder."""

    def rows(values: Sequence[Sequence[int]], fill: int, side: str, more: int) -> Tensor:
        width = max(map(len, values)) + more
        fills = [[fill] * (width - len(row)) for row in values]
        pairs = zip(values, fills, strict=True)
        return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for row, f in pairs])

    def write(samples: Sequence[Sample], side: str, answer: bool, more_pads: int) -> dict[str, Tensor]:
        prompts = [[i for t in s.prompt for i in (image_tokens if t == IMAGE else (t,))] for s in samples]
        places = [(31 * s.prompt[0] + place) for s in samples for place, t in enumerate(s.prompt) if t == IMAGE]
        made = {"input_ids": rows(prompts, PAD, side, more_pads)}
        made["attention_mask"] = rows([[1] * len(row) for row in prompts], 0, side, more_pads)
        if answer:
            made["labels"] = rows([s.answer for s in samples], -100, "right", 0)
        return made | (media(places) if places else {})

    return write


FIVE = (IMAGE_ID,) * 5  # a florence's picture: the mean of its four patches, then they

ENCODER_DECODERS = (
    Family(  # the tower is made of windows of a convolutional map, (B, C, H, W)
        "florence2",
        _tiny(
            tf.Florence2ForConditionalGeneration,
            tf.Florence2Config,
            text_config={
                **{"model_type": "bart", "vocab_size": 64, "d_model": 32, "max_position_embeddings": 256},
                **{"encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
                **{"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0},
                **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None},
                "decoder_start_token_id": 2,
            },
            vision_config={
                **{"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]},
                **{"patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2]},
                **{"window_size": 4, "drop_path_rate": 0.0, "projection_dim": 32},
            },
            image_token_id=IMAGE_ID,
            **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2},
        ),
        text="model.language_model.decoder.layers",
        text_encoder="model.language_model.encoder.layers",
        media=pixels(16),
        image_tokens=FIVE,
        image_id=IMAGE_ID,
        write=_writer(FIVE, pixels(16)),
        skips={"left padding": "the encoder's learned positions count the pads: logits of padded rows differ by 1"},
    ),
    Family(
        "t5gemma2",
        _tiny(
            tf.T5Gemma2ForConditionalGeneration,
            tf.T5Gemma2Config,
            encoder={
                "text_config": _text("t5gemma2_text", **GEMMA),
                "vision_config": SIGLIP,
                "mm_tokens_per_image": 4,
                **GEMMA_IDS,
            },
            decoder=_text("t5gemma2_decoder", **GEMMA),
            image_token_index=IMAGE_ID,
        ),
        **{**PATCH_ROWS, "text": "model.decoder.layers", "vision": "model.encoder.vision_tower.encoder.layers"},
        text_encoder="model.encoder.text_model.layers",
        **{**ONE_IMAGE, "image_tokens": (START_ID, *FOUR, END_ID)},
        write=_writer((START_ID, *FOUR, END_ID), pixels(28)),
    ),
)

ROWS: tuple[Family, ...] = (
    *(*LLAVAS, *GEMMAS, *IDEFICSES, *MERGING, *DEEPSEEKS, *OTHERS),
    *(*GRANITES, *BLIPS, *PATCHED, *CONVOLUTIONS, *ENCODER_DECODERS),
)
