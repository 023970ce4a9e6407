"""What the cells run on: models with random weights, batches, and trainers for the methods that are compared.

Shape suffixes: B = rows, L = tokens, D = hidden width. All sides of a cell share one base: the very same weights.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import vlreft
from vlreft.models.sites import find_sites
from vlreft.reuse.features import FeatureCache

PATCH = 14


@dataclass(frozen=True)
class Shape:
    """Sizes of a workload. A row is image tokens (a square number, 0 for a text-only Llama), question, answer.

    num_edited: how many of the last blocks are edited, of LoRA too; 0 for all of them.
    """

    width: int = 512
    num_layers: int = 8
    num_heads: int = 8
    intermediate: int = 1408
    vocabulary: int = 8192
    num_rows: int = 5
    num_image_tokens: int = 576
    num_question: int = 24
    num_answer: int = 6
    positions: str = "question:f4+l4"
    rank: int = 4
    num_edited: int = 0
    tower_width: int = 128
    tower_layers: int = 4
    tower_heads: int = 4
    head_width: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def layers(self) -> list[int]:
        """The edited blocks."""
        return list(range(self.num_layers - (self.num_edited or self.num_layers), self.num_layers))

    def config(self) -> vlreft.ReftConfig:
        """Return LoReFT at these positions."""
        edit = vlreft.Intervention("loreft", layers=self.layers, positions=self.positions, rank=self.rank)
        return vlreft.ReftConfig(edit)


@dataclass(frozen=True)
class Setup:
    """Where cells run. folder: for what trainers and checkpoints write; removed at the end."""

    device: torch.device
    folder: Path
    bases: dict[Shape, PreTrainedModel] = field(default_factory=dict)

    def base(self, shape: Shape) -> PreTrainedModel:
        """Return the frozen base, the last one again where only rows and edits differ: a 7B takes a while to make."""
        key = replace(shape, num_rows=1, num_question=1, num_answer=1, positions="", rank=1, num_edited=0)
        if key not in self.bases:
            self.bases.clear()
            self.bases[key] = build_base(shape, self.device)
        return self.bases[key].train()


# LLaVA-1.5-7B and its tower, CLIP ViT-L/14-336.
LLAVA_7B = Shape(
    width=4096, num_layers=32, num_heads=32, intermediate=11008, vocabulary=32064, tower_width=1024, tower_layers=24,
    tower_heads=16, dtype="bfloat16",
)  # fmt: skip
# Backbones whose MLP and head are cheap, so that what a method adds is seen; and shapes as they are used.
WORKLOADS: dict[str, Shape] = {
    "thin": Shape(
        intermediate=16, vocabulary=64, num_rows=2, num_image_tokens=0, num_question=96, num_answer=32,
        positions="f7+l7",
    ),
    "llava": Shape(),
    "llava-7b": LLAVA_7B,
    "llava-7b-dense": replace(LLAVA_7B, positions="image"),
    "llava-7b-generate": replace(LLAVA_7B, num_rows=8, num_answer=64),
    "llava-7b-questions": replace(LLAVA_7B, num_answer=8),
    "llava-7b-tokens": replace(LLAVA_7B, num_rows=2),
    "llava-7b-short": replace(LLAVA_7B, num_layers=8),  # compiling takes a minute for all of its blocks
    "llava-small": Shape(
        width=256, num_layers=4, num_heads=4, intermediate=704, vocabulary=1024, num_rows=2, tower_width=64,
        tower_layers=2,
    ),
    "orthonormal": Shape(width=2048, num_layers=16),
    "generate": Shape(num_rows=8, num_image_tokens=0, num_question=64, num_answer=64, positions="f7+l7"),
    # As wide as a 7B, with almost nothing else in it: what `attach` takes does not depend on the rest.
    "wide": Shape(
        width=4096, num_layers=32, num_heads=1, head_width=8, intermediate=16, vocabulary=64, num_image_tokens=0,
        num_rows=1, positions="f4+l4",
    ),
    "import": Shape(),
}  # fmt: skip
_TINY = Shape(
    width=32, num_layers=3, num_heads=2, intermediate=24, vocabulary=64, num_rows=2, num_image_tokens=36,
    num_question=8, num_answer=3, positions="question:f2+l2", rank=2, tower_width=16, tower_layers=2, tower_heads=2,
)  # fmt: skip
_TINY_TEXT = Shape(
    width=32, num_layers=3, num_heads=2, intermediate=24, vocabulary=64, num_rows=2, num_image_tokens=0,
    num_question=12, num_answer=4, positions="f2+l2", rank=2,
)  # fmt: skip
TINY: dict[str, Shape] = {
    name: _TINY if shape.num_image_tokens else _TINY_TEXT for name, shape in WORKLOADS.items()
}  # for tests: every cell in a moment

LORA_TARGETS = {"q,v": ("q_proj", "v_proj"), "wide": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")}


def build_base(shape: Shape, device: torch.device) -> PreTrainedModel:
    """Make the frozen base with random weights, the same every time."""
    torch.manual_seed(0)
    text = LlamaConfig(**text_settings(shape))
    dtype = getattr(torch, shape.dtype)
    with device:
        if not shape.num_image_tokens:
            model = AutoModelForCausalLM.from_config(text, dtype=dtype)
        else:
            tower = CLIPVisionConfig(
                hidden_size=shape.tower_width,
                intermediate_size=4 * shape.tower_width,
                num_hidden_layers=shape.tower_layers,
                num_attention_heads=shape.tower_heads,
                image_size=PATCH * _side(shape),
                patch_size=PATCH,
            )
            image_id: dict[str, Any] = {"image_token_id": shape.vocabulary - 1}  # its name as an attribute
            config = LlavaConfig(vision_config=tower, text_config=text, tie_word_embeddings=False, **image_id)
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def text_settings(shape: Shape) -> dict[str, Any]:
    """Return the arguments of the language model's `LlamaConfig`."""
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "head_dim": shape.head_width or shape.width // shape.num_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def shared(base: PreTrainedModel) -> Any:
    """Return another model of the same weights: modules of its own, the very same tensors."""
    tensors = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, tensors)


