"""Families whose vision tower runs all pictures of a batch as one packed row.

One picture is 4 x 6 patches, oblong so that rows and columns cannot be taken for each other, merged by 2 x 2 windows to
6 tokens. Three orders of a picture's patches are met in the blocks:

- grouped: the four patches of a merge window stand together, windows in raster order, as the Qwen image processor
  writes them; the tower leaves that as it is. Patch 2 of the row is the first of the picture's second line.
- regrouped: grouped, and the tower sorts the merge windows once more by attention window before its blocks, and back
  behind them (Qwen2.5-VL's `window_index`). Here 4 x 4 patches and the 4 x 2 that are left are such windows.
- raster: line by line; merging is done behind the blocks.

The tests write noise as patches, so the order is what a tower takes them for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from family import Family, llama_sizes, loud, noise
from torch import Tensor
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmgaConfig,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseSparkConfig,
    MuseSparkForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

GRID = (4, 6)  # rows and columns of patches of a picture
NUM_PATCHES = 24
IMAGE_ID, VIDEO_ID, START_ID, END_ID = 60, 61, 62, 63
WRAPPED = (START_ID, *(IMAGE_ID,) * 6, END_ID)

IMAGE_IDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
QWEN_IDS = {**IMAGE_IDS, "vision_start_token_id": START_ID, "vision_end_token_id": END_ID}
GLM_IDS = {
    **{**IMAGE_IDS, "image_start_token_id": START_ID, "image_end_token_id": END_ID},
    **{"video_start_token_id": 58, "video_end_token_id": 59},
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _depth_sizes(**more: Any) -> dict[str, Any]:
    """Towers with `depth`, `num_heads` and patches of 8 x 8 pixels."""
    sizes = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    return {**sizes, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def _layer_sizes(**more: Any) -> dict[str, Any]:
    """Towers with `num_hidden_layers`, `num_attention_heads` and patches of 8 x 8 pixels."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {**sizes, "patch_size": 8, **more}


def _make(
    model: Callable[[Any], PreTrainedModel],
    config: Callable[..., PreTrainedConfig],
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    **more: Any,
) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(7)  # Qwen3.5's decays and HunYuan's marks start at random and `loud` only adds to them
            made = model(config(text_config=dict(text), vision_config=dict(vision), **more))
        made.set_experts_implementation("eager")  # the usual one, a grouped product, has no float64
        return loud(made.requires_grad_(True))  # Ernie freezes a correction of its routers

    return build


def _patches(*shape: int, **per_picture: int) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Pictures as packed patches of a shape, their grid, and what else there is a number of for each picture."""

    def media(pictures: Sequence[int]) -> dict[str, Tensor]:
        made = {
            "pixel_values": torch.cat([noise(picture, NUM_PATCHES, *shape) for picture in pictures]),
            "image_grid_thw": torch.tensor([[1, *GRID]] * len(pictures)),
        }
        return made | {name: torch.tensor([value] * len(pictures)) for name, value in per_picture.items()}

    return media


def _token_types(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (batch["input_ids"] == IMAGE_ID).long()}


def _ernie_token_types(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ernie's experts for pictures also take what wraps the picture.

    They are told so in training only: `generate` without a cache does not lengthen this mask with the prompt.
    """
    if "labels" not in batch:
        return _token_types(batch)
    is_media_BT = torch.isin(batch["input_ids"], torch.tensor([IMAGE_ID, START_ID, END_ID]))
    return {**_token_types(batch), "moe_mm_token_type_ids": is_media_BT.long()}


def _sized_pictures(pictures: Sequence[int]) -> dict[str, Tensor]:
    """Pictures of 32 x 48 pixels with their sizes said; the tower cuts them itself."""
    sizes = torch.tensor([[32, 48]] * len(pictures))
    return {"pixel_values": torch.stack([noise(picture, 3, 32, 48) for picture in pictures]), "image_sizes": sizes}


def _strip(pictures: Sequence[int]) -> dict[str, Tensor]:
    """All patches of all pictures side by side, and the grid of each picture."""
    strip = torch.cat([noise(picture, 3, 8, NUM_PATCHES * 8) for picture in pictures], -1)
    return {"pixel_values": strip[None], "target_sizes": torch.tensor([GRID] * len(pictures))}


