"""Train assets/demo-clip, a dual encoder in open_clip's layout, starting from the vision tower of assets/demo-llava.

Run: python assets/train_clip.py            (one CPU thread; see assets/README.md for the minutes it took)

Seven in ten pictures show one object, told as `a red circle` in one of several wordings, with or without its size; the
others show up to four, told in full. A text fits other pictures of its batch as well, as there are not many things to
tell: such pairs are left out of the loss rather than pushed apart.

Shapes: B pictures and as many texts, T tokens of a text, C classes.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from common import SPECIAL_IDS, TOKEN_IDS, build_tokenizer, constant_then_linear, log
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from world import COLORS, IMAGE_SIZE, SHAPES, VOCABULARY, Scene, Thing, caption, make_scene, render, scene_rng

CONTEXT = 24  # tokens; the longest caption has 21
MAX_NOISE = 4.0  # grey levels; training pictures get 0 to this much
MAX_SCALE = math.log(100)  # of the logits, as CLIP bounds it
TEMPLATES = ("a {}", "the {}", "a picture of a {}", "an image of a {}", "there is a {} in the picture")
CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

MODEL = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "width": 128,
        "head_width": 32,
        "layers": 4,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": len(VOCABULARY),
        "hf_tokenizer_name": "demo-clip",  # that there is a name is what counts: `local-dir:` reads its own folder
        "width": 128,
        "heads": 4,
        "layers": 3,
        "mlp_ratio": 3.0,
        "pool_type": "eos",
        "eos_id": SPECIAL_IDS["eos_token_id"],
        "pad_id": SPECIAL_IDS["pad_token_id"],
    },
}
PREPROCESSING = {"size": IMAGE_SIZE, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


# ---------------------------------------------------------------------------------------------------------------
# Model and tokenizer


def build_model(llava: Path) -> open_clip.CLIP:
    """A CLIP of 1.25 million parameters: its tower's blocks are those of demo-llava, the rest is random."""
    sizes = {name: value for name, value in MODEL["text_cfg"].items() if name != "hf_tokenizer_name"}
    model = open_clip.CLIP(
        MODEL["embed_dim"], open_clip.CLIPVisionCfg(**MODEL["vision_cfg"]), open_clip.CLIPTextCfg(**sizes), True
    )
    missing, unexpected = model.visual.load_state_dict(tower_weights(llava), strict=False)
    assert not unexpected, unexpected
    # demo-llava reads the last block's output, so its last normalisation was never trained.
    assert set(missing) == {"proj", "ln_post.weight", "ln_post.bias"}, missing
    return model


