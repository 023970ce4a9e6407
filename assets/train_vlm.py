"""Train assets/demo-llava from nothing: first the vision tower alone, then language model and projector.

Run: python assets/train_vlm.py            (one CPU thread; see assets/README.md for the minutes it took)

Stage 1 teaches the tower what stands in each cell of the 3x3 grid, and each image token its own row and column.
Stage 2 freezes the tower and trains the rest on questions, captions and copies. One sequence holds an image and
many segments that see the image but not each other, so the image tokens are computed once for all of them.

Shapes: B images, C = 9 cells, T = 64 image tokens, D = 128 model dimension, L = length of a packed sequence.
"""

import argparse
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import (
    IGNORE,
    SPECIAL_IDS,
    TOKEN_IDS,
    Optimizers,
    build_text_config,
    build_tokenizer,
    chat_template,
    constant_then_linear,
    copy_drill,
    encode,
    log,
    save_half,
)
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from world import (
    CAPTION_PROMPT,
    COLORS,
    CORE_KINDS,
    IMAGE_SIZE,
    KINDS,
    RADII,
    SHAPES,
    Scene,
    ask,
    ask_any,
    caption,
    make_scene,
    render,
    scene_rng,
)

PATCH = 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
MAX_NOISE = 4.0  # grey levels; training pictures get 0 to this much, the shipped ones are clean
QUESTIONS_PER_IMAGE = 8
KIND_WEIGHTS = {  # the kinds that need two steps (find an object, then compare or locate) are asked more often
    "color": 1.0,
    "shape": 1.0,
    "size": 1.0,
    "count": 0.5,
    "countattr": 1.5,
    "present": 1.5,
    "rel": 2.5,
    "cell": 1.5,
    "where": 1.5,
}


# ---------------------------------------------------------------------------------------------------------------
# Model and processor


def build_model() -> LlavaForConditionalGeneration:
    """A random LLaVA of 1.6 million parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=build_text_config(),
        image_token_id=TOKEN_IDS["<image>"],
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )
    return LlavaForConditionalGeneration(config)


def build_processor() -> LlavaProcessor:
    """Any picture to 64x64 pixels in -1..1, any conversation to ids."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=chat_template(images=True),
    )


