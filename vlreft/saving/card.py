"""The model card of an adapter: which base, what was edited where, what it scores, how to load it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from vlreft.config import Intervention, ReftConfig

# Tensors of modules that are trained whole: `modules_to_save.<name>.<parameter>`, the name with "/" for ".".
MODULES_PREFIX = "modules_to_save."
FOLDER = "path/to/this/folder"  # what a card calls the adapter until it has an address
OPEN_CLIP = "open_clip"  # the `model_type` of a base that is no transformers model
_ADDRESS = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
_ALWAYS = ("method", "site", "layers", "positions", "rank", "tied")  # other columns are there where they say something

Metrics = Mapping[str, float | int | str]


@dataclass(frozen=True, eq=False)
class Card:
    """What a card is written from; `str(card)` is its text, the hub's metadata and then Markdown.

    model_type, class_name, name_or_path, sites: of the base, see `Base`. name_or_path is named only where it is an
    address on the hub: a path says nothing to others, and the hub refuses it. metrics: names and values, for a table;
    the hub's own list of results needs a data set for each and is left to the user.

    Raises TypeError for metrics that are no mapping of names to numbers or texts.
    """

    config: ReftConfig
    model_type: str
    class_name: str
    name_or_path: str
    sites: Mapping[str, Sequence[int]]
    tensors: Mapping[str, Tensor]
    metrics: Metrics | None = None

    def __post_init__(self) -> None:
        """Check the metrics, the one field that comes from the user."""
        given = {} if self.metrics is None else self.metrics
        if not isinstance(given, Mapping) or not all(
            isinstance(name, str) and isinstance(value, int | float | str) for name, value in given.items()
        ):
            raise TypeError(f"`metrics` must be a dict of names and numbers, e.g. {{'accuracy': 0.81}}, got {given!r}")

    def __str__(self) -> str:
        """Write the card."""
        metadata = ["library_name: vlreft", "tags: [reft, representation-finetuning]"]
        metadata += [f"base_model: {self.address}"] if self.address else []
        num_edited = sum(t.numel() for name, t in self.tensors.items() if not name.startswith(MODULES_PREFIX))
        parts = [
            "\n".join(["---", *metadata, "---"]),
            "# A vlreft adapter",
            f"Interventions on the hidden states of a frozen {self.class_name}; {num_edited:,} numbers were trained.",
            *self._modules(),
            "## Base",
            self._base(),
            "## Interventions",
            _interventions(self.config.interventions),
            *(["## Metrics", _table(("metric", "value"), self.metrics.items())] if self.metrics else []),
            "## How to load it",
            self._snippet(),
        ]
        return "\n\n".join(parts) + "\n"

    @property
    def address(self) -> str:
        """The base's address on the hub, "" if its name is none."""
        name = self.name_or_path
        return name if re.fullmatch(_ADDRESS, name) and not Path(name).exists() else ""

    def _base(self) -> str:
        link = [("model", f"[{self.address}](https://huggingface.co/{self.address})")] if self.address else []
        shapes = [(f"site `{site}`", f"{num} blocks, width {width}") for site, (num, width) in self.sites.items()]
        return _table(("base", ""), [*link, ("class", self.class_name), ("type", self.model_type), *shapes])

    def _modules(self) -> list[str]:
        """Return a sentence for each module that was trained whole."""
        lines = []
        for name in self.config.modules_to_save:
            prefix = f"{MODULES_PREFIX}{name.replace('.', '/')}."
            num_here = sum(tensor.numel() for key, tensor in self.tensors.items() if key.startswith(prefix))
            lines.append(f"Beside them, `{name}` was trained whole: {num_here:,} numbers.")
        return lines

    def _snippet(self) -> str:
        if self.model_type == OPEN_CLIP:
            made = ["import vlreft", "", f"model = ...  # the frozen base, open_clip's {self.class_name}"]
        else:
            name = self.address or "path/to/the/base"
            made = ["import vlreft", f"from transformers import {self.class_name}", ""]
            made.append(f'model = {self.class_name}.from_pretrained("{name}")')
        return "\n".join(["```python", *made, f'reft = vlreft.load(model, "{FOLDER}")', "```"])


def _interventions(items: tuple[Intervention, ...]) -> str:
    defaults = {field.name: field.default for field in fields(Intervention)}
    columns = [name for name in defaults if name in _ALWAYS or any(getattr(i, name) != defaults[name] for i in items)]
    return _table(columns, ([_shown(name, getattr(item, name)) for name in columns] for item in items))


def _shown(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"`{value}`" if name == "positions" else str(value)


def _table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; a bar or a line break in a cell would end it."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    head, *lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(columns), *lines])
