"""The families that structure alone does not tell enough about: one row each, with its reason.

A row is found by the `model_type` of a model's config or of one of its parts. What a family without a row gets is what
`vlreft.models.sites` finds; where that is not enough, the model is refused, never guessed at.
"""

from dataclasses import dataclass, fields, replace

from transformers import PreTrainedConfig

from vlreft.models.stacks import sub_configs


@dataclass(frozen=True)
class Quirk:
    """What is special about a family.

    why: the reason, a part of error messages. refuses: sites that cannot be edited. marks_only: its image token marks a
    place, no image features stand there. image_mask: the argument of the model that marks image tokens. pools: the text
    position of a dual encoder's embedding: "first", "last", "end" (the first end token) or "largest" (the largest id).
    patch_order: how a packing tower orders the patches of a picture: "raster", "grouped" (by merge window) or "windows"
    (merge windows sorted by attention window). mixed_tokens: the tower's rows hold more than the tokens of one picture.
    cls_last: its class token comes behind the patches. labels_in_place: label t of its decoder is the token t itself.
    num_dropped: how many ids at the end of the prompt its `generate` leaves out, if it has no encoder of words.
    tokens_are_patches: its image tokens are the patches of the tower, one each, in raster order.
    writes_prompt: its `generate` begins the decoder's tokens itself, unless they are given.
    """

    why: str
    refuses: tuple[str, ...] = ()
    marks_only: bool = False
    image_mask: str = ""
    pools: str = ""
    patch_order: str = ""
    mixed_tokens: bool = False
    cls_last: bool = False
    labels_in_place: bool = False
    num_dropped: int = 0
    tokens_are_patches: bool = False
    writes_prompt: bool = False


_SEVERAL_STREAMS = "its blocks hand on several residual streams (4-D states), which one edit cannot stand for"
_MERGED = "patches come grouped by merge window, as its image processor writes them"
_WINDOWS = f"{_MERGED}, and are sorted by attention window before the blocks"
_RASTER = "patches come line by line"
_BEHIND = "patches of the picture stand behind the words in the same blocks, and no argument says how many"

QUIRKS: dict[str, Quirk] = {
    "gemma3n_text": Quirk(_SEVERAL_STREAMS, refuses=("text", "connector")),
    "deepseek_v4": Quirk(_SEVERAL_STREAMS, refuses=("text",)),
    "hy_v4": Quirk(_SEVERAL_STREAMS, refuses=("text",)),
    "udop": Quirk(_BEHIND, refuses=("text_encoder",)),
    "xlnet": Quirk("its states are (tokens, batch, width), of two streams", refuses=("text",)),
    "reformer": Quirk("its blocks are reversible and carry two streams", refuses=("text",)),
    "xclip_text_model": Quirk("what reads its words is not told from its prompt generator", refuses=("text",)),
    "pop2piano": Quirk("its encoder reads sound", refuses=("text_encoder",)),
    "whisper": Quirk("its `generate` writes the decoder's prompt", writes_prompt=True),
    "vilt": Quirk(_BEHIND, refuses=("text",)),
    "git": Quirk("the picture's tokens stand before the words, without ids of their own", refuses=("text",)),
    "mllama": Quirk(
        "its image features come in by cross-attention, and its tower runs tiles, class tokens and pads in one row",
        marks_only=True,
        mixed_tokens=True,
    ),
    "idefics": Quirk("its image features come in by cross-attention", marks_only=True),
    "blip": Quirk(
        "its decoder is given the labels as they are, and shifts them in the loss; its `generate` drops the last id",
        labels_in_place=True,
        num_dropped=1,
    ),
    "kosmos-2": Quirk("its image tokens are marked by an argument", image_mask="image_embeds_position_mask"),
    "kosmos-2.5": Quirk("its image tokens are marked by an argument", image_mask="image_embeds_position_mask"),
    "llama4_vision_model": Quirk("its class token comes behind the patches", cls_last=True),
    "clip_text_model": Quirk("read in transformers' CLIP, at 5.24", pools="end"),
    "clipseg_text_model": Quirk("it pools as CLIP does", pools="end"),
    "metaclip_2_text_model": Quirk("it pools as CLIP does", pools="end"),
    "groupvit_text_model": Quirk("it pools as CLIP does", pools="end"),
    "owlvit_text_model": Quirk("the largest id is the end token's", pools="largest"),
    "owlv2_text_model": Quirk("the largest id is the end token's", pools="largest"),
    "siglip_text_model": Quirk("it pools the last position, which may be a pad", pools="last"),
    "siglip2_text_model": Quirk("it pools the last position, which may be a pad", pools="last"),
    "altclip_text_model": Quirk("it pools as BERT does", pools="first"),
    "chinese_clip_text_model": Quirk("it pools as BERT does", pools="first"),
    "blip_text_model": Quirk("it pools as BERT does", pools="first"),
    **{
        name: Quirk(_MERGED, patch_order="grouped")
        for name in (
            *("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v"),
            *("glmga", "glm_ocr", "ernie4_5_vl_moe", "cohere_compass", "cosmos3_omni", "cosmos3_edge"),
            *("minimax_m3_vl", "lfm3_vl", "video_llama_3"),
        )
    },
    **{name: Quirk(_WINDOWS, patch_order="windows") for name in ("qwen2_5_vl", "exaone4_5", "hyperclovax_vision_v2")},
    **{
        name: Quirk("its connector maps each patch by itself", tokens_are_patches=True)
        for name in ("llava", "vipllava", "video_llava", "paligemma")
    },
    **{name: Quirk(_RASTER, patch_order="raster") for name in ("paddleocr_vl", "hunyuan_vl", "kimi_k25")},
}


def quirk_of(config: PreTrainedConfig) -> Quirk:
    """Return what is special about a model: the rows of its config and of its parts, the whole's first, as one."""
    types = dict.fromkeys(part.model_type for _, part in reversed(list(sub_configs(config))))
    rows = [QUIRKS[name] for name in types if name in QUIRKS]
    rows.sort(key=lambda row: not (row.refuses or row.mixed_tokens))  # the reason that may be shown comes first
    merged = Quirk("")
    for row in rows:
        told = {item.name: getattr(row, item.name) for item in fields(row) if not getattr(merged, item.name)}
        merged = replace(merged, **told)
    return merged
