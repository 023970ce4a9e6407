"""`Setup`: a frozen base for one kind of task: which of its classes is loaded, how rows are learnt, how answered."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import open_clip
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tasks.metrics.ranking import rankings
from tasks.metrics.score import Row
from tasks.task import Task, column, texts_of
from vlreft import ClassCollator, Collator, PairCollator, zero_shot
from vlreft.data.contrast import embed_pairs
from vlreft.training.answers import AnswerFile, answer_all

RANKED = 10  # how far down recall@k looks


@dataclass(frozen=True)
class Options:
    """How a base is loaded and its rows are read. max_length: of prompt and answer together, in tokens."""

    device: str
    dtype: torch.dtype
    max_length: int | None = None
    overflow: Literal["error", "cut"] = "error"
    prompt: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


class Examples(Dataset):
    """Rows as one kind of model learns and answers them, made when they are read."""

    def __init__(self, rows: Any, make: Callable[[Row], dict[str, Any]]) -> None:
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Make one example."""
        return self.make(self.rows[place])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Make all examples, one after the other."""
        return (self[place] for place in range(len(self)))


class Answering(Protocol):
    """What a setup needs of a trainer to answer."""

    @property
    def args(self) -> TrainingArguments:
        """Say how many rows are answered at once."""
        ...

    def predict_answers(
        self, dataset: Any, *, file: AnswerFile | None = None, score: Callable[[Sequence[str]], float] | None = None
    ) -> list[str]:
        """Generate an answer for each example."""
        ...


class Setup(ABC):
    """A base and its collator.

    heads: modules that the base has no trained weights for. loss: for models without one of their own.
    """

    task: Task
    model: nn.Module
    collator: Callable[[list[Any]], dict[str, Any]]
    heads: tuple[str, ...] = ()
    loss: Callable | None = None
    generation: Mapping[str, Any] = {}

    @abstractmethod
    def examples(self, rows: Any, *, training: bool) -> Examples:
        """Make the examples of a part of the data."""

    @abstractmethod
    def answers(self, trainer: Answering, rows: Any, file: AnswerFile, score: Callable | None) -> list[Any]:
        """Answer all rows with the model as it is; what the file holds is not done again."""


class GenerateSetup(Setup):
    """A language model, or a vision-language model, that writes its answer."""

    def __init__(self, task: Task, name: str, options: Options, beside: "GenerateSetup | None" = None) -> None:
        has_images = "image" in task.features
        config = AutoConfig.from_pretrained(name)
        is_text_only = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_images
        loader: Any = AutoModelForCausalLM if is_text_only else AutoModelForImageTextToText
        processor = (AutoTokenizer if is_text_only else AutoProcessor).from_pretrained(name)
        self.task, self.generation = task, {**task.generation, **options.generation}
        self.prompt = task.prompt if options.prompt is None else options.prompt
        if beside is None:
            self.model = loader.from_pretrained(name, dtype=options.dtype).to(options.device).eval()
        else:
            self.model = beside.model
        self.collator = Collator(
            processor,
            max_length=options.max_length,
            overflow=options.overflow,
            prompt_format=task.prompt_format,
        )

    def examples(self, rows: Any, *, training: bool) -> Examples:
        """Put the rows' columns into the prompt."""
        return Examples(rows, lambda row: {**row, "question": self.prompt.format_map(row)})

    def answers(self, trainer: Answering, rows: Any, file: AnswerFile, score: Callable | None) -> list[str]:
        """Generate in left-padded batches."""
        return trainer.predict_answers(self.examples(rows, training=False), file=file, score=score)


class SequenceSetup(Setup):
    """A model with a head that classifies a text, or a pair of them, or gives a number."""

    def __init__(self, task: Task, name: str, options: Options) -> None:
        self.task, self.labels = task, task.labels
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.max_length = options.max_length
        kind = {} if self.labels else {"problem_type": "regression"}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=options.dtype, num_labels=max(1, len(self.labels)), output_loading_info=True, **kind
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(options.device).eval()
        self.heads = untrained_modules(model, info["missing_keys"])
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def examples(self, rows: Any, *, training: bool) -> Examples:
        """Tokenise the texts."""

        def make(row: Row) -> dict[str, Any]:
            pair = (row["text"], row["text_pair"]) if row["text_pair"] else (row["text"],)
            encoded = self.tokenizer(*pair, truncation=self.max_length is not None, max_length=self.max_length)
            label = self.labels.index(row["answer"]) if self.labels else float(row["answer"])
            return {**encoded, "labels": label} if training else dict(encoded)

        return Examples(rows, make)

    def answers(self, trainer: Answering, rows: Any, file: AnswerFile, score: Callable | None) -> list[str]:
        """Give the likeliest label's name, or the number as text."""

        def answer(examples: list[Row]) -> list[str]:
            encoded = list(self.examples(examples, training=False))
            batch = self.collator(encoded)
            with torch.no_grad():
                logits_BC = self.model(**{key: value.to(self.model.device) for key, value in batch.items()}).logits
            if not self.labels:
                return [repr(number) for number in logits_BC[:, 0].float().tolist()]
            return [self.labels[index] for index in logits_BC.argmax(-1).tolist()]

        self.model.eval()
        size = trainer.args.per_device_eval_batch_size
        return answer_all(answer, rows, range(len(rows)), size, file=file, score=score)


