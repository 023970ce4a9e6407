"""Models that are built otherwise than most, one claim each: what is edited is what was asked for, or a refusal."""

import functools

import pytest
import timm
import torch
import torchvision
from family import loud
from test_families import TAIL
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BeitConfig,
    BeitModel,
    BridgeTowerConfig,
    BridgeTowerModel,
    Qwen3VLVisionModel,
    ReformerConfig,
    ReformerModelWithLMHead,
    SwinConfig,
    SwinModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from zoo import Spy, shake

import vlreft
from vlreft.models.sites import find_sites

BY_NAME = {family.name: family for family in TAIL}
OUTPUT_NAMES = {
    *("o_proj", "out_proj", "dense", "c_proj", "proj", "wo", "o", "out", "attn_out", "attention", "attn"),
    *("projection", "projection_layer", "output", "linear"),
}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PICTURES = {"image_size": 28, "patch_size": 14}


def attached(model, site, positions, **fields):
    item = vlreft.Intervention("loreft", site=site, positions=positions, layers=0, rank=2, **fields)
    return shake(vlreft.attach(model.eval(), vlreft.ReftConfig(item)))


def edited(model, site, positions, **batch):
    """Return what an edit changes in the first block, by row of its states."""
    reft = attached(model, site, positions)
    block = find_sites(model)[site].blocks[0]
    try:
        with torch.no_grad(), Spy(block) as spy:
            model(*batch.pop("args", ()), **batch)
    finally:
        reft.detach()
    return [row.nonzero().flatten().tolist() for row in spy.edited()]


def pixels(size=28, num=2):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TAIL, ids=str)
def test_the_attention_is_hooked_at_its_output_projection(family):
    """Gates of the same width may be registered behind it."""
    model = family.build()
    names = {module: name for name, module in model.named_modules()}
    for site in find_sites(model).by_name.values():
        for layer in range(len(site.blocks) if site.name != "connector" else 0):
            try:
                target = site.target(layer, "attention")
            except ValueError:
                continue
            assert names[target.module].rpartition(".")[2] in OUTPUT_NAMES, names[target.module]


def test_albert_finds_the_last_layer_of_its_mlp():
    sizes = {**SMALL, "vocab_size": 32, "embedding_size": 16, "intermediate_size": 48}
    model = AlbertForMaskedLM(AlbertConfig(**sizes))
    target = find_sites(model)["text"].target(0, "mlp")
    assert (
        dict(model.named_modules())["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"] is target.module
    )


# Towers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "want"), [("cls", [0]), ("patches:f2+l1", [1, 2, 4]), ("all", [0, 1, 2, 3, 4])])
@pytest.mark.parametrize("kind", ["beit", "timm", "torchvision"])
def test_lone_towers(kind, positions, want):
    torch.manual_seed(0)
    if kind == "beit":
        model, batch = BeitModel(BeitConfig(**SMALL, **PICTURES)), {"pixel_values": pixels()}
    elif kind == "timm":
        sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
        model, batch = timm.models.VisionTransformer(**sizes), {"args": (pixels(),)}
    else:
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        model = torchvision.models.VisionTransformer(28, 14, 2, 2, 24, 32, num_classes=3, norm_layer=norm)
        batch = {"args": (pixels(),)}
    assert edited(model, "vision", positions, **batch) == [want] * 2


