"""Processors, tokenizers and tiny models made on the spot, offline: true transformers classes with small vocabularies.

Each builder returns a new object, the same every time. Widths are small; structure and ids are the family's.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
)

# What the vocabularies are trained on: enough for words, blanks and line ends to merge as they do in real ones.
CORPUS = [
    "USER: what is in the picture? ASSISTANT: a red circle and a blue square",
    "system\nYou are a helpful assistant.\nuser\nhow many circles are there?\nassistant\nthere are two circles\n\n",
    "question: is the square left of the circle? answer: yes, it is. no, it is not. describe the image",
] * 4

# In the form of LLaVA-1.5's: images of a message first, a blank after each text, no mark at the end of a turn.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' if m['role'] != 'system' else '' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# In the form of Qwen2.5-VL's: a system turn if none is given, parts in their order, each turn closed.
QWEN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def _wrap(core: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=4096, **options)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer as Llama's are: blanks as part of words, bytes for what is unknown, a start token in front."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=specials + byte_tokens, show_progress=False)
    )
    # The trainer makes the byte tokens special; a model of them alone keeps them ordinary, as Llama has them.
    plain = Tokenizer(core.model)
    plain.pre_tokenizer, plain.decoder = core.pre_tokenizer, core.decoder
    plain.add_special_tokens(specials)
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", plain.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _wrap(plain, **names, extra_special_tokens={"image_token": "<image>"})


def qwen_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer as Qwen's are: no start token, turns closed by the end token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(QWEN_SPECIALS)
    return _wrap(core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template)


def text_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a text-only model, with or without a chat template."""
    return qwen_tokenizer(QWEN_TEMPLATE if chat else None)


def pad_is_eos_tokenizer() -> PreTrainedTokenizerFast:
    """Make a text-only tokenizer whose pad token is its end token, as people set it for GPT-2 and Llama."""
    tokenizer = llama_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a text-only tokenizer of whole words, without a pad token."""
    words = sorted({word for line in CORPUS for word in line.replace("?", " ?").replace(",", " ,").split()})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(core, eos_token="</s>", unk_token="<unk>")


def tiny_llava_processor(image_size: int = 28, patch: int = 14) -> LlavaProcessor:
    """Make LLaVA-1.5's processor for smaller images: (image_size / patch)² tokens each."""
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        images,
        llama_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def llava15_processor() -> LlavaProcessor:
    """Make a processor with LLaVA-1.5's image settings: 336 pixels in patches of 14, 576 tokens an image."""
    return tiny_llava_processor(image_size=336, patch=14)


def qwen25vl_processor(min_pixels: int = 28 * 28, max_pixels: int = 28 * 28 * 16) -> Qwen2_5_VLProcessor:
    """Make Qwen2.5-VL's processor: images keep their shape, a token for each 28 x 28 pixels, within the two bounds."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    images = Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2, temporal_patch_size=2)
    return Qwen2_5_VLProcessor(images, qwen_tokenizer(), Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE)


def tiny_paligemma_processor() -> PaliGemmaProcessor:
    """Make PaliGemma's processor: no chat template, four tokens an image, token types that say what sees what."""
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, llama_tokenizer())


def _llama_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
        **{"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_text_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Make a three-layer Llama with random weights for this tokenizer, in eval mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_llama_sizes(tokenizer))).eval()


def tiny_llava_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Make a LLaVA of three tower blocks and three text blocks with random weights for this processor, in eval mode."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        image_size=processor.image_processor.crop_size["height"],
        patch_size=processor.patch_size,
        **{"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_llama_sizes(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )
    return LlavaForConditionalGeneration(config).eval()


def tiny_qwen25vl_model(processor: Qwen2_5_VLProcessor, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Make a Qwen2.5-VL of three tower blocks and three text blocks with random weights, in eval mode."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    text = {
        **_llama_sizes(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"window_size": 56, "fullatt_block_indexes": [1]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_paligemma_model(processor: PaliGemmaProcessor, seed: int = 0) -> PaliGemmaForConditionalGeneration:
    """Make a PaliGemma of three tower blocks and three text blocks with random weights, in eval mode."""
    torch.manual_seed(seed)
    vision = {
        **{"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": 24},
        **{"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 32},
    }
    text = {"model_type": "gemma", "head_dim": 8, **_llama_sizes(processor.tokenizer)}
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=processor.image_token_id, projection_dim=32
    )
    return PaliGemmaForConditionalGeneration(config).eval()
