"""The real data path at true sizes: image tokens, widths and towers of LLaVA-1.5 and Qwen2.5-VL, few random blocks.

Where the blocks are edited is watched from outside and compared with positions counted here from the processor's ids.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from processors import llava15_processor, qwen25vl_processor
from recording import places, recorded
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

import vlreft

# Wide text blocks take minutes on one core; one block with a narrow inner layer shows the same places.
NARROW = {"num_hidden_layers": 1, "intermediate_size": 512}
DEEP = {"num_hidden_layers": 2, "intermediate_size": 11008}


def llava15(size, processor):
    """LLaVA-1.5-7B but for its depth (23 of 24 tower blocks are read, and 32 of text) and its vocabulary."""
    vision = CLIPVisionConfig(
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "projection_dim": 768},
        **{"image_size": 336, "patch_size": 14, "num_hidden_layers": 3},
    )
    text = LlamaConfig(
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
        **(DEEP if size == "true" else NARROW),
        **_ids(processor),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )
    return LlavaForConditionalGeneration(config)


def qwen25vl(size, processor):
    """Qwen2.5-VL-3B but for its depth (32 tower blocks, every eighth with full attention, 36 of text)."""
    vision = {
        **{"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "depth": 3},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
        **{"fullatt_block_indexes": [1]},
    }
    text = {
        **{"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        **(DEEP if size == "true" else NARROW),
        **_ids(processor),
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _ids(processor):
    tokenizer = processor.tokenizer
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


@dataclass(frozen=True)
class Family:
    """A family at true sizes: how to make it, its pictures' sizes in pixels, and the tokens each of them becomes."""

    processor: Callable
    build: Callable
    pictures: tuple
    tokens: tuple
    patches: tuple  # in the tower, for each picture
    num_cls: int


FAMILIES = {
    "llava15": Family(llava15_processor, llava15, ((640, 480), (336, 336), (100, 333)), (576,) * 3, (576,) * 3, 1),
    # 28 x 28 pixels to a token, four patches to a token: 8 x 12, 5 x 9 and 9 x 4.
    "qwen25vl": Family(
        lambda: qwen25vl_processor(max_pixels=28 * 28 * 1280),
        qwen25vl,
        ((336, 224), (252, 140), (112, 252)),
        (96, 45, 36),
        (384, 180, 144),
        0,
    ),
}


SIZES = [
    pytest.param(
        (name, size), marks=[pytest.mark.slow] if size == "true" or name == "llava15" else [], id=f"{name}-{size}"
    )
    for name, size in itertools.product(FAMILIES, ("narrow", "true"))
]


@dataclass(frozen=True)
class World:
    """A family's model, its collator and pictures; rows by how many pictures they have."""

    family: Family
    model: torch.nn.Module
    collator: vlreft.Collator

    def row(self, *pictures, question="what is in the picture, a red circle or a blue square?", answer="a red circle"):
        images = [_picture(self.family.pictures[number]) for number in pictures]
        return {"images": images, "question": question, "answer": answer}

    @property
    def image_token_id(self):
        return self.model.config.image_token_id


def _picture(size):
    """Noise, so that no two patches are alike."""
    generator = torch.Generator().manual_seed(size[0])
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="module", params=SIZES)
def world(request):
    name, size = request.param
    family = FAMILIES[name]
    processor = family.processor()
    torch.manual_seed(0)
    return World(family, family.build(size, processor).eval(), vlreft.Collator(processor))


@pytest.fixture
def attach(world):
    """Attach interventions to the world's model until the test ends."""
    ours = []

    def attach_one(*items):
        torch.manual_seed(1)
        ours.append(vlreft.attach(world.model, vlreft.ReftConfig(items)))
        return ours[-1]

    yield attach_one
    for reft in ours:
        reft.detach()
    world.model.eval()


def mark(reft):
    """Let edit number k write into coordinate k and nowhere else: its places show in that coordinate of the change."""
    with torch.no_grad():
        for k, edit in enumerate(reft.edits.values()):
            edit.vector.zero_()
            edit.vector[k] = 64.0


def marked(change, k):
    """Where edit number k acted, as a list of places for each row."""
    return [row.nonzero()[:, 0].tolist() for row in places(change[..., k : k + 1])]


# --- placement ----------------------------------------------------------------------------------------------------

PLACED = ("question:f4+l4", "image:f4+l5", "image:all", "text:f4+l4", "prompt:l4")


def counted(ids, image_token_id):
    """The places that each part of `PLACED` and `image:all` mean in a prompt given as a list of ids, in their order."""
    image = [place for place, token in enumerate(ids) if token == image_token_id]
    text = [place for place, token in enumerate(ids) if token != image_token_id]
    question = [place for place in text if place > image[-1]]
    assert len(question) >= 8
    parts = [question[:4], question[-4:], image[:4], image[-5:], image, text[:4], text[-4:]]
    return [*parts, list(range(len(ids)))[-4:], image]


