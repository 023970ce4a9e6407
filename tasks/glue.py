"""GLUE without WNLI, as the ReFT paper has it: half of the official dev set selects, the other half is the test."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from tasks.metrics.glue import glue_metric
from tasks.metrics.score import Row
from tasks.task import ID, Hub, Parts, Task
from vlreft.data import files

FEATURES = ID | {name: datasets.Value("string") for name in ("text", "text_pair", "answer")}
SEED = 42  # the one that the ReFT paper tuned with
COLA_COLUMNS = ("source", "label", "author_label", "sentence")  # CoLA's files have no line that names them
HIGHEST = 5.0  # of STS-B's scores, which begin at 0


def halves(num_rows: int) -> dict[str, list[int]]:
    """Cut the places of the official dev set's rows in two: `dev`, for selection, and `test`, each in file order.

    dev has half of the rows, or 1,000 where there are more than 5,000; the draw is that of pyreft's script for seed 42.
    """
    num_dev = 1000 if num_rows > 5000 else num_rows // 2
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(SEED)).tolist()
    num_test = num_rows - num_dev
    return {"dev": sorted(order[num_test:]), "test": sorted(order[:num_test])}


@dataclass(frozen=True)
class GlueFiles:
    """How one task's rows stand in the official files and on the hub.

    folder: its name in the official download.
    texts: the columns of the text, or of the pair. hub_texts: the same on the hub, where they are others.
    label: the label's column. codes: what stands there, and the label's name, in the hub's order; None for numbers.
    dev: the name of the official dev file. columns: those of a file that does not name them.
    is_torn: whether rows are left out that lack cells.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    label: str
    codes: Mapping[str, str] | None
    hub_texts: tuple[str, ...] = ()
    dev: str = "dev"
    columns: tuple[str, ...] = ()
    is_torn: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels' names."""
        return tuple(self.codes.values()) if self.codes else ()

    def paths(self, folder: Path, part: str) -> list[Path]:
        """Find the part's file in the download's folder, or in the task's own."""
        if part not in ("train", "dev", "test"):
            raise ValueError(f"`part` (={part!r}) must be one of ['train', 'dev', 'test'].")
        name = f"{'train' if part == 'train' else self.dev}.tsv"
        return [files.find_file(folder, f"{self.folder}/{name}", name)]

    def rows(self, folder: Path, part: str) -> Iterator[dict[str, Any]]:
        """Yield the part's rows; `text_pair` is empty where there is one text. Ids are places in the file, from 0."""
        (file,) = self.paths(folder, part)
        places: set[int] | None = None
        if part != "train":  # counted first, as the halves depend on the number
            places = set(halves(sum(1 for _ in self._cells(file)))[part])
        for place, (number, where, row) in enumerate(self._cells(file)):
            if places is None or place in places:
                texts = [files.value(row, column, str, where) for column in self.texts]
                yield _row(number, texts, self._answer(files.value(row, self.label, str, where), where))

    def from_hub(self, row: Row) -> dict[str, Any]:
        """Read a row of the hub's data set, whose labels are numbers."""
        where, label = f"the hub's {self.name}, row {row['idx']}", row["label"]
        if not self.codes:
            return _row(row["idx"], [row[column] for column in self.hub_texts or self.texts], _number(label, where))
        if not 0 <= label < len(self.labels):
            raise ValueError(f"{where}: the label {label} is not one of {len(self.labels)}; the part has no labels.")
        return _row(row["idx"], [row[column] for column in self.hub_texts or self.texts], self.labels[label])

    def line(self, row: Row, answer: str) -> dict[str, Any]:
        """Make a line of the official submission: labels as the files have them."""
        if not self.codes:
            return {"index": int(row["id"]), "prediction": float(answer)}
        code = next(code for code, name in self.codes.items() if name == answer)
        return {"index": int(row["id"]), "prediction": int(code) if code.isdecimal() else code}

    def _answer(self, cell: str, where: str) -> str:
        if not self.codes:
            return _number(cell, where)
        if cell not in self.codes:
            raise ValueError(f"{where}: {self.label!r} (={cell!r}) must be one of {list(self.codes)}; mend it.")
        return self.codes[cell]

    def _cells(self, file: Path) -> Iterator[tuple[int, str, Row]]:
        """The rows by name, each with its place in the file and how errors call it; nothing is quoted in these files.

        MRPC's begin with a byte order mark. QQP's train has some rows that are torn in two: these are left out, as by
        every reader of GLUE.
        """
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
                names = list(self.columns) or next(reader, [])
                for number, cells in enumerate(reader):
                    where = f"{file}, line {reader.line_num}"
                    if len(cells) == len(names):
                        yield number, where, dict(zip(names, cells, strict=True))
                    elif not self.is_torn or len(cells) > len(names):
                        raise ValueError(f"{where}: has {len(cells)} cells where {names} are expected; mend it.")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file}: cannot be read ({error}); give the official file, in UTF-8.") from error