def _packed(name: str, build: Callable[[], PreTrainedModel], **more: Any) -> Family:
    usual: dict[str, Any] = {
        **{"text": "model.language_model.layers", "vision": "model.visual.blocks"},
        **{"media": _patches(2 * 3 * 8 * 8), "image_tokens": WRAPPED, "image_id": IMAGE_ID},
        **{"vision_tokens": NUM_PATCHES, "grid": GRID, "states": "packed", "takes_fullgraph": False},
    }
    return Family(name, build, **{**usual, **more})


QWEN3_TEXT = llama_sizes(head_dim=8, rope_parameters=MROPE)
QWEN35_TEXT = llama_sizes(
    **{"head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
)
GLM_TEXT = llama_sizes(rope_parameters={**MROPE, "partial_rotary_factor": 1.0})
SQUARED = {"num_position_embeddings": 16}  # of a learned 4 x 4 grid, resampled to a picture's own

# Grouped -----------------------------------------------------------------------------------------------------------

QWEN_ROWS = (
    _packed(
        "qwen2_vl",
        _make(
            *(Qwen2VLForConditionalGeneration, Qwen2VLConfig, llama_sizes(rope_parameters=MROPE)),
            {**_depth_sizes(embed_dim=24), "mlp_ratio": 2},  # `hidden_size` is what the merger makes
            **QWEN_IDS,
        ),
        extra=_token_types,
    ),
    # DeepStack: features of tower block 0 are added to image positions behind text block 0, of tower block 1 behind 1.
    _packed(
        "qwen3_vl",
        _make(
            *(Qwen3VLForConditionalGeneration, Qwen3VLConfig, QWEN3_TEXT),
            _depth_sizes(**SQUARED, deepstack_visual_indexes=[0, 1]),
            **QWEN_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "qwen3_vl_moe",
        _make(
            *(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, {**QWEN3_TEXT, **EXPERTS}),
            _depth_sizes(**SQUARED, deepstack_visual_indexes=[0, 1]),
            **QWEN_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "cosmos3_omni",
        _make(
            *(Cosmos3OmniForConditionalGeneration, Cosmos3OmniConfig, {**QWEN3_TEXT, "model_type": "qwen3_vl_text"}),
            {**_depth_sizes(**SQUARED, deepstack_visual_indexes=[0, 1]), "model_type": "qwen3_vl_vision"},
            **QWEN_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "qwen3_5",
        _make(Qwen3_5ForConditionalGeneration, Qwen3_5Config, QWEN35_TEXT, _depth_sizes(**SQUARED), **QWEN_IDS),
        extra=_token_types,
    ),
    _packed(
        "qwen3_5_moe",
        _make(
            *(Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig),
            {**QWEN35_TEXT, **EXPERTS, "shared_expert_intermediate_size": 16},
            _depth_sizes(**SQUARED),
            **QWEN_IDS,
        ),
        extra=_token_types,
    ),
)

GLM_ROWS = (
    _packed(
        "glm4v",
        _make(Glm4vForConditionalGeneration, Glm4vConfig, GLM_TEXT, _depth_sizes(image_size=32), **GLM_IDS),
        extra=_token_types,
    ),
    _packed(
        "glm4v_moe",
        _make(
            *(Glm4vMoeForConditionalGeneration, Glm4vMoeConfig, {**GLM_TEXT, **ROUTED}),
            _depth_sizes(image_size=32),
            **GLM_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "glm46v",
        _make(
            *(Glm46VForConditionalGeneration, Glm46VConfig, {**GLM_TEXT, "model_type": "glm4v_text"}),
            {**_depth_sizes(image_size=32), "model_type": "glm4v_vision"},
            **GLM_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "glmga",
        _make(
            *(Glm46VForConditionalGeneration, GlmgaConfig, {**GLM_TEXT, "model_type": "glm4v_text"}),
            {**_depth_sizes(image_size=32), "model_type": "glm4v_vision"},
            **GLM_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "glm_ocr",
        _make(
            *(GlmOcrForConditionalGeneration, GlmOcrConfig, {**GLM_TEXT, "head_dim": 8}),
            _depth_sizes(image_size=32),
            **GLM_IDS,
        ),
        extra=_token_types,
    ),
)

OTHER_GROUPED_ROWS = (
    _packed(
        "ernie4_5_vl_moe",
        _make(
            *(Ernie4_5_VLMoeForConditionalGeneration, Ernie4_5_VLMoeConfig),
            llama_sizes(
                **{"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [16, 16]},
                rope_parameters=MROPE,
            ),
            {**_depth_sizes(temporal_merge_size=2)},
            **GLM_IDS,
        ),
        vision="model.vision_tower.blocks",
        media=_patches(3 * 8 * 8),
        extra=_ernie_token_types,
    ),
    # DeepStack as in Qwen3-VL.
    _packed(
        "cohere_compass",
        _make(
            *(CohereCompassForConditionalGeneration, CohereCompassConfig),
            llama_sizes(rope_parameters={"full_attention": MROPE}, logit_scale=1.0),
            _depth_sizes(**SQUARED, deepstack_visual_indexes=[0, 1]),
            **QWEN_IDS,
        ),
        extra=_token_types,
    ),
    _packed(
        "cosmos3_edge",
        _make(
            *(Cosmos3EdgeForConditionalGeneration, Cosmos3EdgeConfig),
            llama_sizes(head_dim=8, rope_parameters=MROPE),
            _layer_sizes(num_patches=16, spatial_merge_size=2),
            **QWEN_IDS,
            projector_hidden_size=48,
        ),
        vision="model.visual.encoder.layers",
        media=_patches(3 * 8 * 8),
        extra=_token_types,
    ),
    _packed(
        "minimax_m3_vl",
        _make(
            *(MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig),
            llama_sizes(
                **{"head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
                **{"dense_intermediate_size": 48, "shared_intermediate_size": 16},
                **{"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 4},
                layer_types=["full_attention", "minimax_m3_sparse", "full_attention"],
                mlp_layer_types=["dense", "sparse", "sparse"],
            ),
            {**_layer_sizes(image_size=32), "hidden_size": 48},
            **{"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID, "projector_hidden_size": 48},
        ),
        vision="model.vision_tower.layers",
        skips={"left padding": "its sparse attention picks blocks of the row, cut with the pads counted"},
    ),
    # Some tower blocks are convolutions over the picture's grid; they sort the patches for that and back.
    _packed(
        "lfm3_vl",
        _make(
            *(Lfm3VlForConditionalGeneration, Lfm3VlConfig),
            llama_sizes(model_type="lfm3", layer_types=["conv", "full_attention", "conv"]),
            _layer_sizes(num_key_value_heads=1, layer_types=["conv", "full_attention", "conv"]),
            **QWEN_IDS,
            projector_hidden_size=48,
        ),
        vision="model.vision_tower.layers",
    ),
    # The merging is a bilinear shrinking of the states behind the blocks.
    _packed(
        "video_llama_3",
        _make(
            *(VideoLlama3ForConditionalGeneration, VideoLlama3Config, llama_sizes(model_type="qwen2")),
            _layer_sizes(),
            **IMAGE_IDS,
        ),
        vision="model.vision_model.encoder.layers",
        media=_patches(3 * 8 * 8, image_merge_sizes=2),
    ),
)

# Regrouped ---------------------------------------------------------------------------------------------------------

WINDOWS = {"window_size": 32, "fullatt_block_indexes": [1]}

REGROUPED_ROWS = (
    _packed(
        "exaone4_5",
        _make(
            *(Exaone4_5_ForConditionalGeneration, Exaone4_5_Config),
            llama_sizes(
                model_type="exaone4", sliding_window=64, layer_types=["sliding_attention", *["full_attention"] * 2]
            ),
            _depth_sizes(**WINDOWS, num_key_value_heads=1),
            **IMAGE_IDS,
        ),
    ),
    _packed(
        "hyperclovax_vision_v2",
        _make(
            *(HyperCLOVAXVisionV2ForConditionalGeneration, HyperCLOVAXVisionV2Config),
            llama_sizes(model_type="hyperclovax"),
            {**_depth_sizes(**WINDOWS), "model_type": "qwen2_5_vl_vision"},
            **IMAGE_IDS,
        ),
        vision="model.vision_model.blocks",
    ),
    # Raster from the image processor, then sorted by attention window, here of 4 x 4 patches: no merge windows in it.
    _packed(
        "muse_glimmer",
        _make(
            *(MuseGlimmerForConditionalGeneration, MuseGlimmerConfig),
            llama_sizes(head_dim=8, sliding_window=64),
            _layer_sizes(
                **{"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
                layer_types=["window_attention", "full_attention", "window_attention"],
            ),
            **IMAGE_IDS,
            **{"out_hidden_size": 128, "projector_hidden_size": 32},
        ),
        grid=None,
        vision="model.vision_tower.layers",
    ),
    # The same tower.
    _packed(
        "muse_spark",
        _make(
            *(MuseSparkForConditionalGeneration, MuseSparkConfig),
            llama_sizes(
                **{"head_dim": 8, "sliding_window": 64, "moe_intermediate_size": 16, "moe_hidden_size": 16},
                **{"num_local_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]},
            ),
            _layer_sizes(
                **{"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
                layer_types=["window_attention", "full_attention", "window_attention"],
            ),
            audio_config={
                **{"patch_sizes": (4, 2, 2, 2), "hidden_sizes": (8,) * 4, "depths": (1,) * 4},
                "out_hidden_size": 32,
            },
            **IMAGE_IDS,
            **{"audio_token_id": 59, "out_hidden_size": 128, "projector_hidden_size": 32},
        ),
        grid=None,
        vision="model.vision_tower.layers",
    ),
)

# Raster ------------------------------------------------------------------------------------------------------------

RASTER_ROWS = (
    _packed(
        "paddleocr_vl",
        _make(
            *(PaddleOCRVLForConditionalGeneration, PaddleOCRVLConfig),
            llama_sizes(head_dim=8, rope_parameters=MROPE),
            _layer_sizes(image_size=32),
            **QWEN_IDS,
        ),
        vision="model.visual.vision_model.encoder.layers",
        media=_patches(3, 8, 8),
        extra=_token_types,
    ),
    # Also a newline token behind each row of merged patches, and a token on either side: 2 * (3 + 1) + 2.
    _packed(
        "hunyuan_vl",
        _make(
            *(HunYuanVLForConditionalGeneration, HunYuanVLConfig),
            llama_sizes(head_dim=8, rope_parameters=MROPE, eod_token_id=None),
            _layer_sizes(max_image_size=32, min_image_size=16),
            **{"image_token_id": IMAGE_ID, "im_start_id": START_ID, "im_end_id": END_ID, "im_newline_id": 59},
        ),
        vision="model.vision_tower.layers",
        media=_patches(3 * 8 * 8),
        image_tokens=(START_ID, *(IMAGE_ID,) * 10, END_ID),
        extra=_token_types,
        skips={
            "batching": "pictures are counted through the batch, not the row, and the count is an axis of positions"
        },
    ),
    _packed(
        "kimi_k25",
        _make(
            *(Kimi_K25ForConditionalGeneration, Kimi_K25Config),
            llama_sizes(
                **{"model_type": "deepseek_v3", **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
                **{
                    "kv_lora_rank": 16,
                    "q_lora_rank": 16,
                    "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8,
                    "v_head_dim": 8,
                },
                num_key_value_heads=4,
            ),
            _layer_sizes(pos_emb_height=4, pos_emb_width=4),
            **QWEN_IDS,
            projection_hidden_size=32,
        ),
        vision="model.vision_tower.layers",
        media=_patches(3, 8, 8),
    ),
    # At the finer of its two rates, which leaves out the merger between its tower's blocks; so does the next.
    _packed(
        "minicpm_ocr",
        _make(
            *(MiniCPMOcrForConditionalGeneration, MiniCPMOcrConfig),
            {**QWEN35_TEXT, "model_type": "qwen3_5_text"},
            _layer_sizes(image_size=32),
            **IMAGE_IDS,
            **{"insert_layer_id": 1, "downsample_mode": "4x"},
        ),
        vision="model.vision_tower.encoder.layers",
        media=_strip,
    ),
    _packed(
        "minicpmv4_7",
        _make(
            *(MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Config),
            {**QWEN35_TEXT, "model_type": "qwen3_5_text"},
            _layer_sizes(image_size=32),
            **IMAGE_IDS,
            **{"image_start_id": START_ID, "image_end_id": END_ID, "slice_start_id": 58, "slice_end_id": 59},
            **{"newline_id": 57, "insert_layer_id": 1, "downsample_mode": "4x"},
        ),
        vision="model.vision_tower.encoder.layers",
        media=_strip,
        extra=_token_types,
    ),
    _packed(
        "lighton_ocr",
        _make(
            *(LightOnOcrForConditionalGeneration, LightOnOcrConfig),
            llama_sizes(model_type="qwen3", head_dim=8),
            _layer_sizes(model_type="pixtral", image_size=64, head_dim=16),
            image_token_id=IMAGE_ID,
        ),
        vision="model.vision_encoder.transformer.layers",
        media=_sized_pictures,
    ),
)

ROWS: tuple[Family, ...] = (*QWEN_ROWS, *GLM_ROWS, *OTHER_GROUPED_ROWS, *REGROUPED_ROWS, *RASTER_ROWS)
