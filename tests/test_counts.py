"""Trainable numbers equal the papers', on models of true size without weights (the meta device).

The papers: ReFT (arXiv 2404.03592), MRT (arXiv 2503.00723), MoReS (arXiv 2412.12359), RED (arXiv 2402.15179).
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import vlreft


def vicuna(**settings):
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, **settings
    )


def clip_l14(image_size):
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=image_size,
        patch_size=14,
    )  # fmt: skip


BASES = {
    "LLaMA-7B": lambda: LlamaForCausalLM(vicuna()),
    "LLaMA-13B": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    ),
    "Llama-3-8B": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256,
        )
    ),
    "Phi-2": lambda: PhiForCausalLM(
        PhiConfig(
            vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
        )
    ),
    "RoBERTa-base": lambda: RobertaModel(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), add_pooling_layer=False
    ),
    "RoBERTa-large": lambda: RobertaModel(
        RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, hidden_size=1024, intermediate_size=4096,
            num_hidden_layers=24, num_attention_heads=16,
        ),
        add_pooling_layer=False,
    ),
    "LLaVA-7B/224": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=clip_l14(224), text_config=vicuna(), image_token_id=31999)
    ),
    "LLaVA-1.5-7B": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=clip_l14(336), text_config=vicuna(vocab_size=32064), image_token_id=32000)
    ),
}  # fmt: skip


@functools.cache
def base(name):
    with torch.device("meta"):
        return BASES[name]()


@dataclass(frozen=True)
class Row:
    """A published setting: its interventions, how many numbers they have and what percentage of the base is printed."""

    base: str
    items: tuple[vlreft.Intervention, ...]
    count: int
    percent: str | None = None


def reft(method="loreft", **settings):
    return vlreft.Intervention(method, **({"init": "reference"} | settings))


def commonsense(method="loreft"):
    return (reft(method, rank=8, positions="f7+l7", tied=True),)


def instruct(rank):
    return (reft(rank=rank, positions="f5+l5", layers=[3, 9, 18, 24]),)


def mores(rank):
    return (reft(rank=rank, positions="f4+l5", tied=True),)


# MoReS's own code has no bias; ours has one number per rank and layer.
MORES_BIAS = 32

PAPERS = {
    "LoReFT, LLaMA-7B": Row("LLaMA-7B", commonsense(), 2_097_408, "0.031"),
    "DiReFT as pyreft has it, LLaMA-7B": Row("LLaMA-7B", commonsense("direft"), 2_097_408, "0.031"),
    "DiReFT as the paper has it, LLaMA-7B": Row("LLaMA-7B", commonsense("nodireft"), 2_097_408, "0.031"),
    "NoReFT, LLaMA-7B": Row("LLaMA-7B", commonsense("noreft"), 2_097_408, "0.031"),
    "LoReFT, LLaMA-13B": Row("LLaMA-13B", commonsense(), 3_277_120, "0.025"),
    "LoReFT, Llama-3-8B": Row("Llama-3-8B", commonsense(), 2_097_408, "0.026"),
    "instruct, rank 4": Row("LLaMA-7B", instruct(4), 262_176, "0.0039"),
    "instruct, half the rank": Row("LLaMA-7B", instruct(2), 131_088, "0.0019"),
    "h + R'b, LLaMA-7B": Row("LLaMA-7B", commonsense("lobireft"), 1_048_832, "0.016"),
    "h + R'(b - Rh), LLaMA-7B": Row("LLaMA-7B", commonsense("consreft"), 1_048_832, "0.016"),
    "h + R'b, LLaMA-13B": Row("LLaMA-13B", commonsense("lobireft"), 1_638_720, "0.013"),
    "h + R'(b - Rh), LLaMA-13B": Row("LLaMA-13B", commonsense("consreft"), 1_638_720, "0.013"),
    "GOODY-2": Row("LLaMA-7B", (reft(rank=4, layers=15, positions="l1"),), 32_772),
    "memorisation, LLaMA-7B": Row("LLaMA-7B", (reft("lobireft", rank=1, layers=15, positions="l1"),), 4_097),
    "memorisation, LLaMA-13B": Row("LLaMA-13B", (reft("lobireft", rank=1, layers=15, positions="l1"),), 5_121),
    "RED, LLaMA-7B": Row("LLaMA-7B", (reft("red", positions="prompt"), ), 262_144, "0.0039"),
    "GLUE, RoBERTa-base": Row("RoBERTa-base", (reft(rank=1, positions="f3"),), 18_444, "0.015"),
    "GLUE, RoBERTa-large": Row("RoBERTa-large", (reft(rank=1, positions="f3"),), 49_176, "0.014"),
    "MRT": Row(
        "LLaVA-7B/224",
        (
            reft(site="vision", layers=range(1, 23), positions="prompt", rank=6),
            reft(site="connector", positions="image", rank=6),
            reft(positions="text:f4+l4", rank=4),
        ),
        270_468 + 49_158 + 2_097_408,
        "0.034",
    ),
    **{f"MoReS, Phi-2, rank {r}": Row("Phi-2", mores(r), (163_840 + MORES_BIAS) * r) for r in (1, 2, 4, 8)},
    "MoReS, LLaVA-7B": Row("LLaVA-1.5-7B", (reft(rank=1, positions="image:f4+l5", tied=True),), 262_144 + MORES_BIAS),
    "MoReS, 13B": Row("LLaMA-13B", mores(1), 409_600 + 40),
    "LLaVA-1.5-7B, text": Row("LLaVA-1.5-7B", (reft(rank=4, positions="f4+l4"),), 2_097_408),
    "LLaVA-1.5-7B, the 23 blocks that are read": Row(
        "LLaVA-1.5-7B", (reft(site="vision", rank=4, positions="patches"),), 23 * (2 * 4 * 1024 + 4)
    ),
}  # fmt: skip

TRUE_SIZES = {
    "LLaMA-7B": 6_738_415_616,
    "LLaMA-13B": 13_015_864_320,
    "Llama-3-8B": 8_030_261_248,
    "Phi-2": 2_779_683_840,
    "RoBERTa-base": 124_055_040,
    "RoBERTa-large": 354_310_144,
    "LLaVA-1.5-7B": 7_063_427_072,
}


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "count"), TRUE_SIZES.items())
def test_bases_have_their_true_size(name, count):
    assert size(base(name)) == count


@pytest.mark.parametrize("name", PAPERS)
def test_counts(name, capsys):
    row = PAPERS[name]
    model = base(row.base)
    base_count = size(model)
    reft = vlreft.attach(model, vlreft.ReftConfig(row.items))
    try:
        assert reft.num_parameters() == row.count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == row.count
        assert {parameter.device.type for parameter in reft.parameters()} == {"meta"}
        reft.print_trainable_parameters()
    finally:
        reft.detach()
    percent = 100 * row.count / base_count
    assert capsys.readouterr().out == (
        f"trainable: {row.count:,} numbers, {percent:.4f} % of the base's {base_count:,}\n"
    )
    if row.percent is not None:
        decimals = len(row.percent.partition(".")[2])
        assert abs(percent - float(row.percent)) <= 0.5001 * 10**-decimals


@pytest.mark.parametrize(("positions", "tied", "groups"), [("f7+l7", True, 1), ("f7+l7", False, 2), ("f3", False, 1)])
def test_groups_are_parts_not_positions(positions, tied, groups):
    """An intervention for each of 14 positions would be 29.4M numbers on LLaMA-7B, which the paper's counts exclude."""
    model = base("LLaMA-7B")
    reft = vlreft.attach(
        model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=8, positions=positions, tied=tied))
    )
    reft.detach()
    assert len(reft.edits) == 32 * groups
    assert reft.num_parameters() == groups * 2_097_408