def _row(number: int, texts: list[str], answer: str) -> dict[str, Any]:
    return {"id": str(number), "text": texts[0], "text_pair": texts[1] if len(texts) > 1 else "", "answer": answer}


def _number(found: str | float, where: str) -> str:
    """A score as its file writes it: the hub's are float32, whose further digits mean nothing."""
    try:
        score = float(found)
    except ValueError:
        score = -1.0
    if not 0 <= score <= HIGHEST:
        raise ValueError(f"{where}: the score {found!r} must be a number from 0 to {HIGHEST:g}; mend it.")
    return f"{score:.3f}"


class GlueTask(Task):
    """A task whose dev and test are halves of one part of the hub's data set, as `read` has them of one file."""

    def load(self, part: str, folder: Path | None = None) -> datasets.Dataset:
        """Load one part: from the official files in the folder, else from the hub."""
        data = super().load(part, folder)
        if part == "train" or (folder or self.folder) is not None:
            return data
        return data.select(halves(len(data))[part])


def _named(*labels: str) -> dict[str, str]:
    return {label: label for label in labels}


def _numbered(*labels: str) -> dict[str, str]:
    return {str(number): label for number, label in enumerate(labels)}


_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
TABLE = (
    GlueFiles(
        *("mnli", "MNLI", _PAIR, "gold_label", _named("entailment", "neutral", "contradiction")),
        hub_texts=("premise", "hypothesis"),
        dev="dev_matched",
    ),
    GlueFiles("sst2", "SST-2", ("sentence",), "label", _numbered("negative", "positive")),
    GlueFiles(
        *("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _numbered("not_equivalent", "equivalent")),
        hub_texts=_PAIR,
    ),
    GlueFiles(
        *("cola", "CoLA", ("sentence",), "label", _numbered("unacceptable", "acceptable")),
        columns=COLA_COLUMNS,
    ),
    GlueFiles("qnli", "QNLI", ("question", "sentence"), "label", _named("entailment", "not_entailment")),
    GlueFiles(
        *("qqp", "QQP", _QUESTIONS, "is_duplicate", _numbered("not_duplicate", "duplicate")),
        is_torn=True,
    ),
    GlueFiles("rte", "RTE", _PAIR, "label", _named("entailment", "not_entailment")),
    GlueFiles("stsb", "STS-B", _PAIR, "score", None),
)
TITLES = {
    "mnli": "does the first sentence entail the second, contradict it, or neither? Accuracy, matched genres",
    "sst2": "is the review's sentence positive? Accuracy",
    "mrpc": "do two sentences of the news say the same? Accuracy",
    "cola": "is the sentence acceptable English? Matthews correlation",
    "qnli": "does the sentence answer the question? Accuracy",
    "qqp": "are two questions duplicates? Accuracy",
    "rte": "does the first sentence entail the second? Accuracy",
    "stsb": "how alike are two sentences, from 0 to 5? Pearson correlation",
}


def _task(table: GlueFiles) -> Task:
    official = "validation_matched" if table.name == "mnli" else "validation"
    return GlueTask(
        name=f"glue_{table.name}",
        title=f"GLUE {table.folder}: {TITLES[table.name]}",
        kind="sequence",
        parts=Parts(train="train", dev="dev", tests=("test",)),
        features=FEATURES,
        read=table.rows,
        files=table.paths,
        metric=glue_metric(table.name),
        line=table.line,
        labels=table.labels,
        hub=Hub("nyu-mll/glue", {"train": "train", "dev": official, "test": official}, table.from_hub, table.name),
        sources=(
            f"data: https://gluebenchmark.com/tasks, {table.folder}/train.tsv and {table.dev}.tsv; its own test has no "
            "public labels",
            "splits: ReFT paper, section 4.5, and stanfordnlp/pyreft, examples/loreft/train.py: the official dev set "
            f"cut in two, here always as for seed {SEED}; the paper's five seeds each cut it anew",
            "texts: as a pair of sequences, stanfordnlp/pyreft, examples/loreft/dataset.py",
            "metric: the ReFT paper's, as the hub's `evaluate` computes it; GLUE's other ones are parts",
        ),
    )


TASKS = tuple(map(_task, TABLE))
