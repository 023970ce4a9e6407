"""Metrics of short answers, each with the parsing of its benchmark's official script.

Answers are scored as they are given. The official pipelines strip a model's output when they decode it, as generation
does here; the scripts themselves do not, save where it is said.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from tasks.metrics.score import Metric, Row, Score, check_lengths, mean_score

_LETTERS = "ABCDE"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the last dot stands for any character, as in the official script
_NUMBER = re.compile(r"-?\d+\.?\d*")

# What an answer to each of the eight commonsense sets looks like.
_ANSWER = re.compile("answer[1-5]")
_COMMONSENSE: Mapping[str, re.Pattern[str]] = {
    "boolq": re.compile("true|false"),
    "piqa": re.compile("solution[12]"),
    "social_i_qa": _ANSWER,
    "hellaswag": re.compile("ending[1-4]"),
    "winogrande": re.compile("option[12]"),
    "ARC-Easy": _ANSWER,
    "ARC-Challenge": _ANSWER,
    "openbookqa": _ANSWER,
}
_ARITHMETIC = ("AQuA", "gsm8k", "mawps", "SVAMP", "AddSub", "MultiArith", "SingleEq")


def exact_match(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score the share of answers that equal the row's `answer`, both stripped of white space and case-folded."""
    return _share("exact_match", answers, rows, lambda answer, row: _folded(answer) == _folded(row["answer"]))