# ---------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass
class Pictures:
    """Scenes of one split with their pixels, uint8 of shape (N, 3, 64, 64)."""

    scenes: list[Scene]
    pixels: torch.Tensor

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Pixels as the image processor would give them, float in -1..1, (B, 3, 64, 64)."""
        return self.pixels[index].float() / 127.5 - 1.0


def draw(split: str, number: int, max_noise: float = 0.0) -> Pictures:
    """The first `number` scenes of a split."""
    scenes, pixels = [], torch.empty(number, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for index in range(number):
        rng = scene_rng(split, index)
        scenes.append(make_scene(rng))
        picture = render(scenes[-1], rng, noise=rng.uniform(0.0, max_noise))
        pixels[index] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return Pictures(scenes, pixels)


# ---------------------------------------------------------------------------------------------------------------
# Stage 1: the tower


def tower_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector reads: the last block's output without the class token, (B, T, D)."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def cell_labels(scenes: list[Scene]) -> torch.Tensor:
    """Shape, colour and size of each cell, (N, C, 3); the last class of each means an empty cell."""
    names = [list(SHAPES), list(COLORS), list(RADII)]
    labels = torch.tensor([len(n) for n in names]).repeat(len(scenes), 9, 1)
    for row, scene in enumerate(scenes):
        for thing in scene:
            words = (thing.shape, thing.color, thing.size)
            ids = [n.index(word) for n, word in zip(names, words, strict=True)]
            labels[row, 3 * thing.row + thing.column] = torch.tensor(ids)
    return labels


class TowerHeads(nn.Module):
    """Linear read-outs that teach the tower, thrown away after stage 1."""

    def __init__(self, width: int) -> None:
        """`width` is D."""
        super().__init__()
        self.sizes = [len(SHAPES) + 1, len(COLORS) + 1, len(RADII) + 1]
        self.cells = nn.Linear(width, sum(self.sizes))
        self.places = nn.Linear(width, 2 * (IMAGE_SIZE // PATCH))

    def cell_logits(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Shape, colour and size logits, each (B, C, classes), from features (B, T, D)."""
        side = IMAGE_SIZE // PATCH
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        pooled = functional.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)
        return list(self.cells(pooled).split(self.sizes, dim=-1))

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cells, plus a quarter of the cross-entropy of each token's own row and column."""
        logits = self.cell_logits(features)
        cells = sum(
            functional.cross_entropy(part.flatten(0, 1), labels[..., i].flatten()) for i, part in enumerate(logits)
        )
        side = IMAGE_SIZE // PATCH
        token = torch.arange(side * side).repeat(len(features))
        row, column = self.places(features).flatten(0, 1).chunk(2, dim=-1)
        return cells + 0.25 * (
            functional.cross_entropy(row, token // side) + functional.cross_entropy(column, token % side)
        )


@torch.no_grad()
def tower_accuracy(model: LlavaForConditionalGeneration, heads: TowerHeads, pictures: Pictures) -> float:
    """Share of objects of which shape, colour and size are all right."""
    labels = cell_labels(pictures.scenes)
    features = tower_features(model, pictures.batch(torch.arange(len(labels))))
    predicted = torch.stack([part.argmax(-1) for part in heads.cell_logits(features)], dim=-1)
    taken = labels[..., 0] < len(SHAPES)
    return (predicted == labels).all(-1)[taken].float().mean().item()


def train_tower(model: LlavaForConditionalGeneration, train: Pictures, dev: Pictures, args: argparse.Namespace) -> None:
    """Stage 1, batch 64."""
    heads = TowerHeads(model.config.vision_config.hidden_size)
    tower = model.model.vision_tower
    schedule = constant_then_linear(args.tower_steps, warmup=50, decay_from=0.4)
    optimizers = Optimizers([tower, heads], muon=0.02, adamw=1.5e-3, schedule=schedule)
    labels, start = cell_labels(train.scenes), time.process_time()
    for step in range(args.tower_steps):
        index = torch.randint(len(labels), (64,))
        with torch.autocast("cpu", torch.bfloat16):
            features = tower_features(model, train.batch(index))
        optimizers.step(heads.loss(features.float(), labels[index]))
        if (step + 1) % 150 == 0 or step + 1 == args.tower_steps:
            accuracy = round(tower_accuracy(model, heads, dev), 4)
            seconds = round(time.process_time() - start)
            log(args.log, stage="tower", step=step + 1, cpu_seconds=seconds, objects_right=accuracy)
    tower.requires_grad_(False)


@torch.no_grad()
def all_features(model: LlavaForConditionalGeneration, pictures: Pictures) -> torch.Tensor:
    """The frozen tower's output for every picture, bfloat16 (N, T, D): stage 2 never runs the tower."""
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for index in torch.arange(len(pictures.scenes)).split(256):
            parts.append(tower_features(model, pictures.batch(index)).bfloat16())
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------
# Stage 2: packed sequences


@dataclass
class Segment:
    """One question and answer; `sees_image` is False for a prompt without an image."""

    kind: str
    question: list[int]
    answer: list[int]
    sees_image: bool = True


def segments_of(scene: Scene, rng: random.Random) -> list[Segment]:
    """What one image is trained on: a caption, eight questions, one copy with the image and one without."""
    segments = [Segment("caption", encode(CAPTION_PROMPT), encode(caption(scene)))]
    for _ in range(QUESTIONS_PER_IMAGE):
        qa = ask_any(scene, tuple(KIND_WEIGHTS), rng, tuple(KIND_WEIGHTS.values()))
        segments.append(Segment(qa.kind, encode(qa.question), encode(qa.answer)))
    for sees_image in (True, False):
        segments.append(Segment("copy", *copy_drill(rng), sees_image))
    return segments


def eval_segments(scene: Scene, rng: random.Random) -> list[Segment]:
    """A caption and one question of each kind that the scene allows."""
    asked = [qa for kind in KINDS if (qa := ask(scene, kind, rng)) is not None]
    segments = [Segment("caption", encode(CAPTION_PROMPT), encode(caption(scene)))]
    return segments + [Segment(qa.kind, encode(qa.question), encode(qa.answer)) for qa in asked]


@dataclass
class Packed:
    """A batch of packed sequences; group 0 is `<s> <user>`, 1 the image, 2 and up the segments, -1 padding."""

    ids: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L), the token to predict at each place, or IGNORE
    positions: torch.Tensor  # (B, L), as if each segment stood alone behind its prefix
    group: torch.Tensor  # (B, L)
    blind: torch.Tensor  # (B, L), True in segments that do not see the image

    def mask(self) -> torch.Tensor:
        """What to add to attention scores, 0 where a query may see a key (last axis), else -inf-like; (B, 1, L, L)."""
        query, key = self.group[:, :, None], self.group[:, None, :]
        seen = (query == key) | (key == 0) | ((key == 1) & ~self.blind[:, :, None])
        seen &= torch.ones_like(seen[0]).tril()
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def pack(batch: list[list[Segment]]) -> Packed:
    """Lay segments out behind the shared prefix `<s> <user> <image>*64`."""
    prefix = [TOKEN_IDS["<s>"], TOKEN_IDS["<user>"]] + [TOKEN_IDS["<image>"]] * NUM_IMAGE_TOKENS
    rows = []
    for segments in batch:
        row = [(token, IGNORE, place, min(place // 2, 1), False) for place, token in enumerate(prefix)]
        for number, segment in enumerate(segments):
            ids = [*segment.question, TOKEN_IDS["<assistant>"], *segment.answer, TOKEN_IDS["</s>"]]
            first = len(segment.question)  # <assistant> predicts the first answer token
            start = len(prefix) if segment.sees_image else 2
            # The last token predicts nothing and no one reads it, so it is left out.
            for place, token in enumerate(ids[:-1]):
                label = ids[place + 1] if place >= first else IGNORE
                row.append((token, label, start + place, number + 2, not segment.sees_image))
        rows.append(row)
    length = max(len(row) for row in rows)
    padding = (TOKEN_IDS["<pad>"], IGNORE, 0, -1, False)
    table = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    ids, labels, positions, group, blind = table.unbind(-1)
    return Packed(ids, labels, positions, group, blind.bool())


def packed_logits(model: LlavaForConditionalGeneration, packed: Packed, features: torch.Tensor) -> torch.Tensor:
    """Logits at the places that have a label, (number of labels, V), from tower features (B, T, D)."""
    embeddings = model.get_input_embeddings()(packed.ids)
    images = model.model.multi_modal_projector(features).to(embeddings.dtype)
    embeddings = torch.cat([embeddings[:, :2], images, embeddings[:, 2 + NUM_IMAGE_TOKENS :]], dim=1)
    outputs = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=packed.mask(), position_ids=packed.positions, use_cache=False
    )
    return model.lm_head(outputs.last_hidden_state[packed.labels != IGNORE])


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration, scenes: list[Scene], features: torch.Tensor, split: str
) -> dict[str, float]:
    """Per kind, the share of answers of which every token (and the end) is right.

    Teacher forcing gives the same number as greedy decoding: the first wrong token ends both.
    """
    right, total = defaultdict(int), defaultdict(int)
    for index in torch.arange(len(scenes)).split(32):
        batch = [eval_segments(scenes[i], scene_rng(split, i, "eval")) for i in index.tolist()]
        packed = pack(batch)
        wrong = torch.zeros_like(packed.labels, dtype=torch.bool)
        wanted = packed.labels != IGNORE
        predicted = packed_logits(model, packed, features[index].float()).argmax(-1)
        wrong[wanted] = predicted != packed.labels[wanted]
        for row, segments in enumerate(batch):
            for number, segment in enumerate(segments):
                total[segment.kind] += 1
                right[segment.kind] += not wrong[row, packed.group[row] == number + 2].any()
    return {kind: round(right[kind] / total[kind], 4) for kind in total}


def report(scores: dict[str, float]) -> dict[str, object]:
    """The scores with the mean over the six core kinds and over all nine."""
    mean = {
        "core6": round(sum(scores[k] for k in CORE_KINDS) / len(CORE_KINDS), 4),
        "all9": round(sum(scores[k] for k in KINDS) / len(KINDS), 4),
    }
    return {**mean, **scores}


def train_language(
    model: LlavaForConditionalGeneration, train: Pictures, dev: Pictures, args: argparse.Namespace
) -> None:
    """Stage 2, batch 32 images."""
    train_features, dev_features = all_features(model, train), all_features(model, dev)
    language = [model.model.language_model, model.model.multi_modal_projector]
    schedule = constant_then_linear(args.steps, warmup=40, decay_from=0.4)
    optimizers = Optimizers(language, muon=0.02, adamw=3e-3, schedule=schedule)
    rng, start = random.Random(args.seed), time.process_time()
    for step in range(args.steps):
        index = torch.randint(len(train.scenes), (32,))
        packed = pack([segments_of(train.scenes[i], rng) for i in index.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = packed_logits(model, packed, train_features[index])
        loss = functional.cross_entropy(logits.float(), packed.labels[packed.labels != IGNORE])
        optimizers.step(loss)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            scores = report(exact_match(model, dev.scenes[:200], dev_features, "dev"))
            seconds = round(time.process_time() - start)
            log(args.log, stage="language", step=step + 1, cpu_seconds=seconds, loss=round(loss.item(), 4), **scores)
            if args.preliminary is not None:
                save(model, args.preliminary)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Everything that AutoModelForImageTextToText and AutoProcessor load."""
    save_half(model, folder)
    build_processor().save_pretrained(folder)


def main() -> None:
    """Train, report on dev and test, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo-llava", help="folder to write")
    parser.add_argument("--preliminary", type=Path, help="folder for a checkpoint at every evaluation")
    parser.add_argument("--log", type=Path, help="file to append one JSON line per evaluation to")
    parser.add_argument("--scenes", type=int, default=24000, help="training scenes")
    parser.add_argument("--tower-steps", type=int, default=750)
    parser.add_argument("--steps", type=int, default=3600, help="of stage 2")
    parser.add_argument("--every", type=int, default=300, help="steps between evaluations on dev")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, dev, test = draw("base", args.scenes, MAX_NOISE), draw("dev", 500), draw("test", 1000)
    model = build_model()
    model.set_attn_implementation("eager")  # a quarter faster than sdpa here: masked sdpa has a slow CPU backward
    train_tower(model, train, dev, args)
    train_language(model, train, dev, args)
    save(model, args.out)
    for split, pictures in (("dev", dev), ("test", test)):
        scores = exact_match(model, pictures.scenes, all_features(model, pictures), split)
        log(args.log, stage="final", split=split, **report(scores))


if __name__ == "__main__":
    main()
