"""`Family`: how a test builds one model and feeds it; the samples that all families read.

Rows of it are in `zoo.py` (the few that run in every test) and in `families_*.py` (the long tail).

Models are made on the spot from a config, with random weights loud enough for an edit to be heard in the logits. All
families read the same `SAMPLES`; `batch` writes them down as a family wants them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PAD = 0

IMAGE = -1  # where a picture stands in a sample's prompt


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer as token numbers below 30 and pictures."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


SAMPLES = (
    Sample((5, 8, IMAGE, 11, 12, 13, 14, 15, 16), (20, 21)),
    Sample((6, 17, 18, 9), (22, 23, 24)),
    Sample((7, IMAGE, 10, IMAGE, 19, 25, 26), (27,)),
)
TEXT_ONLY = (SAMPLES[1], Sample((5, 11, 12, 13, 14, 15), (20, 21)))
WITH_IMAGES = (SAMPLES[0], SAMPLES[2])
# A text and a picture each, for dual encoders; 29 is larger than the end id of some.
PAIRS = (
    Sample((5, IMAGE, 8, 29, 11, 12, 13), ()),
    Sample((6, IMAGE, 17, 18), ()),
    Sample((7, IMAGE, 10, 19, 29, 25), ()),
)


@dataclass(frozen=True)
class Token:
    """One token of a row, as the plain reimplementation of the position language below sees it."""

    index: int
    is_image: bool
    is_answer: bool


@dataclass(frozen=True)
class Family:
    """One row: how to build a model and what to feed it.

    build: makes the model, the same every time. text, text_encoder, vision: the paths of the blocks; `text` is the
    decoder's where there are two. media: turns pictures (their numbers) into keyword arguments. image_tokens: the ids
    that stand for one picture in the text. image_id: which of them is replaced by features. vision_tokens: tokens of a
    picture in the tower, class tokens included; num_cls: how many of them are class tokens, in front unless cls_last.
    grid: rows and columns of the patches of one picture (patch_pixels wide and high). states: how the tower's blocks
    hold their states: "rows" (a row a picture), "packed" (all pictures in one row), "tiles" (several rows a picture) or
    "spatial" (B, H, W, D). first_id: added to a sample's numbers, so that they avoid special ids. end_ids: ids behind
    each prompt. position_ids: whether to say them, for a model that would count pads. extra: makes further arguments
    from the batch. write: makes the whole batch instead (samples, side, answer, more_pads). samples: what one batch can
    hold. vision_positions: what can be asked of its tower, where that is not the usual. takes_fullgraph: whether the
    base alone compiles without a graph break. refused: why sites cannot be edited, as patterns of the message. skips:
    laws that the base itself breaks, with what was seen.
    """

    name: str
    build: Callable[[], Any]
    text: str = ""
    vision: str = ""
    media: Callable[[Sequence[int]], dict[str, Tensor]] | None = None
    image_tokens: tuple[int, ...] = ()
    image_id: int = -1
    vision_tokens: int = 0
    num_cls: int = 0
    cls_last: bool = False
    grid: tuple[int, int] | None = None
    patch_pixels: int = 14
    states: str = "rows"
    first_id: int = 0
    end_ids: tuple[int, ...] = ()
    position_ids: bool = False
    extra: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    write: Callable[[Sequence[Sample], str, bool, int], dict[str, Tensor]] | None = None
    samples: tuple[Sample, ...] = SAMPLES
    text_encoder: str = ""
    vision_positions: tuple[str, ...] = ()
    takes_fullgraph: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    skips: Mapping[str, str] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether the tower runs all pictures as one row."""
        return self.states == "packed"

    def __str__(self) -> str:
        """Name it in test ids."""
        return self.name

    @property
    def has_image(self) -> bool:
        """Whether it takes pictures."""
        return self.media is not None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites it must be found to have."""
        found = {"text": self.text, "text_encoder": self.text_encoder, "vision": self.vision}
        has_connector = self.image_id >= 0 and "connector" not in self.refused
        return (*(name for name, path in found.items() if path), *(("connector",) if has_connector else ()))

    def generation(self, num_tokens: int = 4, **more: Any) -> dict[str, Any]:
        """Return greedy arguments of `generate`; an image token must not be generated, no picture goes with it."""
        banned = {"suppress_tokens": sorted(set(self.image_tokens))} if self.has_image else {}
        return {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": PAD, **banned, **more}

    def blocks(self, model: nn.Module, site: str) -> Sequence[torch.nn.Module]:
        """Return the blocks of a site by their written path, not by the library's search."""
        paths = {"vision": self.vision, "text_encoder": self.text_encoder, "connector": self.text_encoder or self.text}
        return list(model.get_submodule(paths.get(site, self.text)).children())

    def prompt_ids(self, sample: Sample) -> list[int]:
        """Return the ids of a sample's prompt."""
        ids: list[int] = []
        for token in sample.prompt:
            ids += (self.image_tokens if self.has_image else ()) if token == IMAGE else (token + self.first_id,)
        return ids + list(self.end_ids)

    def answer_ids(self, sample: Sample) -> list[int]:
        """Return the ids of a sample's answer."""
        return [token + self.first_id for token in sample.answer]

    def tokens(self, sample: Sample, *, answer: bool = True) -> list[Token]:
        """Return what each token of a sample is, counted from its first one."""
        prompt = self.prompt_ids(sample)
        ids = prompt + (self.answer_ids(sample) if answer else [])
        return [Token(i, token_id == self.image_id, i >= len(prompt)) for i, token_id in enumerate(ids)]

    def pictures(self, samples: Sequence[Sample]) -> list[int]:
        """Return a number for each picture of the samples; the same sample has the same pictures in any batch."""
        return [
            31 * sample.prompt[0] + place
            for sample in samples
            for place, token in enumerate(sample.prompt)
            if token == IMAGE and self.has_image
        ]

    def batch(
        self, samples: Sequence[Sample], *, side: str = "right", answer: bool = True, more_pads: int = 0
    ) -> dict[str, Tensor]:
        """Write samples down as the model's arguments; with `answer`, its labels too."""
        if self.write is not None:
            return self.write(samples, side, answer, more_pads)
        rows = [self.prompt_ids(s) + (self.answer_ids(s) if answer else []) for s in samples]
        labels = [[-100] * len(self.prompt_ids(s)) + self.answer_ids(s) for s in samples]
        width = max(map(len, rows)) + more_pads

        def pad(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            fills = [[fill] * (width - len(row)) for row in values]
            pairs = zip(values, fills, strict=True)
            return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for row, f in pairs])

        made = {"input_ids": pad(rows, PAD), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
        if answer:
            made["labels"] = pad(labels, -100)
        if self.position_ids:
            made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if self.media is not None and (pictures := self.pictures(samples)):
            made |= self.media(pictures)
        return made | (self.extra(made) if self.extra is not None else {})


def loud(model: nn.Module) -> Any:
    """Redraw all weights so that states stay of order one and no gate is shut."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                is_table = any(word in name for word in ("embed", "wte", "wpe"))
                parameter.copy_(noise * parameter[0].numel() ** (-0.25 if is_table else -0.5))
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def llama_sizes(**more: Any) -> dict[str, Any]:
    return {
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None},
        **more,
    }


def noise(picture: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(picture))


def pixels(size: int) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    return lambda pictures: {"pixel_values": torch.stack([noise(picture, 3, size, size) for picture in pictures])}
