"""`Recipe`: the settings of one published experiment, read-only, how they are printed, and two short forms for them."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from vlreft.config import Intervention, ReftConfig

WIDTH = 120  # columns of a printed recipe
NAME_WIDTH = 30


@dataclass(frozen=True, eq=False, kw_only=True)
class Recipe:
    """Settings of one published experiment; nothing in it can be changed, and every value of it is printed.

    config: the interventions, and the modules that are trained whole.
    arguments: keywords of `transformers.TrainingArguments` for one device; `training` is a copy of them.
    collator: keywords of `vlreft.Collator`. tokenizer: keywords of the tokenizer's call, where no Collator is used.
    generation: keywords of `model.generate`. dtype: what the authors' code loads the base in. seeds: the paper's.
    num_trained: numbers that `config` trains, modules trained whole apart, by the model that the paper has.
    reported: what the paper reports, by model and benchmark; in percent where it says nothing else.
    source: where the settings were read. differs: what is not as in the authors' paper or code.
    """

    name: str
    title: str
    config: ReftConfig
    arguments: Mapping[str, Any]
    collator: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    seeds: tuple[int, ...] = ()
    num_trained: Mapping[str, int]
    reported: Mapping[str, float | str] = field(default_factory=dict)
    source: str
    differs: tuple[str, ...]

    def __post_init__(self) -> None:
        """Keep read-only copies."""
        for own in fields(self):
            if isinstance(value := getattr(self, own.name), Mapping):
                object.__setattr__(self, own.name, MappingProxyType(dict(value)))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "differs", tuple(self.differs))

    @property
    def training(self) -> dict[str, Any]:
        """The keywords of TrainingArguments, a fresh dict each time."""
        return dict(self.arguments)

    @property
    def global_batch(self) -> int:
        """Rows of one optimiser step on one device; on N devices divide `gradient_accumulation_steps` by N."""
        return self.arguments["per_device_train_batch_size"] * self.arguments["gradient_accumulation_steps"]

    def __str__(self) -> str:
        """Every setting, a line each."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.title}"
        yield from _wrapped("source", self.source)
        for number, item in enumerate(self.config.interventions):
            yield f"intervention {number}"
            yield from _table({own.name: getattr(item, own.name) for own in fields(item)})
        yield from _wrapped("modules_to_save", ", ".join(self.config.modules_to_save) or "none")
        yield f"training (global batch {self.global_batch})"
        yield from _table(self.arguments)
        for part in ("collator", "tokenizer", "generation"):
            yield part if getattr(self, part) else f"{part}: nothing to set"
            yield from _table(getattr(self, part))
        yield f"dtype of the base: {self.dtype}"
        yield f"seeds: {', '.join(map(str, self.seeds)) or 'not said'}"
        yield "trained numbers"
        yield from _table({model: f"{count:,}" for model, count in self.num_trained.items()})
        yield "reported" if self.reported else "reported: nothing that we have found"
        yield from _table(self.reported)
        yield "differs"
        for sentence in self.differs:
            yield from textwrap.wrap(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _table(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        text = (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
        yield from _wrapped(f"  {name}", text)


def _wrapped(name: str, text: str) -> list[str]:
    indent = " " * (NAME_WIDTH + 1)
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<{NAME_WIDTH}} ", subsequent_indent=indent)


def training_arguments(
    *,
    lr: float,
    epochs: int,
    batch: tuple[int, int],
    warmup: float,
    weight_decay: float = 0.0,
    schedule: str = "linear",
) -> dict[str, Any]:
    """Give TrainingArguments; batch is (rows of one forward, forwards of a step), warmup a ratio of all steps."""
    return {
        "learning_rate": lr,
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,  # below 1 it is a ratio
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "optim": "adamw_torch",
        "weight_decay": weight_decay,
        "max_grad_norm": 1.0,
    }


def edit(method: str, positions: str, rank: int, **settings: Any) -> Intervention:
    """Give an intervention that starts as the authors' do."""
    return Intervention(method, **({"positions": positions, "rank": rank, "init": "reference"} | settings))
