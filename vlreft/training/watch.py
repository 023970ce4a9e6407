"""Which samples a batch was made of, and which one a data-loader worker was at when it failed or died."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

# What the main process may find where a worker died: torch's own message, or a pipe that ends.
ERRORS_OF_THE_DEAD = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)
# Column of a batch: the numbers (B,) of its samples in the training data. It never reaches the model.
NUMBERS = "sample_numbers"
NUM_NAMED = 16
# Columns of the table of workers: the process, what it does, how many samples it has, and their numbers.
PID, DOING, COUNT, FIRST = range(4)
IDLE, READING_ALL, COLLATING = -1, -2, -3


class Numbered(NamedTuple):
    """A sample with its number in the data."""

    number: int
    row: Any


class WatchedRows(Dataset[Any]):
    """A data set for a `DataLoader` with `collate`: batches know the numbers of their samples.

    rows: a data set with a length, read by number. What goes wrong in it, or in the collator, has a note that names the
    samples; of a worker that died without a word `dead_worker` says where it was.
    """

    def __init__(self, rows: Any, collator: Callable[[list[Any]], Any], num_workers: int, batch_size: int) -> None:
        self.rows = rows
        self.collate = WatchedCollator(self, collator)
        self.at_WN = torch.full((num_workers, FIRST + batch_size), IDLE, dtype=torch.int64)
        if num_workers:
            self.at_WN.share_memory_()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        """Return a row as it is."""
        return self.rows[number]

    def __getitems__(self, numbers: Sequence[int]) -> list[Numbered]:
        """Return the rows of a batch with their numbers, read at once where the data can (`datasets` does)."""
        read_all = getattr(self.rows, "__getitems__", None)  # what torch's own fetcher asks for
        self._say(READING_ALL, numbers)
        if read_all is not None:
            with noted(f"while the samples {_listed(numbers)} of the training data were read"):
                rows = read_all(numbers)
        else:
            rows = []
            for place, number in enumerate(numbers):
                self._say(place)
                with noted(f"while sample {number} of the training data was read"):
                    rows.append(self.rows[number])
        self._say(IDLE)
        return [Numbered(int(number), row) for number, row in zip(numbers, rows, strict=True)]

    def names(self, numbers: Sequence[int]) -> str:
        """Return how people know some samples: their numbers, with their `id` or `question_id` if they have one."""
        named = []
        for number in numbers[:NUM_NAMED]:
            row = self.rows[number]
            known = row.get("id", row.get("question_id")) if isinstance(row, Mapping) else None
            named.append(f"{number}" if known is None else f"{number} ({known!r})")
        more = f" and {len(numbers) - NUM_NAMED} more" if len(numbers) > NUM_NAMED else ""
        return f"samples {', '.join(named)}{more} of the training data"

    def dead_worker(self, error: BaseException) -> str | None:
        """Return where a worker was that died, if an error came of that; None if none did."""
        if isinstance(error, RuntimeError):
            is_told = str(error).startswith("DataLoader worker")
            pids = {int(text) for text in re.findall(r"\d+", str(error).partition("pid")[2])} if is_told else set()
        else:
            try:
                pids = self._dead()
            except RuntimeError as told:  # torch tells of it out of a signal handler, perhaps while we look
                return self.dead_worker(told)
        if not pids:
            return None
        said = [_where(row) for row in self.at_WN.tolist() if row[PID] in pids and row[DOING] != IDLE]
        return "; ".join(said) or "between two batches"

    def _dead(self) -> set[int]:
        """Return the ids of workers that have ended; one whose pipe broke may take a moment to."""
        for _ in range(20):
            alive = {child.pid for child in multiprocessing.active_children()}
            if dead := set(self.at_WN[:, PID].tolist()) - alive - {IDLE}:
                return dead
            time.sleep(0.05)
        return set()

    def _say(self, doing: int, numbers: Sequence[int] | None = None) -> None:
        """Leave word for the main process where this worker is."""
        worker = get_worker_info()
        if worker is None:
            return
        at_N = self.at_WN[worker.id]
        at_N[PID], at_N[DOING] = os.getpid(), doing
        if numbers is not None:
            numbers_N = torch.tensor([int(number) for number in numbers][: len(at_N) - FIRST])
            at_N[COUNT] = len(numbers_N)
            at_N[FIRST : FIRST + len(numbers_N)] = numbers_N


class WatchedCollator:
    """A collator that takes numbered rows and leaves their numbers in the batch, where that is a mapping."""

    def __init__(self, rows: WatchedRows, collator: Callable[[list[Any]], Any]) -> None:
        self._rows = rows
        self._collator = collator

    def __call__(self, samples: list[Numbered]) -> Any:
        """Make a batch."""
        numbers = [sample.number for sample in samples]
        self._rows._say(COLLATING, numbers)
        with noted(f"while a batch was made of the samples {_listed(numbers)} of the training data"):
            batch = self._collator([sample.row for sample in samples])
        if isinstance(batch, MutableMapping):
            batch[NUMBERS] = torch.tensor(numbers)
        self._rows._say(IDLE)
        return batch


def take_numbers(batch: Any) -> Tensor | None:
    """Take the samples' numbers out of a batch."""
    return batch.pop(NUMBERS, None) if isinstance(batch, MutableMapping) else None


class noted:  # noqa: N801 (reads as a statement)
    """Add a note to whatever is raised inside."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Add it."""
        if error is not None:
            error.add_note(self.text)


def _where(row: list[int]) -> str:
    numbers = row[FIRST : FIRST + row[COUNT]]
    if 0 <= row[DOING] < len(numbers):
        return f"while it read sample {numbers[row[DOING]]} of the training data"
    doing = "made a batch of" if row[DOING] == COLLATING else "read"
    return f"while it {doing} the samples {_listed(numbers)} of the training data"


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - NUM_NAMED} more" if len(numbers) > NUM_NAMED else ""
    return f"{', '.join(map(str, numbers[:NUM_NAMED]))}{more}"
