"""`Task`: where a benchmark's data is, its prompt, its splits, its metric, and the source of each.

A task is one file of this folder, or one row of such a file's table, and one entry of `tasks.table`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from tasks.metrics.score import Metric, Row
from vlreft.data.files import dataset_of

# The sort of model that learns a task, and how it answers: by generating text; by a head over a sequence of tokens; by
# comparing a picture with each class's name; by ranking texts for a picture and pictures for a text.
Kind = Literal["generate", "sequence", "classes", "pairs"]

# What every task's rows have; `image` is a path and is opened when it is needed, so that an unreadable one is named.
ID = {"id": datasets.Value("string")}
IMAGE = {"image": datasets.Image(decode=False)}
TEXTS = {"question": datasets.Value("string"), "answer": datasets.Value("string")}
REFERENCES = {"references": datasets.List(datasets.Value("string"))}
VQA_FEATURES = ID | IMAGE | TEXTS | REFERENCES
TEXT_FEATURES = ID | TEXTS | REFERENCES


@dataclass(frozen=True)
class Hub:
    """The same data on the hub: `datasets.load_dataset(name, config, split=parts[part])`.

    row: turns a row of it into the task's columns, as a row is read.
    """

    name: str
    parts: Mapping[str, str]
    row: Callable[[Row], dict[str, Any]]
    config: str | None = None


@dataclass(frozen=True)
class Parts:
    """Which parts of the data are for what, by the names that the official files have.

    train: None for a benchmark without training data; it is trained on the task `train_on`, or not at all.
    tests: the sealed parts, each scored apart; the task's score is the mean of theirs.
    dev: an official part for selection; without one, dev is cut from train: `num_dev` rows, drawn by the run's seed
        with all rows of a picture on one side ("cut"), or the last ones ("last").
    """

    tests: tuple[str, ...]
    train: str | None = None
    train_on: str | None = None
    dev: str | None = None
    num_dev: int = 1000
    rule: Literal["cut", "last"] = "cut"


@dataclass(frozen=True)
class Task:
    """A benchmark.

    read: yields the rows of one part from the official files in a folder, with `features` as columns. Raises:
        ValueError, naming file and row.
    files: the files that `read` reads for a part. They may be missing; only their names are needed to look for them.
    prompt: what the model is asked, with the row's columns by name; never a label.
    labels: what a "sequence" task tells apart (none: a number is predicted); a "classes" task reads them off its rows.
    templates: of a "classes" task, what the class names are put in.
    folder: where the files are if nobody says where; of the demo tasks.
    line: a row and its answer as the official submission has them.
    sources: where prompt, normalisation, metric and splits come from, a line each.
    own: names of tasks that the base could do before, where that is known: `tasks.compare` looks what was forgotten.
    """

    name: str
    title: str
    kind: Kind
    parts: Parts
    features: Mapping[str, Any]
    read: Callable[[Path, str], Iterator[dict[str, Any]]]
    files: Callable[[Path, str], list[Path]]
    metric: Metric
    line: Callable[[Row, Any], dict[str, Any]]
    sources: tuple[str, ...]
    hub: Hub | None = None
    folder: Path | None = None
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    prompt: str = "{question}"
    prompt_format: str = "{question}"
    generation: Mapping[str, Any] = field(default_factory=lambda: {"max_new_tokens": 32, "do_sample": False})
    own: tuple[str, ...] = ()

    def load(self, part: str, folder: Path | None = None) -> datasets.Dataset:
        """Load one part: from the official files in the folder, else from the hub."""
        folder = folder or self.folder
        if folder is None:
            return self._load_from_hub(part)
        files = self.files(folder, part)
        return dataset_of(self.read, self.features, files, folder=folder, part=part)

    def refuse_missing(self, part: str, folder: Path | None = None) -> None:
        """Look whether a part's files are there, unread. Raises ValueError if not."""
        folder = folder or self.folder
        if folder is not None:
            missing = [str(file) for file in self.files(folder, part) if not file.exists()]
            if missing:
                raise ValueError(f"{self.name!r}, part {part!r}: there is no {', '.join(missing)}; put it there first.")
        elif self.hub is None or part not in self.hub.parts:
            raise ValueError(f"{self.name!r} has no part {part!r} on the hub; give its files with `--data`.")

    def _load_from_hub(self, part: str) -> datasets.Dataset:
        if self.hub is None or part not in self.hub.parts:
            raise ValueError(f"the task {self.name!r} has no part {part!r} on the hub; give its files with `--data`.")
        data = datasets.load_dataset(self.hub.name, self.hub.config, split=self.hub.parts[part])
        assert isinstance(data, datasets.Dataset)
        for name in _picture_columns(data):
            data = data.cast_column(name, datasets.Image(decode=False))
        return data.with_transform(_HubRows(self.hub.row))


def without_pictures(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the same rows, no picture of which is read: `image` is None, or not there."""
    names, transform = _picture_columns(rows), rows.format["format_kwargs"].get("transform")
    rows = rows.remove_columns(names)
    return rows.with_transform(_HubRows(transform.row, tuple(names))) if isinstance(transform, _HubRows) else rows


def texts_of(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Read the rows without their pictures."""
    for row in without_pictures(rows):
        assert isinstance(row, dict)
        yield row


def column(rows: datasets.Dataset, name: str) -> list[Any]:
    """Return one of the task's columns, read without the pictures."""
    return [row[name] for row in texts_of(rows)]


def _picture_columns(rows: datasets.Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]


@dataclass(frozen=True)
class _HubRows:
    """A row function as datasets' transforms are: columns of rows in, columns of rows out. `absent` ones are None."""

    row: Callable[[Row], dict[str, Any]]
    absent: tuple[str, ...] = ()

    def __call__(self, columns: Mapping[str, list]) -> dict[str, list]:
        given = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = [self.row({**dict.fromkeys(self.absent), **row}) for row in given]
        return {name: [row[name] for row in rows] for name in rows[0]}