class ClassesSetup(Setup):
    """A dual encoder that tells classes of pictures apart by their names."""

    def __init__(
        self,
        task: Task,
        name: str,
        options: Options,
        classes: Sequence[str],
        beside: "ClassesSetup | PairsSetup | None" = None,
    ) -> None:
        self.task, self.classes = task, tuple(classes)
        self.model, self.encoders = _load_dual_encoder(name, options) if beside is None else _of(beside)
        collator = ClassCollator(*self.encoders, classes=self.classes, templates=task.templates)
        self.collator, self.loss = collator, collator.loss

    def examples(self, rows: Any, *, training: bool) -> Examples:
        """Give each class its number."""
        return Examples(rows, lambda row: {"image": row["image"], "label": self.classes.index(row["answer"])})

    def answers(self, trainer: Answering, rows: Any, file: AnswerFile, score: Callable | None) -> list[str]:
        """Classify all pictures at once: the classes' prompts are encoded once."""
        size = trainer.args.per_device_eval_batch_size
        pictures = Examples(rows, lambda row: {"image": row["image"]})

        def answer() -> list[str]:
            assert isinstance(self.collator, ClassCollator)
            found = zero_shot(self.model, pictures, self.collator, batch_size=size).predictions
            return [self.classes[index] for index in found.tolist()]

        return _answer_at_once(answer, rows, file)


class PairsSetup(Setup):
    """A dual encoder that finds the texts of a picture, and the picture of a text."""

    def __init__(
        self, task: Task, name: str, options: Options, beside: "ClassesSetup | PairsSetup | None" = None
    ) -> None:
        self.task = task
        self.model, self.encoders = _load_dual_encoder(name, options) if beside is None else _of(beside)
        collator = PairCollator(*self.encoders)
        self.collator, self.loss = collator, collator.loss

    def examples(self, rows: Any, *, training: bool) -> Examples:
        """Keep picture and text."""
        return Examples(rows, lambda row: {"image": row["image"], "text": row["text"]})

    def answers(self, trainer: Answering, rows: Any, file: AnswerFile, score: Callable | None) -> list[Any]:
        """Rank all texts for each picture and all pictures for each text."""
        size = trainer.args.per_device_eval_batch_size

        def answer() -> list[Any]:
            names, texts = column(rows, "image_id"), column(rows, "id")
            first = {name: place for place, name in reversed(list(enumerate(names)))}
            order = sorted(first, key=first.__getitem__)
            pictures = self.examples(rows.select([first[name] for name in order]), training=False)
            captions = self.examples(rows, training=False)
            assert isinstance(self.collator, PairCollator)
            image_IE, text_NE = embed_pairs(self.model, pictures, captions, self.collator, batch_size=size)
            return rankings(image_IE, text_NE, order, texts, names, RANKED)

        return _answer_at_once(answer, rows, file)


def _answer_at_once(answer: Callable[[], list[Any]], rows: Any, file: AnswerFile) -> list[Any]:
    """Answer what is not answered row by row, unless the file has it."""
    names = column(rows, "id")
    if len(held := file.resume(len(rows), names)) == len(rows):
        return held
    found = answer()
    file.append(names, found, list(texts_of(rows)))
    return found


def untrained_modules(model: nn.Module, missing: Collection[str]) -> tuple[str, ...]:
    """Return the largest modules whose every weight the checkpoint lacked: they are random, so they must be trained."""
    found: list[str] = []
    for name, module in model.named_modules():
        weights = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if name and weights and set(weights) <= set(missing) and not any(name.startswith(f"{top}.") for top in found):
            found.append(name)
    return tuple(found)


def load_setup(task: Task, name: str, options: Options, rows: Any, beside: Setup | None = None) -> Setup:
    """Load the base that the task asks for. rows: any rows of the task, to read the classes off.

    beside: a setup of the same base, whose model is taken. Raises ValueError if its task is for another sort of model.
    """
    if task.kind == "generate" and isinstance(beside, GenerateSetup | None):
        return GenerateSetup(task, name, options, beside)
    if task.kind == "sequence" and beside is None:
        return SequenceSetup(task, name, options)
    if task.kind == "classes" and isinstance(beside, ClassesSetup | PairsSetup | None):
        return ClassesSetup(task, name, options, sorted(set(column(rows, "answer"))), beside)
    if task.kind == "pairs" and isinstance(beside, ClassesSetup | PairsSetup | None):
        return PairsSetup(task, name, options, beside)
    assert beside is not None
    raise ValueError(f"the task {task.name!r} is for another sort of model than {beside.task.name!r}")


def _of(beside: "ClassesSetup | PairsSetup") -> tuple[nn.Module, tuple[Any, ...]]:
    return beside.model, beside.encoders


def _load_dual_encoder(name: str, options: Options) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model of open_clip (`open_clip:ViT-B-32@laion2b_s34b_b79k`, `hf-hub:...`, a folder), else of transformers."""
    is_folder = (Path(name) / "open_clip_config.json").is_file()
    if is_folder or name.startswith(("open_clip:", "hf-hub:", "local-dir:")):
        name, _, weights = (f"local-dir:{name}" if is_folder else name.removeprefix("open_clip:")).partition("@")
        create: Any = open_clip.create_model_and_transforms
        model, _, preprocess = create(name, weights or None, device=options.device)
        return model.to(options.dtype).eval(), (preprocess, open_clip.get_tokenizer(name))
    model = AutoModel.from_pretrained(name, dtype=options.dtype).to(options.device).eval()
    return model, (AutoProcessor.from_pretrained(name),)
