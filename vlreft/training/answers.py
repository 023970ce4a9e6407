"""`AnswerFile`: generated answers, written as they come, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Line = Callable[[Row, Any], Mapping[str, Any]]


class AnswerFile:
    """A JSON-lines file of one answer a row, in the rows' order, and beside it the same in a submission's form.

    key: what the answers are of (adapter, rows, settings); it is kept in `<file>.key`, and answers of another key are
        not mixed with these: an error, or with `replace` they are thrown away.
    line: turns a row and its answer into an entry of the official results file; they go to `<stem>.submission.jsonl`.
    Raises: ValueError for a file with another key, or with a line that is not an answer.
    """

    def __init__(self, path: str | Path, key: str, *, line: Line | None = None, replace: bool = False) -> None:
        self.path, self.line = Path(path), line
        self.submission = self.path.with_suffix(".submission.jsonl")
        self._key_file = self.path.with_name(self.path.name + ".key")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self._has_key(key):
            if not replace:
                raise ValueError(
                    f"{self.path} holds answers of another adapter, other rows or other settings of generation; remove "
                    "it, or name another file."
                )
            for file in (self.path, self.submission):
                file.unlink(missing_ok=True)
        if not self.path.exists():
            self._key_file.write_text(key + "\n")
            self.path.touch()

    def resume(self, batch_size: int, ids: Sequence[str]) -> list[Any]:
        """Return the answers that are there, whole batches only, and leave the file holding just these.

        ids: those of all rows to be answered. Batches begin again where they would have begun, so that the answers are
        those of an uninterrupted run.
        """
        entries, written = _whole_lines(self.path), _whole_lines(self.submission) if self.line is not None else None
        num_whole = min(len(entries), len(entries if written is None else written))
        if num_whole < len(ids):
            num_whole = num_whole // batch_size * batch_size
        entries = entries[:num_whole]
        if [entry.get("id") for entry in entries] != list(ids[:num_whole]):
            raise ValueError(f"{self.path} answers other rows than these; remove it, or name another file.")
        _write(self.path, entries)
        if written is not None:
            _write(self.submission, written[:num_whole])
        return [entry["answer"] for entry in entries]

    def append(self, ids: Sequence[str], answers: Sequence[Any], rows: Sequence[Row]) -> None:
        """Write a batch of answers through to the disk."""
        entries = [{"id": name, "answer": answer} for name, answer in zip(ids, answers, strict=True)]
        _append(self.path, entries)
        if self.line is not None:
            _append(self.submission, [self.line(row, answer) for row, answer in zip(rows, answers, strict=True)])

    def _has_key(self, key: str) -> bool:
        return self._key_file.exists() and self._key_file.read_text().strip() == key


def answer_all(
    answer: Callable[[list[Any]], list[Any]],
    dataset: Any,
    places: Sequence[int],
    batch_size: int,
    *,
    file: AnswerFile | None = None,
    score: Callable[[Sequence[Any]], float] | None = None,
    is_shown: bool = True,
) -> list[Any]:
    """Answer the examples at these places batch by batch, with a progress bar; what the file holds is not done again.

    score: of the answers so far, for the bar; called a few times in all.
    """
    from transformers.utils.logging import tqdm

    answers, next_score = file.resume(batch_size, _ids(dataset, places)) if file is not None else [], 0
    with tqdm(total=len(places), initial=len(answers), desc="Answering", leave=False, disable=not is_shown) as bar:
        while len(answers) < len(places):
            chunk = places[len(answers) : len(answers) + batch_size]
            examples = [dataset[place] for place in chunk]
            new = answer(examples)
            if file is not None:
                file.append([_id(*named) for named in zip(examples, chunk, strict=True)], new, examples)
            answers += new
            bar.update(len(new))
            if score is not None and is_shown and len(answers) >= next_score:  # seldom: it looks at all answers so far
                bar.set_postfix(score=f"{score(answers):.3f}")
                next_score = 2 * len(answers)
    return answers


def _id(example: Row, place: int) -> str:
    """An example's `id` or `question_id`, else its place."""
    named = [example[key] for key in ("id", "question_id") if example.get(key) is not None]
    return str(named[0] if named else place)


def _ids(dataset: Any, places: Sequence[int]) -> list[str]:
    """The examples' ids, without reading a picture where the dataset has columns."""
    from datasets import Dataset

    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        names = [name for name in ("id", "question_id") if name in dataset.column_names]
        dataset = dataset.select_columns(names) if names else [{}] * len(dataset)
    return [_id(dataset[place], place) for place in places]


def read_answers(path: str | Path) -> list[Any]:
    """Read the answers of a file that `AnswerFile` wrote."""
    return [entry["answer"] for entry in _whole_lines(Path(path))]


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    entries = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end was cut off while it was written
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: is not JSON ({error}); remove the file.") from error
    return entries


def _append(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(entry) + "\n" for entry in entries))
        out.flush()
        os.fsync(out.fileno())


def _write(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file at once, so that an interruption leaves the old one."""
    draft = file.with_name(file.name + ".draft")
    draft.unlink(missing_ok=True)
    _append(draft, entries)
    draft.replace(file)