def tower_weights(llava: Path) -> dict[str, torch.Tensor]:
    """demo-llava's tower under open_clip's names; queries, keys and values are one matrix there."""
    prefix = "vision_tower."
    stored = load_file(llava / "model.safetensors")
    old = {name.removeprefix(prefix): tensor.float() for name, tensor in stored.items() if name.startswith(prefix)}
    new = {
        "class_embedding": old["embeddings.class_embedding"],
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "conv1.weight": old["embeddings.patch_embedding.weight"],
    }
    for part in ("weight", "bias"):
        new[f"ln_pre.{part}"] = old[f"pre_layrnorm.{part}"]
        for layer in range(MODEL["vision_cfg"]["layers"]):
            there, here = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            qkv = [old[f"{there}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            new[f"{here}.attn.in_proj_{part}"] = torch.cat(qkv)
            new[f"{here}.attn.out_proj.{part}"] = old[f"{there}.self_attn.out_proj.{part}"]
            for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                new[f"{here}.{ours}.{part}"] = old[f"{there}.{theirs}.{part}"]
            for ours, theirs in (("c_fc", "fc1"), ("c_proj", "fc2")):
                new[f"{here}.mlp.{ours}.{part}"] = old[f"{there}.mlp.{theirs}.{part}"]
    return new


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the other demo models, with `<s>` and `</s>` around the text and padding behind it."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, TOKEN_IDS[name]) for name in ("<s>", "</s>")]
    )
    tokenizer.padding_side, tokenizer.model_max_length = "right", CONTEXT
    return tokenizer


def save(model: nn.Module, folder: Path) -> None:
    """Everything that `open_clip.create_model_and_transforms("local-dir:...")` loads; weights as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(half, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    clip_tokenizer().save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------
# Pictures and texts


def one_object(rng: random.Random) -> Scene:
    """A scene of one object, anywhere."""
    return (rng.choice(make_scene(rng)),)


@dataclass(frozen=True)
class Told:
    """A text and what it says: one (size or None, color, shape) for each object of the scene."""

    text: str
    things: tuple[tuple[str | None, str, str], ...]

    def fits(self, scene: Scene) -> bool:
        """Whether it is as true of `scene` as of the scene that it was told of."""
        return len(scene) == len(self.things) and all(
            size in (None, thing.size) and (color, shape) == (thing.color, thing.shape)
            for (size, color, shape), thing in zip(self.things, scene, strict=True)
        )


def tell(scene: Scene, rng: random.Random) -> Told:
    """One object in a random wording, without its size two times in three; several in full."""
    if len(scene) > 1:
        return Told(caption(scene), tuple((thing.size, thing.color, thing.shape) for thing in scene))
    thing: Thing = scene[0]
    size = thing.size if rng.random() < 1 / 3 else None
    words = f"{thing.color} {thing.shape}" if size is None else thing.phrase
    return Told(rng.choice(TEMPLATES).format(words), ((size, thing.color, thing.shape),))


def draw(split: str, number: int, one: float, max_noise: float = 0.0) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, a share of `one` with one object, and their pixels, uint8 of shape (N, 3, 64, 64)."""
    scenes, pixels = [], torch.empty(number, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for index in range(number):
        rng = scene_rng(f"clip-{split}", index)
        scenes.append(one_object(rng) if rng.random() < one else make_scene(rng))
        picture = render(scenes[-1], rng, noise=rng.uniform(0.0, max_noise))
        pixels[index] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return scenes, pixels


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as the preprocessing of the saved model gives them."""
    return pixels.float() / 127.5 - 1.0


# ---------------------------------------------------------------------------------------------------------------
# Training


def contrastive(logits_BB: torch.Tensor, also_BB: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, without the pairs off the diagonal that fit as well (True in `also_BB`)."""
    logits = logits_BB.masked_fill(also_BB, -torch.inf)
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def optimizers_of(model: nn.Module, muon: float, adamw: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    named = dict(model.named_parameters())
    matrices = {name for name, p in named.items() if p.ndim == 2 and ".resblocks." in name}
    rest = [p for name, p in named.items() if name not in matrices]
    return [
        torch.optim.Muon([named[name] for name in sorted(matrices)], lr=muon),
        torch.optim.AdamW(rest, lr=adamw, weight_decay=0.0),
    ]


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, scenes: Sequence[Scene], pixels: torch.Tensor, tokenize: object) -> float:
    """Share of one-object pictures whose colour and shape are both told right, of 32 classes."""
    model.eval()
    texts = [template.format(name) for name in CLASSES for template in TEMPLATES]
    features = model.encode_text(tokenize(texts), normalize=True).unflatten(0, (len(CLASSES), len(TEMPLATES)))
    classes = functional.normalize(features.mean(1), dim=-1)
    parts = [model.encode_image(normalised(part), normalize=True) @ classes.T for part in pixels.split(256)]
    told = torch.cat(parts).argmax(-1).tolist()
    model.train()
    return sum(CLASSES[i] == f"{s[0].color} {s[0].shape}" for i, s in zip(told, scenes, strict=True)) / len(scenes)


def train(model: open_clip.CLIP, args: argparse.Namespace) -> None:
    """Train for `args.steps` steps, and look at dev now and then."""
    tokenizer = clip_tokenizer()

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids

    scenes, pixels = draw("train", args.scenes, one=0.7, max_noise=MAX_NOISE)
    dev = draw("dev", 640, one=1.0)
    optimizers = optimizers_of(model, args.muon, args.adamw)
    schedule = constant_then_linear(args.steps, warmup=20, decay_from=0.4)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    rng, start = random.Random(args.seed), time.process_time()
    for step in range(args.steps):
        index = torch.randint(len(scenes), (args.batch_size,))
        chosen = [scenes[i] for i in index.tolist()]
        told = [tell(scene, rng) for scene in chosen]
        also = torch.tensor([[text.fits(scene) for text in told] for scene in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            images, texts, scale = model(normalised(pixels[index]), tokenize([text.text for text in told]))
        logits = scale * images.float() @ texts.float().T
        loss = contrastive(logits, also.fill_diagonal_(False))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_SCALE)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            accuracy, seconds = round(zero_shot(model, *dev, tokenize), 4), round(time.process_time() - start)
            log(args.log, step=step + 1, cpu_seconds=seconds, loss=round(loss.item(), 4), zero_shot=accuracy)
            if args.preliminary is not None:
                save(model, args.preliminary)


def main() -> None:
    """Train, save, load as a user would, report on test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "demo-clip", help="folder to write")
    parser.add_argument("--llava", type=Path, default=here / "demo-llava", help="folder of the model to start from")
    parser.add_argument("--preliminary", type=Path, help="folder for a checkpoint at every evaluation")
    parser.add_argument("--log", type=Path, help="file to append one JSON line per evaluation to")
    parser.add_argument("--scenes", type=int, default=16000, help="training scenes")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--muon", type=float, default=0.01, help="peak learning rate of Muon")
    parser.add_argument("--adamw", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations on dev")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = build_model(args.llava)
    train(model, args)
    save(model, args.out)
    name = f"local-dir:{args.out}"
    loaded, _, _ = open_clip.create_model_and_transforms(name)
    accuracy = zero_shot(loaded, *draw("test", 1280, one=1.0), open_clip.get_tokenizer(name))
    log(args.log, stage="final", split="test", zero_shot=round(accuracy, 4))


if __name__ == "__main__":
    main()