def gqa_accuracy(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score GQA: the answer without its last periods and in lower case is the row's `answer`.

    The answer is changed as LLaVA's scripts/convert_gqa_for_eval.py does; the row's is not. Where rows have
    `structural` (verify, query, choose, logical, compare), parts hold what GQA's eval.py reports of it: the accuracy of
    each, of "open" (query) and of "binary" questions (the others); likewise of each `semantic` type.
    """
    score = _share("gqa_accuracy", answers, rows, lambda answer, row: answer.rstrip(".").lower() == row["answer"])
    by_row = score.by_row or ()
    parts = shares_by(rows, by_row, "structural") | shares_by(rows, by_row, "semantic")
    if all("structural" in row for row in rows):
        forms = [{"form": "open" if row["structural"] == "query" else "binary"} for row in rows]
        parts |= shares_by(forms, by_row, "form")
    return replace(score, parts=parts)


def scienceqa_accuracy(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score ScienceQA as LLaVA's llava/eval/eval_science_qa.py does.

    An answer is a letter alone, or begins with "X. ", or has "The answer is X." in it once; anything else is wrong.
    Rows have `answer`, the letter of a choice (A to E), so that one past the choices is wrong, too; and `has_image`.
    Parts: `img_accuracy` over the rows with a picture, if there are any.
    """
    score = _share("scienceqa_accuracy", answers, rows, lambda answer, row: _letter(answer) == row["answer"])
    pairs = zip(score.by_row or (), rows, strict=True)
    with_image = [share for share, row in pairs if row["has_image"]]
    parts = {"img_accuracy": sum(with_image) / len(with_image)} if with_image else {}
    return replace(score, over=f"{score.over}, {len(with_image)} with a picture", parts=parts)


def pope_scores(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score one category of POPE: the F1 of "yes", as LLaVA's llava/eval/eval_pope.py does.

    An answer is "no" if, of its first sentence without commas, one word is "No", "no" or "not"; else it is "yes". Rows
    have `answer`, yes or no. Parts: accuracy, precision, recall, yes_ratio. Where the official script divides by zero
    (nothing answered yes, nothing to be found), the share is 0. Raises: ValueError for another `answer`.
    """
    check_lengths(answers, rows)
    said = [not {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")) for answer in answers]
    true = [_is_yes(row, number) for number, row in enumerate(rows)]
    num_hits = sum(a and b for a, b in zip(said, true, strict=True))
    precision, recall = _ratio(num_hits, sum(said)), _ratio(num_hits, sum(true))
    parts = {
        "accuracy": sum(a == b for a, b in zip(said, true, strict=True)) / len(rows),
        "precision": precision,
        "recall": recall,
        "yes_ratio": sum(said) / len(rows),
    }
    over = f"{len(rows)} questions, {sum(true)} with the answer yes"
    return Score("pope_f1", _ratio(2 * precision * recall, precision + recall), over, parts=parts)


def anls(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score the average normalised Levenshtein similarity to the nearest of the row's `references`, 0 below 0.5.

    As the challenges' script does it (rrc.cvc.uab.es; so do Qwen-VL's infographicsvqa_eval.py and lmms-eval): the
    distance is of texts in lower case with single spaces, the length that of the texts as given, and a similarity of
    just 0.5 counts. Parts: `strict`, by the formula of the papers (ST-VQA, arXiv 1905.13648, eq. 1; DocVQA), where a
    distance of just 0.5 gives 0, with the length of the texts compared (as the package `anls` does).
    """
    check_lengths(answers, rows)
    texts = [texts_of(row, number) for number, row in enumerate(rows)]
    pairs = [[_similarities(answer, text) for text in some] for answer, some in zip(answers, texts, strict=True)]
    by_row, strict = ([max(pair[place] for pair in some) for some in pairs] for place in (0, 1))
    over = f"{len(rows)} questions, {sum(map(len, texts)) / len(texts):.4g} references each, threshold 0.5"
    return mean_score("anls", by_row, over, {"strict": sum(strict) / len(strict)})


def aokvqa_accuracy(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score A-OKVQA's direct answers: min(1, matches / 3) over the row's `references`, with no normalisation.

    As allenai/aokvqa's evaluation/eval_predictions.py does it: of rows with `difficult_direct_answer` those where it is
    true do not count, and then `by_row` is None. Parts: `multiple_choice` where rows have `choices` and `correct` (the
    text of the right one): the share, of all rows, of answers that are that text. The official repository can map an
    answer to the choice with the nearest GloVe embedding first (remap_predictions.py); here one that is no choice is
    wrong. Raises: ValueError if no row counts.
    """
    check_lengths(answers, rows)
    pairs = list(zip(answers, rows, strict=True))
    direct = [min(1.0, texts_of(row, number).count(answer) / 3) for number, (answer, row) in enumerate(pairs)]
    counted = [share for share, row in zip(direct, rows, strict=True) if not row.get("difficult_direct_answer")]
    if not counted:
        raise ValueError(f"all {len(rows)} rows are `difficult_direct_answer`, which do not count; give others, too.")
    parts = {}
    if all("choices" in row and "correct" in row for row in rows):
        parts["multiple_choice"] = sum(answer == row["correct"] for answer, row in pairs) / len(rows)
    score = mean_score("aokvqa_accuracy", counted, f"direct answers to {len(counted)} of {len(rows)} questions", parts)
    return score if len(counted) == len(rows) else replace(score, by_row=None)


def commonsense_accuracy(
    extraction: Literal["pyreft", "llm-adapters"] = "pyreft", trigger: str = "the correct answer is "
) -> Metric:
    """Make the accuracy on the eight commonsense sets; rows have `subset` and `answer` (true, solution1, ...).

    pyreft: examples/loreft/compute_metrics.py, which gave the ReFT paper's numbers. What follows the first `trigger`,
        stripped, must be the answer and no more; an answer without the trigger is wrong. Give an empty one where the
        prompt ends with it, so that answers do not have it.
    llm-adapters: commonsense_evaluate.py, which gave the numbers of the LoRA and adapter rows. The first word of the
        set's form anywhere in the answer counts ("true" in "untrue"), whatever follows; the trigger is not needed.
    Parts: the accuracy of each subset; papers report their plain mean. Raises: ValueError for another subset.
    """
    if extraction not in ("pyreft", "llm-adapters"):
        raise ValueError(f"extraction must be 'pyreft' or 'llm-adapters', got {extraction!r}.")

    def is_right(answer: str, row: Row) -> bool:
        if extraction == "pyreft":
            rest = answer.partition(trigger)[2] if trigger else answer
            return rest.strip() == row["answer"].strip()
        first = _COMMONSENSE[row["subset"]].search(answer)
        return (first.group() if first else "") == row["answer"]

    def metric(answers: Sequence[str], rows: Sequence[Row]) -> Score:
        _check_subsets(rows, tuple(_COMMONSENSE))
        score = _share("commonsense_accuracy", answers, rows, is_right)
        parts = shares_by(rows, score.by_row or (), "subset")
        return replace(score, over=f"{score.over}, extraction {extraction}", parts=parts)

    return metric


def arithmetic_accuracy(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score arithmetic as LLM-Adapters' evaluate.py does: the last number, commas removed, is within 0.001 of `answer`.

    For AQuA it is the first of the letters A to E anywhere, so "Answer: C" says A. pyreft's compute_metrics.py has the
    same extraction, tells AQuA from the rest by an `answer` that is no number, and takes mawps, which the former
    refuses. Rows have `subset` (AQuA, gsm8k, mawps, SVAMP, AddSub, MultiArith, SingleEq) and `answer`. Parts: the
    accuracy of each subset. Raises: ValueError for another subset, or for an `answer` that is no number outside AQuA.
    """
    _check_subsets(rows, _ARITHMETIC)
    golds = {number: _gold(row, number) for number, row in enumerate(rows) if row["subset"] != "AQuA"}

    def is_right(number: int, answer: str) -> bool:
        if number not in golds:
            return next((letter for letter in answer if letter in _LETTERS), "") == rows[number]["answer"].strip()
        numbers = _NUMBER.findall(answer.replace(",", ""))
        return bool(numbers) and abs(golds[number] - float(numbers[-1])) <= 0.001

    check_lengths(answers, rows)
    by_row = [float(is_right(number, answer)) for number, answer in enumerate(answers)]
    over = f"{len(rows)} questions, last number within 0.001 (AQuA: first letter)"
    return mean_score("arithmetic_accuracy", by_row, over, shares_by(rows, by_row, "subset"))


def shares_by(rows: Sequence[Row], by_row: Sequence[float], column: str) -> dict[str, float]:
    """Return the mean of the rows' scores for each value of a column; nothing if rows lack it."""
    if not all(column in row for row in rows):
        return {}
    groups: dict[str, list[float]] = {}
    for row, share in zip(rows, by_row, strict=True):
        groups.setdefault(str(row[column]), []).append(share)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def texts_of(row: Row, number: int) -> list[str]:
    """Return a row's `references`. Raises: ValueError for none."""
    if not row["references"]:
        raise ValueError(f"{_named(row, number)} has no references to compare the answer with; leave the row out.")
    return list(row["references"])


def _share(name: str, answers: Sequence[str], rows: Sequence[Row], is_right: Callable[[str, Row], bool]) -> Score:
    check_lengths(answers, rows)
    by_row = [float(is_right(answer, row)) for answer, row in zip(answers, rows, strict=True)]
    return mean_score(name, by_row, f"{len(rows)} questions")


def _named(row: Row, number: int) -> str:
    return f"row {number} (id {row.get('id')!r})"


def _folded(text: str) -> str:
    return text.strip().casefold()


def _letter(answer: str) -> str:
    """Return the letter that an answer to a ScienceQA question names; "" if none or several."""
    if answer in tuple(_LETTERS):
        return answer
    if answer[:1] in tuple(_LETTERS) and answer[1:3] == ". ":
        return answer[0]
    found = _ANSWER_IS.findall(answer)
    return found[0] if len(found) == 1 else ""


def _is_yes(row: Row, number: int) -> bool:
    if row["answer"] not in ("yes", "no"):
        raise ValueError(f"{_named(row, number)}: `answer` must be 'yes' or 'no', got {row['answer']!r}.")
    return row["answer"] == "yes"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _similarities(answer: str, text: str) -> tuple[float, float]:
    """Return two texts' similarity by the challenges' script and by the papers' formula."""
    a, b = (" ".join(one.lower().split()) for one in (answer, text))
    num_edits = _edit_distance(a, b)
    similarity = 1 - _ratio(num_edits, _longest(answer, text))
    distance = _ratio(num_edits, _longest(a, b))
    return similarity if similarity >= 0.5 else 0.0, 1 - distance if distance < 0.5 else 0.0


def _longest(*texts: str) -> int:
    return max(len(text.upper()) for text in texts)  # as the scripts have it; upper case can be longer ("ß")


def _edit_distance(a: str, b: str) -> int:
    """Count the fewest insertions, deletions and replacements of a character that turn one text into the other."""
    last = list(range(len(b) + 1))
    for row, letter in enumerate(a, 1):
        now = [row]
        for column, other in enumerate(b, 1):
            now.append(min(last[column] + 1, now[-1] + 1, last[column - 1] + (letter != other)))
        last = now
    return last[-1]


def _check_subsets(rows: Sequence[Row], known: Sequence[str]) -> None:
    for number, row in enumerate(rows):
        if row["subset"] not in known:
            raise ValueError(f"{_named(row, number)}: no subset {row['subset']!r}; there are {', '.join(known)}.")


def _gold(row: Row, number: int) -> float:
    try:
        return float(row["answer"])
    except ValueError as error:
        raise ValueError(
            f"{_named(row, number)}: `answer` must be a number without commas ({row['subset']}), got {row['answer']!r}."
        ) from error