def test_a_lone_packing_tower_reads_pictures():
    config = Qwen3VLVisionConfig(
        depth=2, hidden_size=24, intermediate_size=32, num_heads=2, out_hidden_size=24, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    assert set(find_sites(Qwen3VLVisionModel(config)).by_name) == {"vision"}


def test_states_with_tokens_first_are_told_by_their_attention():
    """BridgeTower's tower runs (tokens, batch, width)."""
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    text = {**SMALL, "vocab_size": 32, "type_vocab_size": 1}
    config = BridgeTowerConfig(text_config=text, vision_config=vision, num_hidden_layers=2, **{
        "hidden_size": 24, "num_attention_heads": 2, "share_cross_modal_transformer_layers": True})  # fmt: skip
    site = find_sites(BridgeTowerModel(config))["vision"]
    assert site.sequence_first


def test_a_class_token_that_is_not_in_the_blocks_is_not_guessed():
    """Aimv2's only class token belongs to its pooling."""
    model = Aimv2VisionModel(Aimv2VisionConfig(**SMALL, **PICTURES, use_head=True))
    with pytest.raises(ValueError, match="it runs 4 tokens, which are not 2 x 2 patches and 1 others"):
        edited(model, "vision", "cls", pixel_values=pixels())
    assert edited(model, "vision", "all", pixel_values=pixels()) == [[0, 1, 2, 3]] * 2


def test_stages_of_other_widths_are_refused():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    with pytest.raises(ValueError, match="have different widths, 16 and 32: name one by its path"):
        attached(SwinModel(SwinConfig(**sizes)), "vision", "all")


# Decoders ------------------------------------------------------------------------------------------------------------


def test_a_prompt_given_to_the_decoder_of_a_picture_reader():
    """Donut's usual use: training, a forward and generation edit the same tokens of it."""
    family = BY_NAME["vision_encoder_decoder"]
    model, batch = family.build(), family.batch(family.samples[:2], answer=False)
    prefix = torch.tensor([[model.generation_config.decoder_start_token_id or 1, 5, 6, 7]] * 2)
    reft = attached(model, "text", "f2+l1")
    with torch.no_grad(), Spy(find_sites(model)["text"].blocks[0]) as spy:
        model.generate(**batch, decoder_input_ids=prefix, max_new_tokens=3, do_sample=False)
        model(**batch, decoder_input_ids=prefix)
    first, last = spy.edited(0), spy.edited(-1)
    start = first.shape[1] - prefix.shape[1]
    assert [row.nonzero().flatten().tolist() for row in last] == [[0, 1, 3]] * 2
    assert first[0].nonzero().flatten().tolist()[-1] == start + 3
    assert not any(spy.edited(call).any() for call in range(1, len(spy.before) - 1))
    reft.detach()


def bart():
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    torch.manual_seed(0)
    return loud(BartForConditionalGeneration(BartConfig(**sizes, **heads)))


def test_pads_of_a_decoder_are_not_counted():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 1]])
    mask = (ids != 1).long()
    model = bart()
    assert edited(model, "text", "l1", input_ids=ids, attention_mask=mask) == [[3], [2]]  # BART shifts by one
    given = {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask.flip(1)}
    assert edited(model, "text", "f1", input_ids=ids, attention_mask=mask, **given) == [[0], [2]]


def test_an_encoder_that_does_not_run_is_not_edited_in_silence():
    model, ids = bart(), torch.tensor([[5, 6, 7, 8]])
    encoded = model.get_encoder()(ids)
    reft = attached(model, "text_encoder", "l1")
    with pytest.raises(ValueError, match="called with `encoder_outputs`, so the edits in its encoder would do nothing"):
        model(encoder_outputs=encoded, decoder_input_ids=ids)
    with reft.disabled():
        model(encoder_outputs=encoded, decoder_input_ids=ids)


def test_whisper_generates_from_a_prompt_that_is_given():
    sizes = {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **ids, max_source_positions=8))
    assert set(find_sites(model).by_name) == {"text"}
    attached(model, "text", "l1")
    with pytest.raises(ValueError, match=r"cannot generate with edits of its decoder: .* pass `decoder_input_ids`"):
        model.generate(input_features=torch.randn(1, 8, 16))


# Others --------------------------------------------------------------------------------------------------------------


def test_two_streams_in_one_block_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "is_decoder": True, "attention_head_size": 8}
    axes = {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [8, 8], "feed_forward_size": 16, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="reversible and carry two streams"):
        attached(ReformerModelWithLMHead(ReformerConfig(**sizes, **axes)), "text", "l1")


def test_states_of_another_width_are_refused():
    """A block that shrinks its states is found by a norm of another width."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, h):
            return self.out(self.norm(self.attn(h)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Odd()])

        def forward(self, x):
            return self.blocks[0](x)

    model = Model()
    attached(model, "vision", "all")
    with pytest.raises(ValueError, match=r"its states are \(2, 3, 4\), not of the width 8"):
        model(torch.randn(2, 3, 8))