def make_batch(shape: Shape, device: torch.device, *, one_image: bool = False) -> dict[str, Tensor]:
    """Make a training batch without padding: images all different, or all the same.

    Returns input_ids, attention_mask, labels (-100 but on the answer), all BL, and pixel_values.
    """
    generator = torch.Generator().manual_seed(1)
    num_text = shape.num_question + shape.num_answer
    ids_BL = torch.randint(1, shape.vocabulary - 1, (shape.num_rows, num_text), generator=generator)
    batch: dict[str, Tensor] = {}
    if shape.num_image_tokens:
        image_BL = torch.full((shape.num_rows, shape.num_image_tokens), shape.vocabulary - 1)
        ids_BL = torch.cat([image_BL, ids_BL], 1)
        size = PATCH * _side(shape)
        pixels = torch.randn(1 if one_image else shape.num_rows, 3, size, size, generator=generator)
        batch["pixel_values"] = pixels.expand(shape.num_rows, -1, -1, -1).to(getattr(torch, shape.dtype))
    labels_BL = ids_BL.clone()
    labels_BL[:, : -shape.num_answer] = -100
    batch |= {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), "labels": labels_BL}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_prompts(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Make left-padded prompts, questions the shortest of which is a little over half as long as the longest.

    Where there are image tokens, they come first, and `pixel_values` is a picture for each row.
    """
    generator = torch.Generator().manual_seed(2)
    ids_BL = torch.randint(1, shape.vocabulary - 1, (shape.num_rows, shape.num_question), generator=generator)
    padding_B = torch.linspace(shape.num_question // 2 - 1, 0, shape.num_rows).long()
    mask_BL = (torch.arange(shape.num_question + shape.num_image_tokens) >= padding_B[:, None]).long()
    prompts: dict[str, Tensor] = {"attention_mask": mask_BL}
    if shape.num_image_tokens:
        place_BL = torch.arange(mask_BL.shape[1]) - padding_B[:, None]
        is_image_BL = (place_BL >= 0) & (place_BL < shape.num_image_tokens)
        ids_BL = F.pad(ids_BL, (shape.num_image_tokens, 0)).where(~is_image_BL, shape.vocabulary - 1)
        size = PATCH * _side(shape)
        pixels = torch.randn(shape.num_rows, 3, size, size, generator=generator)
        prompts["pixel_values"] = pixels.to(getattr(torch, shape.dtype))
    prompts["input_ids"] = ids_BL * mask_BL
    return {name: tensor.to(device) for name, tensor in prompts.items()}


def greedy(num_tokens: int) -> GenerationConfig:
    """Return settings that generate exactly this many tokens."""
    return GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)


def only_where_labels_are(batch: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Return the batch with logits for the answer alone, as a careful user of LoRA would ask for them."""
    keep = shape.num_answer + 1  # the last prompt token predicts the first answer token
    return {**batch, "labels": batch["labels"][:, -keep:], "logits_to_keep": keep}


# Methods -------------------------------------------------------------------------------------------------------------


class Steps:
    """Training steps as users run them: `trainer.training_step` on a prepared batch, forward and backward.

    The optimizer takes no step, and `forget`, which is not timed, drops the gradients: losses stay those of the start.
    """

    def __init__(self, trainer: Trainer, batch: dict[str, Any]) -> None:
        self.trainer = trainer
        self.batch = batch
        assert trainer.model is not None
        self.model: nn.Module = trainer.model
        self.scopes = ExitStack()
        trainer.current_gradient_accumulation_steps = 1  # `train` would set it

    def with_features(self) -> "Steps":
        """Answer for the vision tower from a feature cache from now on, as `with cache.on(model): trainer.train()`."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.scopes.enter_context(FeatureCache("2GB").on(model))
        return self

    def step(self) -> Tensor:
        """Run forward and backward; return the loss."""
        return self.trainer.training_step(self.model, dict(self.batch))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Compute the loss alone, without a graph."""
        loss = self.trainer.compute_loss(self.model, dict(self.batch))
        assert isinstance(loss, Tensor)
        return loss

    def forget(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)


def reft_steps(
    setup: Setup, base: PreTrainedModel, shape: Shape, batch: dict[str, Any], options: Mapping[str, Any]
) -> Steps:
    """LoReFT under `vlreft.ReftTrainer`, with these options of it."""
    model = shared(base)
    torch.manual_seed(3)
    vlreft.attach(model, shape.config())
    return Steps(vlreft.ReftTrainer(model, _arguments(setup), **options), batch)


def lora_steps(
    setup: Setup, base: PreTrainedModel, shape: Shape, batch: dict[str, Any], rank: int = 8, where: str = "q,v"
) -> Steps:
    """Peft LoRA on the language model under `transformers.Trainer`."""
    return Steps(Trainer(lora_model(shared(base), shape, rank, where), _arguments(setup)), batch)


def lora_model(model: Any, shape: Shape, rank: int = 8, where: str = "q,v") -> Any:
    """Wrap a model in peft's LoRA: its language model, in the blocks that LoReFT edits."""
    layers, names = "|".join(map(str, shape.layers)), "|".join(LORA_TARGETS[where])
    prefix = r".*language_model\.layers" if shape.num_image_tokens else r"model\.layers"
    target = rf"{prefix}\.({layers})\..*\.({names})"
    torch.manual_seed(3)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def floor_steps(setup: Setup, base: PreTrainedModel, shape: Shape, batch: dict[str, Any]) -> Steps:
    """The base alone, where gradient merely flows to the output of the first edited block."""
    model = shared(base)
    leaf_D = nn.Parameter(torch.zeros(shape.width, dtype=base.dtype, device=base.device))
    model.register_parameter("floor", leaf_D)

    def let_gradient_begin(_module: nn.Module, _args: Any, h_BLD: Tensor) -> Tensor:
        return h_BLD + leaf_D

    find_sites(model)["text"].blocks[shape.layers[0]].register_forward_hook(let_gradient_begin)
    return Steps(Trainer(model, _arguments(setup)), batch)


def _arguments(setup: Setup) -> TrainingArguments:
    return TrainingArguments(
        str(setup.folder / "trainer"),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=setup.device.type == "cpu",
    )


def _side(shape: Shape) -> int:
    side = round(shape.num_image_tokens**0.5)
    if side * side != shape.num_image_tokens:
        raise ValueError(f"`num_image_tokens` (={shape.num_image_tokens}) must be a square number: a picture is square")
    return side
