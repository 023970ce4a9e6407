"""What a difference between two runs is worth: means over seeds, paired bootstrap, and Holm's correction.

Definitions. A resample draws as many rows as there are, with replacement, the same ones for both runs (Koehn 2004,
"Statistical significance tests for machine translation evaluation", section 4). d is the difference of the metric's
values A - B on the rows, d* that on a resample. The 95 % interval lies between the 2.5 % and 97.5 % quantiles of d*
(percentile interval; Efron & Tibshirani 1993, "An introduction to the bootstrap", section 13.3). The p value is
two-sided, for the null hypothesis that the true difference is 0, whose distribution is taken to be that of d* - d
(translation to the null; Efron & Tibshirani 1993, section 16.4):

    p = (1 + number of resamples with |d* - d| >= |d|) / (1 + number of resamples)

The ones keep p above 0 (Davison & Hinkley 1997, "Bootstrap methods and their application", section 4.2). Both tails are
counted because the rows' differences may be skewed; so p and the interval may disagree where p is near 0.05.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev  # Python's own, which sums without rounding
from typing import Any, Literal

import numpy as np

from tasks.metrics.score import Metric, Row, Score

NUM_SAMPLES = {"rows": 10_000, "metric": 1_000}
NUM_HELD = 2**22  # rows of resamples in memory at once: 16 MB of indices, 32 MB of differences
ROUNDING = 1e-12  # equal differences that were summed in another order


@dataclass(frozen=True)
class Comparison:
    """How run A compares with run B on the same rows; what is defined how stands at the top of the file.

    Values are means over each run's seeds. The interval and p are about other rows of the same kind; the seeds are held
    fixed, so the spread over seeds is not in them.
    route: whether resamples were of rows' scores ("rows"), or the metric was called on each resample ("metric").
    num_seeds: of A and of B.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    num_samples: int
    route: Literal["rows", "metric"]
    value_a: float
    value_b: float
    num_rows: int
    num_seeds: tuple[int, int]


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (divided by n - 1); the latter is None for one value."""
    if not len(values) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"`values` (={list(values)}) must be finite numbers, one or more.")
    return float(mean(values)), None if len(values) == 1 else float(stdev(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p values of several comparisons by Holm's step-down rule, in the given order.

    The chance of any false claim among those with a corrected value below 0.05 is at most 5 % (Holm 1979, "A simple
    sequentially rejective multiple test procedure").
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"`p_values` (={list(p_values)}) must be in [0, 1].")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def paired_bootstrap(
    metric: Metric,
    answers_a: Sequence[Any],
    answers_b: Sequence[Any],
    rows: Sequence[Row],
    *,
    num_samples: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare two runs' answers to the same rows; see the top of the file for interval and p value.

    Answers with one item for each row are one seed's; others are a list of such, one for each seed, and values are
    averaged over the seeds within each resample. The two runs may have different numbers of seeds.

    Where the metric gives each row's part, these are resampled (10,000 resamples unless told otherwise). Else the
    metric is called on each resample's answers and rows (1,000 resamples, times the seeds of both): it must count a row
    as often as it is given, also where it looks at its id. Resamples on which it has no value, as where all rows are of
    one class, are left out of `num_samples`; they must be less than half.

    Raises: ValueError for no rows, lengths that differ, a metric that is not finite.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("`rows` is empty; give the rows that were answered.")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"`num_samples` (={num_samples}) must be 1 or more.")
    runs = _by_seed(answers_a, rows, "answers_a"), _by_seed(answers_b, rows, "answers_b")
    scores_a, scores_b = ([_scored(metric, answers, rows) for answers in run] for run in runs)
    value_a, value_b = _mean_value(scores_a), _mean_value(scores_b)
    by_row_a, by_row_b = _by_row(scores_a, len(rows)), _by_row(scores_b, len(rows))
    route: Literal["rows", "metric"] = "metric" if by_row_a is None or by_row_b is None else "rows"
    num_samples = num_samples or NUM_SAMPLES[route]
    chunks = _resamples(len(rows), num_samples, seed)
    if by_row_a is None or by_row_b is None:
        resampled = np.array([_resampled(metric, runs, rows, index) for chunk in chunks for index in chunk])
    else:
        by_row = by_row_a - by_row_b
        resampled = np.concatenate([by_row[chunk].mean(axis=1) for chunk in chunks])
    resampled = resampled[np.isfinite(resampled)]
    if 2 * len(resampled) < num_samples:
        raise ValueError(
            f"the metric has a value on {len(resampled)} of {num_samples} resamples only; take more rows than these "
            f"{len(rows)}."
        )
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Comparison(
        difference=value_a - value_b,
        interval=(float(low), float(high)),
        p_value=_p_value(value_a, value_b, resampled),
        num_samples=len(resampled),
        route=route,
        value_a=value_a,
        value_b=value_b,
        num_rows=len(rows),
        num_seeds=(len(runs[0]), len(runs[1])),
    )


def _p_value(value_a: float, value_b: float, resampled: np.ndarray) -> float:
    difference = value_a - value_b
    rounding = ROUNDING * max(1.0, abs(value_a), abs(value_b))
    num_beyond = int((np.abs(resampled - difference) >= abs(difference) - rounding).sum())
    return (1 + num_beyond) / (1 + len(resampled))


def _by_seed(answers: Sequence[Any], rows: Sequence[Row], name: str) -> list[Sequence[Any]]:
    """The answers of each seed, as long as the rows each."""
    if len(answers) == len(rows) and not isinstance(answers, str):
        return [answers]
    lengths = [len(items) if isinstance(items, Sequence) and not isinstance(items, str) else -1 for items in answers]
    if not lengths or set(lengths) != {len(rows)}:
        got = f"lists of {lengths}" if lengths and min(lengths) >= 0 else f"{len(answers)} items"
        got = "one text" if isinstance(answers, str) else got
        raise ValueError(
            f"`{name}` has {got} for {len(rows)} rows; give an answer for each row, or a list of such lists, one for "
            "each seed."
        )
    return list(answers)


def _scored(metric: Metric, answers: Sequence[Any], rows: Sequence[Row]) -> Score:
    score = metric(answers, rows)
    if not math.isfinite(score.value):
        raise ValueError(
            f"the metric {score.name!r} is {score.value} on {len(rows)} rows; it cannot be compared where it is not a "
            "number: take more rows, or another metric."
        )
    return score


def _mean_value(scores: Sequence[Score]) -> float:
    return math.fsum(score.value for score in scores) / len(scores)


def _by_row(scores: Sequence[Score], num_rows: int) -> np.ndarray | None:
    """Each row's part, averaged over the seeds; None where a score has no such parts."""
    total = np.zeros(num_rows)
    for score in scores:
        if score.by_row is None:
            return None
        if len(score.by_row) != num_rows or not math.isclose(
            math.fsum(score.by_row) / num_rows, score.value, rel_tol=1e-6, abs_tol=1e-9
        ):
            raise ValueError(
                f"the metric {score.name!r} is {score.value}, which is not the mean of its {len(score.by_row)} "
                f"`by_row` for {num_rows} rows; make it so, or leave `by_row` out."
            )
        total += score.by_row
    return total / len(scores)


def _resamples(num_rows: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield places of rows, [resamples, rows], some resamples at a time; both routes draw these."""
    generator = np.random.default_rng(seed)
    num_at_once = max(1, NUM_HELD // num_rows)
    for start in range(0, num_samples, num_at_once):
        size = (min(num_at_once, num_samples - start), num_rows)
        yield generator.integers(0, num_rows, size=size, dtype=np.uint32)


def _resampled(
    metric: Metric, runs: tuple[list[Sequence[Any]], list[Sequence[Any]]], rows: Sequence[Row], index: np.ndarray
) -> float:
    """The difference of the metric's values on the rows at these places; not a number where it has none there."""
    places = index.tolist()
    drawn = [rows[place] for place in places]
    try:
        value_a, value_b = (
            _mean_value([metric([answers[place] for place in places], drawn) for answers in run]) for run in runs
        )
    except ValueError:  # as where all rows drawn are of one class
        return math.nan
    return value_a - value_b
