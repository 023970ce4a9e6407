"""Rows of the zoo that read text alone: decoders, encoder-decoders, and encoders with a head.

All are made with 2 or 3 blocks of width 32. Windows of sliding attention are 8 tokens: the samples outgrow them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from family import PAD, Family, Sample, llama_sizes, loud
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
GPT_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **IDS}
NO_GPT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _made(model: Callable[..., nn.Module], config: Callable[..., Any], **sizes: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)  # `loud` moves vectors from where they are, and some models draw theirs
            made = model(config(**sizes, experts_implementation="eager"))  # the default knows no float64
        tables = {name: table.clone() for name, table in made.named_parameters() if not table.requires_grad}
        made = loud(made)
        with torch.no_grad():
            for name, table in tables.items():  # of sinusoids, which a checkpoint leaves out
                made.get_parameter(name).copy_(table)
        return made

    return build


def _llama_like(model: Callable[..., nn.Module], config: Callable[..., Any], **more: object) -> Callable[[], nn.Module]:
    return _made(model, config, **llama_sizes(**more))


def _pad(rows: Sequence[Sequence[int]], width: int, side: str, fill: int) -> Tensor:
    pairs = [(list(row), [fill] * (width - len(row))) for row in rows]
    return torch.tensor([fills + row if side == "left" else row + fills for row, fills in pairs])


def _words(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token >= 0]


def _prompts(samples: Sequence[Sample], side: str, more_pads: int) -> dict[str, Tensor]:
    rows = [_words(sample.prompt) for sample in samples]
    width = max(map(len, rows)) + more_pads
    mask = _pad([[1] * len(row) for row in rows], width, side, 0)
    return {"input_ids": _pad(rows, width, side, PAD), "attention_mask": mask}


def _translations(samples: Sequence[Sample], side: str, answer: bool, more_pads: int) -> dict[str, Tensor]:
    """The prompt goes to the encoder, the answer to the decoder."""
    made = _prompts(samples, side, more_pads)
    if answer:
        rows = [sample.answer for sample in samples]
        made["labels"] = _pad(rows, max(map(len, rows)), "right", -100)
    return made


def _classes(samples: Sequence[Sample], side: str, answer: bool, more_pads: int) -> dict[str, Tensor]:
    """The answer is the class of the whole text: how many tokens it has, of 1 to 3."""
    made = _prompts(samples, side, more_pads)
    return made | ({"labels": torch.tensor([len(sample.answer) - 1 for sample in samples])} if answer else {})


def _tags(samples: Sequence[Sample], side: str, answer: bool, more_pads: int) -> dict[str, Tensor]:
    """The answer is a class of each token."""
    made = _prompts(samples, side, more_pads)
    tags = (made["input_ids"] % 3).masked_fill(made["attention_mask"] == 0, -100)
    return made | ({"labels": tags} if answer else {})


# Seen: eager attention takes its softmax in float32, where the mask of float64 is -inf: a pad that sees only pads is
# NaN, and zero times NaN reaches the other tokens. In float32 left padding changes nothing.
NO_FLOAT64 = {"left padding": "NaN in float64 only, its eager attention overflows the mask of rows that see only pads"}
COUNTS_PADS = {"left padding": "its encoder's positions count the pads: states differ by 1.5"}
NO_HEAD_GENERATES = {"generate": "its head is no language model's"}
FIRST_TOKEN = {"left padding": "its head reads position 0, which is then a pad", **NO_HEAD_GENERATES}

# Decoders ----------------------------------------------------------------------------------------------------------

ROTARY = tuple(
    Family(name, _llama_like(model, config, **more), text="model.layers", skips=NO_FLOAT64 if name == "gemma2" else {})
    for name, model, config, more in (
        ("mistral", MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
        ("mixtral", MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
        (
            "qwen2_moe",
            Qwen2MoeForCausalLM,
            Qwen2MoeConfig,
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
        ),
        ("qwen3", Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
        (
            "gemma2",
            Gemma2ForCausalLM,
            Gemma2Config,
            {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
        ),
        (
            "gemma3_text",
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            {
                **{"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
                **{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
            },
        ),
        ("phi3", Phi3ForCausalLM, Phi3Config, {}),
        ("olmo2", Olmo2ForCausalLM, Olmo2Config, {}),
        (
            "gpt_oss",
            GptOssForCausalLM,
            GptOssConfig,
            {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        ("stablelm", StableLmForCausalLM, StableLmConfig, {}),
        ("granite", GraniteForCausalLM, GraniteConfig, {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
        ("cohere", CohereForCausalLM, CohereConfig, {"logit_scale": 1.0}),
        ("glm4", Glm4ForCausalLM, Glm4Config, {"head_dim": 8}),
        ("smollm3", SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layer_interval": 2}),
        # Blocks of a convolution and of attention by turns.
        ("lfm2", Lfm2ForCausalLM, Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}),
        # Blocks of a state space, of attention and of experts.
        (
            "nemotron_h",
            NemotronHForCausalLM,
            NemotronHConfig,
            {
                **{"layers_block_type": ["mamba", "attention", "moe"], "head_dim": 8, "ssm_state_size": 8},
                **{"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "n_routed_experts": 4, "chunk_size": 4},
                **{"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
            },
        ),
    )
)

OTHER_DECODERS = (
    Family(
        "gpt_neox",
        _made(
            GPTNeoXForCausalLM,
            GPTNeoXConfig,
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "max_position_embeddings": 256, **IDS},
        ),
        text="gpt_neox.layers",
    ),
    Family(
        "gpt_bigcode",
        _made(GPTBigCodeForCausalLM, GPTBigCodeConfig, **GPT_SIZES, **NO_GPT_DROPOUT),
        text="transformer.h",
        position_ids=True,
    ),
    Family(
        "opt",
        _made(
            OPTForCausalLM,
            OPTConfig,
            **{"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"max_position_embeddings": 256, "word_embed_proj_dim": 32, "dropout": 0.0, **IDS},
        ),
        text="model.decoder.layers",
    ),
    Family(
        "bloom",
        _made(BloomForCausalLM, BloomConfig, vocab_size=64, hidden_size=32, n_layer=3, n_head=4, **IDS),
        text="transformer.h",
        skips=NO_FLOAT64,
    ),
    Family(
        "falcon",
        _made(
            FalconForCausalLM,
            FalconConfig,
            **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **IDS},
        ),
        text="transformer.h",
    ),
    # Keeps no cache: each step of generation sends the whole sequence again.
    Family(
        "mpt",
        _made(MptForCausalLM, MptConfig, vocab_size=64, d_model=32, n_layers=3, n_heads=4, max_seq_len=64, **IDS),
        text="transformer.blocks",
        skips=NO_FLOAT64,
    ),
    Family("gptj", _made(GPTJForCausalLM, GPTJConfig, rotary_dim=4, **GPT_SIZES), text="transformer.h"),
    Family("codegen", _made(CodeGenForCausalLM, CodeGenConfig, rotary_dim=4, **GPT_SIZES), text="transformer.h"),
    # Blocks return a list.
    Family(
        "openai-gpt",
        _made(OpenAIGPTLMHeadModel, OpenAIGPTConfig, **GPT_SIZES, **NO_GPT_DROPOUT),
        text="transformer.h",
        position_ids=True,
        skips={"checkpointing": "ValueError: OpenAIGPTLMHeadModel does not support activation checkpointing"},
    ),
    Family(
        "mamba",
        _made(
            MambaForCausalLM,
            MambaConfig,
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "state_size": 4,
                "num_hidden_layers": 3,
                "time_step_rank": 4,
                **IDS,
            },
        ),
        text="backbone.layers",
        skips={"generate": "its cache does not count tokens: refused, see the test of that"},
    ),
    # States are (B, T, 4, D): four residual streams that each block mixes.
    Family(
        "deepseek_v4",
        _made(
            DeepseekV4ForCausalLM,
            DeepseekV4Config,
            **{"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 16, "num_experts_per_tok": 2},
            **{"n_routed_experts": 4, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16},
            **{"index_topk": 4, "sliding_window": 16, "max_position_embeddings": 256, **IDS},
            **{"layer_types": ["sliding_attention"] * 3, "mlp_layer_types": ["moe"] * 3},
        ),
        text="model.layers",
        refused={"text": "several residual streams"},
    ),
)

# Encoder-decoders --------------------------------------------------------------------------------------------------

BART_SIZES = {
    **{"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64, "dropout": 0.0},
    **{"encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4},
    **{"decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None, **IDS},
}

ENCODER_DECODERS = (
    Family(
        "t5",
        _made(
            T5ForConditionalGeneration,
            T5Config,
            **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3},
            **{"num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": PAD, **IDS},
        ),
        text="decoder.block",
        text_encoder="encoder.block",
        write=_translations,
    ),
    *(
        Family(
            name,
            _made(model, config, **BART_SIZES),
            text="model.decoder.layers",
            text_encoder="model.encoder.layers",
            write=_translations,
            skips=COUNTS_PADS,
        )
        for name, model, config in (
            ("bart", BartForConditionalGeneration, BartConfig),
            ("marian", MarianMTModel, MarianConfig),
            ("pegasus", PegasusForConditionalGeneration, PegasusConfig),
        )
    ),
)

# Heads -------------------------------------------------------------------------------------------------------------

BERT_SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3, **IDS},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}

HEADS = (
    Family(
        "bert-classes",
        _made(BertForSequenceClassification, BertConfig, **BERT_SIZES),
        text="bert.encoder.layer",
        write=_classes,
        skips=FIRST_TOKEN,
    ),
    Family(
        "roberta-classes",
        _made(RobertaForSequenceClassification, RobertaConfig, **BERT_SIZES),
        text="roberta.encoder.layer",
        write=_classes,
        skips=FIRST_TOKEN,
    ),
    Family(
        "roberta-tags",
        _made(RobertaForTokenClassification, RobertaConfig, **BERT_SIZES),
        text="roberta.encoder.layer",
        write=_tags,
        skips=NO_HEAD_GENERATES,
    ),
    # Its score is read at the last token that is no pad.
    Family(
        "llama-classes",
        _llama_like(LlamaForSequenceClassification, LlamaConfig, num_labels=3),
        text="model.layers",
        write=_classes,
        skips=NO_HEAD_GENERATES,
    ),
)

ROWS: tuple[Family, ...] = (*ROTARY, *OTHER_DECODERS, *ENCODER_DECODERS, *HEADS)
