"""`Score`: a metric's number, and what it was computed over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """What a metric found. Shares are in [0, 1]; tables show them times 100.

    by_row: each row's part, where `value` is their mean; None for a metric of the whole set (BLEU, F1, ...).
    over: what it was computed over, in words: how many rows, how many references, which idf set, which normaliser.
    """

    name: str
    value: float
    over: str
    by_row: tuple[float, ...] | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


# The answers are texts, except for the tasks that rank: there each is a list of ids, best first. The rows are those of
# the task, without their pictures. Raises: ValueError for no rows, or as many answers as rows are not.
Metric = Callable[[Sequence[Any], Sequence[Row]], Score]


def check_lengths(answers: Sequence[Any], rows: Sequence[Row]) -> None:
    """Refuse to score nothing, or answers that are not one to a row."""
    if not len(rows) or len(answers) != len(rows):
        raise ValueError(f"{len(answers)} answers to {len(rows)} rows: there must be one answer to each, and some.")


def mean_score(name: str, by_row: Sequence[float], over: str, parts: Mapping[str, float] | None = None) -> Score:
    """Return the score whose value is the mean of its rows'."""
    return Score(name, sum(by_row) / len(by_row), over, tuple(map(float, by_row)), parts or {})