def test_edits_land_where_the_ids_say(world, attach):
    """In training, padded on the right, and in generation, padded on the left; one image and two in a row."""
    text = [vlreft.Intervention("vector", layers=0, positions=positions) for positions in PLACED]
    reft = attach(*text, vlreft.Intervention("vector", site="connector", positions="image:all"))
    mark(reft)
    rows = [world.row(0, question="is the square left of the circle? yes or no?"), world.row(1, 2)]
    train, prompts = world.collator(rows), world.collator.prompts(rows)
    num_images = [(row == world.image_token_id).sum().item() for row in train["input_ids"]]
    assert num_images == [world.family.tokens[0], sum(world.family.tokens[1:])]

    block = world.model.get_decoder().layers[0]
    with torch.no_grad(), recorded(block) as outputs, recorded(block, at_input=True) as inputs:
        world.model(**train)
        world.model.generate(**prompts, max_new_tokens=1)
    lengths = ((train["labels"] != -100).cumsum(1) == 0).sum(1).tolist()
    starts = prompts["attention_mask"].argmax(1).tolist()
    assert any(starts)
    for row, length in enumerate(lengths):
        places_of_prompt = counted(train["input_ids"][row, :length].tolist(), world.image_token_id)
        assert len(places_of_prompt) == len(reft.edits)
        for k, expected in enumerate(places_of_prompt):
            changes = inputs if k == len(reft.edits) - 1 else outputs
            assert marked(changes[0], k)[row] == expected
            assert marked(changes[1], k)[row] == [place + starts[row] for place in expected]


def test_tower_edits_land_on_patches_and_never_on_the_class_token(world, attach):
    family, segments = world.family, ["patches"] + ["cls"] * world.family.num_cls
    items = [vlreft.Intervention("vector", site="vision", layers=0, positions=name) for name in segments]
    reft = attach(*items)
    mark(reft)
    batch = world.collator.prompts([world.row(0), world.row(1, 2)])
    features = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}
    with torch.no_grad(), recorded(tower_blocks(world.model)[0]) as changes:
        world.model.get_image_features(**features)
    if family.num_cls:
        assert marked(changes[0], 0) == [list(range(1, 1 + num)) for num in family.patches]
        assert marked(changes[0], 1) == [[0]] * 3
    else:  # all images in one row
        assert places(changes[0]).tolist() == [True] * sum(family.patches)


def tower_blocks(model):
    tower = model.model.vision_tower if "Llava" in type(model).__name__ else model.model.visual
    return tower.encoder.layers if "Llava" in type(model).__name__ else tower.blocks


def test_a_tower_block_that_is_never_read_is_refused(world):
    if world.family.num_cls == 0:
        pytest.skip("Qwen2.5-VL reads its whole tower")
    item = vlreft.Intervention("loreft", site="vision", layers=2, positions="patches", rank=4)
    with pytest.raises(ValueError, match=r"layer 2 .*vision_feature_layer=-2.*use layers 0 to 1"):
        vlreft.attach(world.model, vlreft.ReftConfig([item]))


# --- training and generation --------------------------------------------------------------------------------------


def edits(**options):
    return [
        vlreft.Intervention("loreft", positions="question:f4+l4", rank=4, **options),
        vlreft.Intervention("loreft", site="vision", positions="patches", rank=4, **options),
        vlreft.Intervention("loreft", site="connector", positions="image:all", rank=4, **options),
    ]


class Watch(TrainerCallback):
    """Keep the gradients that the optimiser is given."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_training_step_gives_every_edit_a_finite_gradient(world, attach, tmp_path):
    reft = attach(*edits())
    watch = Watch()
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, logging_steps=1, disable_tqdm=True
    )
    rows = [world.row(0), world.row(1, 2)] if world.family.num_cls == 0 else [world.row(0)]
    trainer = vlreft.ReftTrainer(world.model, args, data_collator=world.collator, train_dataset=rows, callbacks=[watch])
    loss = trainer.train().training_loss
    assert 0 < loss < 20
    assert {name.removeprefix("vlreft.default.") for name in watch.grads} == {
        n for n, _ in reft.edits.named_parameters()
    }
    assert [name for name, grad in watch.grads.items() if not grad.isfinite().all()] == []
    # The first tokens of the question cannot matter on the last text block; all else does.
    last = len(world.model.get_decoder().layers) - 1
    assert [name for name, grad in watch.grads.items() if not grad.any() and f"text:{last}:f4" not in name] == []


def test_a_padded_batch_generates_what_single_rows_do(world, attach):
    attach(*edits(init="reference"))
    rows = [world.row(0), world.row(2, question="is the square left of the circle, or is it not? yes or no?")]
    if world.family.num_cls == 0:
        rows.append(world.row(1, 2, question="how many circles are there?"))
    generation = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = generate(world, rows, generation)
    for row, example in enumerate(rows):
        alone = generate(world, [example], generation)
        torch.testing.assert_close(together[1][row], alone[1][0], atol=1e-4, rtol=0)
        assert together[0][row].tolist() == alone[0][0].tolist()


def generate(world, rows, generation):
    """The answers' ids, and their logits, both with rows in front."""
    batch = world.collator.prompts(rows)
    output = world.model.generate(**batch, **generation)
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, 1)
