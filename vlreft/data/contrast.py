"""Dual encoders (CLIP, SigLIP and their like): batches of pairs or of classes, their losses, zero-shot.

What `ReftTrainer` needs for models that compare pictures with texts, transformers' and open_clip's alike:

    collator = ClassCollator(preprocess, tokenizer, classes=names, templates=["a photo of a {}"])
    ReftTrainer(model=model, data_collator=collator, compute_loss_func=collator.loss, ...)

Under a trainer that is no `ReftTrainer` set `remove_unused_columns=False`, and `label_names=["labels"]` to evaluate.

Legend: B pictures and N texts of a batch, C classes, E width of the space that both encoders share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import ProcessorMixin
from transformers.utils.generic import ModelOutput

from vlreft.data.samples import open_image

Row = Mapping[str, Any]
Preprocess = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]
UNLIMITED = 100_000  # tokens; tokenizers that know no maximum length say 1e30


class PairCollator:
    """Turn rows of a picture and its text into batches for a contrastive loss.

    A row has `image` (a PIL image or a path) and `text` or `caption`. Texts that occur twice in a batch count as wrong
    for each other's pictures. Raises: ValueError, naming the row.
    """

    def __init__(
        self,
        preprocess: Preprocess | ProcessorMixin,
        tokenize: Tokenize | None = None,
        *,
        padding: Literal["max_length", "longest"] = "max_length",
    ) -> None:
        """Take open_clip's `preprocess` and `get_tokenizer(...)`, or a transformers processor alone.

        `padding` is for processors: "longest" is faster and gives the same where the model masks the padding (CLIP
        does, SigLIP does not).
        """
        self._encoder = _encoder(preprocess, tokenize, padding)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch: `image` and `text`, or what a transformers model takes; `labels` say which text is whose."""
        named = list(_named(rows))
        texts = [_text_of(row, name) for row, name in named]
        images = self._encoder.images([_image_of(row, name, "`text`") for row, name in named])
        own_loss = {"return_loss": True} if isinstance(self._encoder, _Processor) else {}
        return {**images, **self._encoder.texts(texts), **own_loss, "labels": torch.arange(len(texts))}

    def pictures(self, rows: Sequence[Row], first: int | None = None) -> dict[str, Tensor]:
        """Make the pictures' part of a batch alone; errors count from `first` where it is given."""
        return self._encoder.images([_image_of(row, name, "`text`") for row, name in _named(rows, first)])

    def texts(self, rows: Sequence[Row], first: int | None = None) -> dict[str, Tensor]:
        """Make the texts' part of a batch alone."""
        return self._encoder.texts([_text_of(row, name) for row, name in _named(rows, first)])

    @staticmethod
    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute `contrastive_loss`, for `compute_loss_func`."""
        return contrastive_loss(outputs, labels, num_items_in_batch)


class ClassCollator:
    """Turn rows of a picture and its class into batches for few-shot classification, prompts of all classes included.

    A row has `image` (a PIL image or a path) and `label`, an index into `classes`. Not for models that want a text for
    each picture, as CoCa does for its decoder. Raises: ValueError, naming the row.
    """

    def __init__(
        self,
        preprocess: Preprocess | ProcessorMixin,
        tokenize: Tokenize | None = None,
        *,
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}",),
        padding: Literal["max_length", "longest"] = "max_length",
    ) -> None:
        """Take what `PairCollator` takes, and the classes' names; `{}` in a template stands for the name."""
        _check_classes(classes)
        _check_templates(templates)
        self.classes, self.templates = tuple(classes), tuple(templates)
        self._encoder = _encoder(preprocess, tokenize, padding)
        texts = [template.replace("{}", name) for name in self.classes for template in self.templates]
        self._prompts = self._encoder.texts(texts)
        _check_prompts(self._prompts["text" if "text" in self._prompts else "input_ids"], self.classes)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch: the pictures, all prompts (N = classes x templates, those of a class together), `labels`."""
        labels = [_label_of(row, name, len(self.classes)) for row, name in _named(rows)]
        return {**self.pictures(rows), **self._prompts, "labels": torch.tensor(labels)}

    def pictures(self, rows: Sequence[Row], first: int | None = None) -> dict[str, Tensor]:
        """Make the pictures' part of a batch alone; errors count from `first` where it is given."""
        return self._encoder.images([_image_of(row, name, "`label`") for row, name in _named(rows, first)])

    def prompts(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the prompts' part, at most `size` texts at a time."""
        num_texts = len(self.classes) * len(self.templates)
        for start in range(0, num_texts, size):
            yield {key: value[start : start + size] for key, value in self._prompts.items()}

    def class_vectors(self, text_NE: Tensor) -> Tensor:
        """Average each class's unit text vectors over the templates, to unit vectors again (C, E)."""
        mean_CE = text_NE.unflatten(0, (len(self.classes), len(self.templates))).mean(1)
        return functional.normalize(mean_CE, dim=-1)

    def logits(self, outputs: Any) -> Tensor:
        """Give the class logits (B, C) of a model's outputs for a batch: scaled cosines, as in zero-shot."""
        image_BE, text_NE, scale = _compared(outputs)
        return scale * image_BE @ self.class_vectors(text_NE).T

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the cross entropy of the right classes, for `compute_loss_func`."""
        total = functional.cross_entropy(self.logits(outputs), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def contrastive_loss(
    outputs: Any,
    labels: Tensor | None = None,  # noqa: ARG001 (transformers.Trainer passes them)
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Compute the loss that the model was made for: transformers models' own, open_clip's otherwise.

    Sigmoid loss where the model has a logit bias, softmax both ways elsewhere. `labels` are not read: text i is
    picture i's. Under torch.distributed open_clip models contrast with the pairs of all processes; transformers'
    own losses stay within one. Raises: ValueError for a single pair, or outputs that hold no loss.
    """
    image_BE, text_NE, scale = _compared(outputs)
    num_pairs = len(image_BE)
    if num_pairs < 2:
        raise ValueError(
            "a batch of 1 pair has nothing to contrast with; raise the batch size, or set `dataloader_drop_last=True` "
            "if it is the rest of an epoch"
        )
    if len(text_NE) != num_pairs:
        raise ValueError(
            f"a contrastive loss needs a text for each picture, got {len(text_NE)} texts for {num_pairs} pictures; "
            "batches of a `ClassCollator` go with its own `loss`"
        )
    if isinstance(outputs, ModelOutput):
        mean = outputs.get("loss")
        if mean is None:
            raise ValueError("these outputs hold no loss; call the model with `return_loss=True` (`PairCollator` does)")
    else:
        mean = _open_clip_loss(image_BE, text_NE, scale, _bias(outputs))
    return mean if num_items_in_batch is None else mean * num_pairs / num_items_in_batch


class ZeroShot(NamedTuple):
    """What `zero_shot` found: logits (B, C), and the rows' labels (B) if they have any."""

    logits_BC: Tensor
    labels_B: Tensor | None

    @property
    def predictions(self) -> Tensor:
        """The likeliest class of each picture."""
        return self.logits_BC.argmax(-1)

    @property
    def accuracy(self) -> float:
        """The share of pictures whose likeliest class is the right one. Raises ValueError if there are no labels."""
        if self.labels_B is None:
            raise ValueError("the rows have no `label`, so there is no accuracy; read `predictions`")
        return (self.predictions == self.labels_B).float().mean().item()


def zero_shot(model: nn.Module, rows: Any, collator: ClassCollator, *, batch_size: int = 64) -> ZeroShot:
    """Classify the rows' pictures, interventions included; `label` may be absent. Results are on the CPU.

    Prompts are encoded once. rows: anything with a length and rows by index. Raises: ValueError, naming the row.
    """
    if not len(rows):
        raise ValueError("`rows` (=[]) must hold at least one row")
    was_training, device = model.training, next(model.parameters()).device

    def compare(*parts: Mapping[str, Tensor]) -> _Compared:
        return _compared(model(**{key: value.to(device) for part in parts for key, value in part.items()}))

    model.eval()
    try:
        with torch.no_grad():
            # Through the whole forward, with one picture or one prompt for company: interventions see every call, and
            # not all models have functions for one side.
            picture, prompt = collator.pictures([rows[0]], 0), next(collator.prompts(1))
            texts = [compare(picture, part) for part in collator.prompts(max(2, batch_size))]
            classes_CE = collator.class_vectors(torch.cat([part.text_NE for part in texts]))
            scale = torch.stack([part.scale for part in texts]).amax()
            logits, labels = [], []
            for start in range(0, len(rows), batch_size):
                batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
                image_BE = compare(collator.pictures(batch, start), prompt).image_BE
                labels += [row.get("label") for row in batch]
                logits.append((scale * image_BE @ classes_CE.T).cpu())
    finally:
        model.train(was_training)
    if all(label is None for label in labels):
        return ZeroShot(torch.cat(logits), None)
    named = [({"label": label}, f"row {place}") for place, label in enumerate(labels)]
    checked = [_label_of(row, name, len(collator.classes)) for row, name in named]
    return ZeroShot(torch.cat(logits), torch.tensor(checked))


def embed_pairs(
    model: nn.Module, pictures: Any, texts: Any, collator: PairCollator, *, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Embed pictures and texts, interventions included, as unit vectors (I, E) and (N, E) on the CPU.

    pictures, texts: rows for `collator`, by index and with a length; not as many of one as of the other need be there.
    Raises: ValueError, naming the row.
    """
    if not len(pictures) or not len(texts):
        raise ValueError(f"there must be pictures and texts; got {len(pictures)} and {len(texts)}")
    was_training, device = model.training, next(model.parameters()).device

    def chunks(rows: Any) -> Iterator[tuple[int, list[Row]]]:
        for start in range(0, len(rows), batch_size):
            yield start, [rows[index] for index in range(start, min(start + batch_size, len(rows)))]

    def compare(*parts: Mapping[str, Tensor]) -> _Compared:
        return _compared(model(**{key: value.to(device) for part in parts for key, value in part.items()}))

    model.eval()
    try:
        with torch.no_grad():  # through the whole forward, as in `zero_shot`
            picture, text = collator.pictures([pictures[0]], 0), collator.texts([texts[0]], 0)
            image_IE = [compare(collator.pictures(rows, at), text).image_BE.cpu() for at, rows in chunks(pictures)]
            text_NE = [compare(picture, collator.texts(rows, at)).text_NE.cpu() for at, rows in chunks(texts)]
    finally:
        model.train(was_training)
    return torch.cat(image_IE), torch.cat(text_NE)


# What a model returns ------------------------------------------------------------------------------------------------


class _Compared(NamedTuple):
    image_BE: Tensor  # unit vectors
    text_NE: Tensor  # unit vectors
    scale: Tensor  # of the cosines, a scalar


def _compared(outputs: Any) -> _Compared:
    """Read the outputs of a dual encoder: transformers' class, open_clip's dict or tuple."""
    image = text = logits_BN = scale = None
    if isinstance(outputs, ModelOutput):
        image, text, logits_BN = (outputs.get(key) for key in ("image_embeds", "text_embeds", "logits_per_image"))
    elif isinstance(outputs, Mapping):
        image, text, scale = (outputs.get(key) for key in ("image_features", "text_features", "logit_scale"))
    elif isinstance(outputs, Sequence) and len(outputs) >= 3:
        image, text, scale = outputs[:3]
    if image is None or text is None or (logits_BN is None and scale is None):
        raise ValueError(
            f"these outputs (a {type(outputs).__name__}) are not those of a dual encoder of pictures and texts, as "
            "CLIP or SigLIP"
        )
    image_BE = functional.normalize(image.float(), dim=-1)
    text_NE = functional.normalize(text.float(), dim=-1)
    if logits_BN is not None:
        scale = _scale(logits_BN.detach().float(), (image_BE @ text_NE.T).detach())
    assert scale is not None
    return _Compared(image_BE, text_NE, scale.float().reshape(()))


def _scale(logits_BN: Tensor, cosines_BN: Tensor) -> Tensor:
    """Recover the scale from logits that are scale * cosine + bias: outputs do not hold it, models name it variously.

    Where all cosines are the same there is no telling, and the result is 0.
    """
    spread = cosines_BN.amax() - cosines_BN.amin()
    return (logits_BN.amax() - logits_BN.amin()) / spread.clamp_min(1e-6)


def _bias(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get("logit_bias")
    return outputs[3] if len(outputs) > 3 else None


def _open_clip_loss(image_BE: Tensor, text_NE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from open_clip.loss import ClipLoss, SigLipLoss

    rank, world_size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if bias is not None:
        return SigLipLoss(rank=rank, world_size=world_size)(image_BE, text_NE, scale, bias)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    return loss(image_BE, text_NE, scale)


# What a model takes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenClip:
    preprocess: Preprocess
    tokenize: Tokenize

    def images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return {"image": torch.stack([self.preprocess(image) for image in images])}

    def texts(self, texts: list[str]) -> dict[str, Tensor]:
        return {"text": self.tokenize(texts)}


@dataclass(frozen=True)
class _Processor:
    processor: Any  # a ProcessorMixin; what its subclasses take when called is not in its type
    padding: str

    def images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor(images=images, return_tensors="pt"))

    def texts(self, texts: list[str]) -> dict[str, Tensor]:
        longest = self.processor.tokenizer.model_max_length
        limit = {"max_length": longest} if longest < UNLIMITED else {}
        return dict(self.processor(text=texts, padding=self.padding, truncation=True, return_tensors="pt", **limit))


def _encoder(
    preprocess: Preprocess | ProcessorMixin, tokenize: Tokenize | None, padding: str
) -> "_OpenClip | _Processor":
    if padding not in ("max_length", "longest"):
        raise ValueError(f"`padding` (={padding!r}) must be 'max_length' or 'longest'")
    if isinstance(preprocess, ProcessorMixin):
        if tokenize is not None:
            raise ValueError("a processor has its own tokenizer; leave `tokenize` out")
        return _Processor(preprocess, padding)
    if tokenize is None:
        raise ValueError(
            f"`preprocess` (a {type(preprocess).__name__}) is no transformers processor, so `tokenize` must be given; "
            "for open_clip models it is `open_clip.get_tokenizer(name)`"
        )
    return _OpenClip(preprocess, tokenize)


# Rows and classes ----------------------------------------------------------------------------------------------------


def _named(rows: Sequence[Row], first: int | None = None) -> Iterator[tuple[Row, str]]:
    """Yield each row with what errors call it."""
    if not len(rows):
        raise ValueError("a batch must have at least one row")
    for place, row in enumerate(rows):
        name = f"row {place} of the batch" if first is None else f"row {first + place}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{name} (a {type(row).__name__}) must be a mapping with an `image`")
        yield row, name


def _image_of(row: Row, name: str, other: str) -> Image.Image:
    if row.get("image") is None:
        raise ValueError(
            f"{name} has the keys {sorted(map(str, row))} and no image; expected `image` and {other}. Under "
            "transformers.Trainer set remove_unused_columns=False"
        )
    return open_image(row["image"], name)


def _text_of(row: Row, name: str) -> str:
    text = row.get("text", row.get("caption"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{name} has the text {text!r}; under `text` or `caption` there must be one, and not empty. Under "
            "transformers.Trainer set remove_unused_columns=False"
        )
    return text


def _label_of(row: Row, name: str, num_classes: int) -> int:
    label = row.get("label")
    if isinstance(label, Integral) and not isinstance(label, bool) and int(label) in range(num_classes):
        return int(label)
    raise ValueError(
        f"{name} has the label {label!r}; it must be a whole number from 0 to {num_classes - 1}, the class's place in "
        "`classes`"
    )


def _check_classes(classes: Sequence[str]) -> None:
    if isinstance(classes, str) or len(classes) < 2:
        raise ValueError(f"`classes` (={classes!r}) must be a list of at least two names")
    for place, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`classes` has {name!r} at place {place}; it must be a name, and not empty")
        if name in classes[:place]:
            raise ValueError(f"`classes` has {name!r} twice, so the two could never be told apart; rename one")


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str) or not len(templates):
        raise ValueError(f"`templates` (={templates!r}) must be a list of at least one text, as ['a photo of a {{}}']")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"`templates` has {template!r}; put {{}} where the class's name goes, once")


def _check_prompts(ids: Tensor, classes: Sequence[str]) -> None:
    """Refuse classes whose prompts are the same once tokenised: unknown words, or the name cut off."""
    seen: dict[tuple[int, ...], str] = {}
    for name, block in zip(classes, ids.reshape(len(classes), -1).tolist(), strict=True):
        other = seen.setdefault(tuple(block), name)
        if other != name:
            raise ValueError(
                f"`classes` {other!r} and {name!r} give the same tokens in every template: the tokenizer does not know "
                "the words, or cuts the text before them; rename one, or shorten the templates"
            )
