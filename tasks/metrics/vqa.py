"""`vqa_accuracy`: soft accuracy over the annotators' answers, by either of the two normalisers that papers use."""

import re
from collections.abc import Callable, Sequence
from typing import Literal

from tasks.metrics.answers import shares_by, texts_of
from tasks.metrics.score import Metric, Row, Score, check_lengths, mean_score

# A word that lacks one apostrophe of these becomes it. The official table has more entries, of no effect: those
# with a capital I, as words are lower-cased before they are looked up, and those that give a word for itself.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_CONTRACTED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the official table, too
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The official pattern for a period also means to spare one after a digit, but is mistyped and never does; and its flag
# re.UNICODE (32) is passed as the number of replacements, so that the 33rd period stays.
_MOST_PERIODS = 32
# The official script runs under Python 2, whose \d is 0 to 9 alone; M4C's runs under Python 3.
_PERIOD_ASCII, _PERIOD = re.compile(r"\.(?![0-9])"), re.compile(r"\.(?!\d)")
_NUMBER_COMMA = re.compile(r"[0-9],[0-9]")


def normalise_vqav2(text: str) -> str:
    """Normalise an answer as GT-Vision-Lab/VQA's vqaEval.py does, defects included.

    A punctuation mark is deleted if it stands beside a space anywhere in the text, or if the text has a comma between
    two digits; else it becomes a space. `'`, `:` and signs such as `$` and `%` stay. Then lower case, number words to
    digits, no articles, and apostrophes put into contractions.
    """
    text = _on_one_line(text)
    return _by_word(_PERIOD_ASCII.sub("", _without_marks(text, bool(_NUMBER_COMMA.search(text))), _MOST_PERIODS))


def normalise_evalai(text: str) -> str:
    """Normalise an answer as EvalAI's and M4C's evaluator does (LLaVA, llava/eval/m4c_evaluator.py).

    As `normalise_vqav2`, but lower case comes first, commas and question marks are dropped, and `'s` is set off.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _by_word(_PERIOD.sub("", _without_marks(_on_one_line(text), False), _MOST_PERIODS))


def vqa_accuracy(normaliser: Literal["vqav2", "evalai"]) -> Metric:
    """Make the VQA accuracy: for each annotator left out, min(1, matches among the others / 3), averaged.

    vqav2: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (VQAv2, OK-VQA). It normalises only where
        the annotators' answers are not all the same text.
    evalai: LLaVA, llava/eval/m4c_evaluator.py (TextVQA, VizWiz). It normalises always, and asserts ten answers.
    Rows have `references`, the annotators' answers; a lone one can never be matched, since it is left out. Where they
    have `answer_type` or `question_type` too, the parts are the accuracy of each. vqaEval.py rounds percentages to two
    digits; `value` is unrounded. Raises: ValueError for a row without references.
    """
    if normaliser not in ("vqav2", "evalai"):
        raise ValueError(f"normaliser must be 'vqav2' or 'evalai', got {normaliser!r}.")
    score_one = _vqav2_accuracy if normaliser == "vqav2" else _evalai_accuracy

    def metric(answers: Sequence[str], rows: Sequence[Row]) -> Score:
        check_lengths(answers, rows)
        references = [texts_of(row, number) for number, row in enumerate(rows)]
        by_row = [score_one(answer, texts) for answer, texts in zip(answers, references, strict=True)]
        parts = shares_by(rows, by_row, "answer_type") | shares_by(rows, by_row, "question_type")
        over = f"{len(rows)} questions, {_counts(references)} references each, normaliser {normaliser}"
        return mean_score("vqa_accuracy", by_row, over, parts)

    return metric


def _vqav2_accuracy(answer: str, references: Sequence[str]) -> float:
    answer, references = _on_one_line(answer), [_on_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer, references = normalise_vqav2(answer), _each(normalise_vqav2, references)
    return _left_out(answer, references)


def _evalai_accuracy(answer: str, references: Sequence[str]) -> float:
    return _left_out(normalise_evalai(answer), _each(normalise_evalai, references))


def _each(normalise: Callable[[str], str], references: Sequence[str]) -> list[str]:
    """Normalise the references; most annotators say the same, so each text once."""
    forms = {reference: normalise(reference) for reference in set(references)}
    return [forms[reference] for reference in references]


def _left_out(answer: str, references: Sequence[str]) -> float:
    matches = [reference == answer for reference in references]
    return sum(min(1.0, (sum(matches) - is_match) / 3) for is_match in matches) / len(matches)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str, is_number: bool) -> str:
    """Delete or space out each punctuation mark; which, is told from the text as it came."""
    forms = {}
    for mark in _PUNCTUATION:
        if mark in text:
            forms[ord(mark)] = "" if is_number or mark + " " in text or " " + mark in text else " "
    return text.translate(forms)


def _by_word(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def _counts(references: Sequence[Sequence[str]]) -> str:
    counts = sorted({len(texts) for texts in references})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
