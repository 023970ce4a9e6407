"""`glue_metric`: what the official GLUE metrics give for labels by name, or numbers for STS-B."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from tasks.metrics.score import Metric, Row, Score, check_lengths, mean_score

LABELS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "cola": ("unacceptable", "acceptable"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
}
# The class whose F1 it is: number 1 of the official labels.
POSITIVE = {"mrpc": "equivalent", "qqp": "duplicate"}


def glue_metric(name: str) -> Metric:
    """Return a GLUE task's metric: Matthews' correlation for CoLA, Pearson's for STS-B, accuracy for the others.

    Those are the values of the ReFT paper's table. Parts: F1 and its mean with accuracy for MRPC and QQP, Spearman's
    correlation and its mean with Pearson's for STS-B; the mean is the `combined_score` of stanfordnlp/pyreft,
    examples/loreft/compute_metrics.py. Each is computed as by the hub's `evaluate` (metrics/glue/glue.py).

    An answer that is no label is wrong. Raises: ValueError for an unknown task, a row's label that is none of the
    task's, and texts that are no numbers in STS-B.
    """
    if name == "stsb":
        return _stsb
    if name not in LABELS:
        raise ValueError(f"`name` (={name!r}) must be one of {[*LABELS, 'stsb']}.")

    def metric(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
        truth = _truth(answers, rows, LABELS[name])
        return _cola(answers, truth) if name == "cola" else _accuracy(answers, truth, POSITIVE.get(name))

    return metric


def _truth(answers: Sequence[Any], rows: Sequence[Row], labels: tuple[str, ...]) -> list[str]:
    check_lengths(answers, rows)
    for number, row in enumerate(rows):
        if row["answer"] not in labels:
            raise ValueError(f"row {number}: the label {row['answer']!r} is none of {list(labels)}; mend the data.")
    return [row["answer"] for row in rows]


def _accuracy(answers: Sequence[Any], truth: list[str], positive: str | None) -> Score:
    by_row = [float(answer == label) for answer, label in zip(answers, truth, strict=True)]
    over = f"{len(truth)} rows"
    if positive is None:
        return mean_score("accuracy", by_row, over)
    from sklearn.metrics import f1_score

    is_true, is_said = [label == positive for label in truth], [answer == positive for answer in answers]
    f1 = float(f1_score(is_true, is_said, zero_division=0.0))  # pyright: ignore[reportArgumentType]
    combined = (sum(by_row) / len(by_row) + f1) / 2
    return mean_score("accuracy", by_row, f"{over}; F1 of {positive!r}", {"f1": f1, "combined": combined})


def _cola(answers: Sequence[Any], truth: list[str]) -> Score:
    """Matthews' correlation; 0 where all answers, or all labels, are the same, as scikit-learn has it."""
    from sklearn.metrics import matthews_corrcoef

    said = [answer if answer in LABELS["cola"] else "" for answer in answers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a single label, which is no fault here
        value = float(matthews_corrcoef(truth, said))
    return Score("matthews", value, f"{len(truth)} rows")


def _stsb(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
    """Pearson's correlation. It is not defined, and NaN as in the official code, where all numbers are the same."""
    from scipy.stats import pearsonr, spearmanr

    check_lengths(answers, rows)
    if len(rows) < 2:
        raise ValueError(f"a correlation needs two rows or more, not {len(rows)}.")
    said = [_number(answer, f"the answer to row {number}") for number, answer in enumerate(answers)]
    truth = [_number(row["answer"], f"the label of row {number}") for number, row in enumerate(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of constant numbers; `over` says so
        pearson, spearman = (float(correlate(said, truth)[0]) for correlate in (pearsonr, spearmanr))  # pyright: ignore[reportArgumentType]
    over = f"{len(rows)} rows" + ("; not defined (NaN), for all numbers are the same" if math.isnan(pearson) else "")
    return Score("pearson", pearson, over, None, {"spearman": spearman, "combined": (pearson + spearman) / 2})


def _number(text: Any, where: str) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} (={text!r}) must be a finite number, as text.")
    return number
