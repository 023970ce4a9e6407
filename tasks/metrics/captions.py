"""`caption_scores`: CIDEr-D, BLEU, ROUGE-L and METEOR as the official COCO caption evaluation gives them."""

import shutil
from collections.abc import Sequence
from typing import Any, Literal

from tasks.metrics.score import Metric, Row, Score, check_lengths
from tasks.metrics.tokenizer import tokenize

# What the official scorers take: the tokens of a picture's texts, by the picture's place.
Tokenised = dict[int, list[str]]


def caption_metric(tokenizer: Literal["builtin", "ptb"] = "builtin", meteor: bool = False) -> Metric:
    """Return the metric of captions: one row a picture, with all its captions as `references`; one answer to each.

    The value is CIDEr-D ("CIDEr" in papers, which show it times 100), a mean over the pictures; parts are BLEU-1 to -4
    (over the whole set, closest reference length), ROUGE-L and, where asked for, METEOR 1.5. The scorers are those of
    pycocoevalcap (salaniz/pycocoevalcap, eval.py).

    tokenizer: "builtin" is `tasks.metrics.tokenizer` and needs no Java; "ptb" runs the official one.
    Raises: ValueError where Java is asked for and missing, or a row has no references.
    """
    if tokenizer not in ("builtin", "ptb"):
        raise ValueError(f"`tokenizer` (={tokenizer!r}) must be 'builtin' or 'ptb'.")
    for name, wanted in (("tokenizer='ptb'", tokenizer == "ptb"), ("meteor=True", meteor)):
        if wanted and shutil.which("java") is None:
            raise ValueError(f"{name} runs Java, and there is no `java` on PATH: install a JRE, or leave it out.")

    def metric(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
        gts, res = _tokenised(answers, rows, tokenizer)
        value, by_row = _cider(gts, res)
        parts = _bleu(gts, res) | {"rouge_l": _rouge(gts, res)[0]}
        if meteor:
            parts["meteor"] = _meteor(gts, res)
        return Score("cider", value, _over(rows, tokenizer), by_row, parts)

    return metric


def text_scores(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
    """Score texts by ROUGE-L against their references, a mean over the rows; BLEU-1 to -4 are parts.

    The tokenizer and the scorers are those of the captions: lower case, no punctuation; ROUGE-L has beta 1.2 and takes
    the best precision and the best recall over the references (pycocoevalcap, rouge/rouge.py). That is not the ROUGE
    of summarisation. Raises: ValueError, naming a row without references.
    """
    gts, res = _tokenised(answers, rows, "builtin")
    value, by_row = _rouge(gts, res)
    over = f"{len(rows)} texts, {_num_references(rows)}, tokens as for COCO captions (lower case, no punctuation)"
    return Score("rouge_l", value, over, by_row, _bleu(gts, res))


def _tokenised(answers: Sequence[Any], rows: Sequence[Row], tokenizer: str) -> tuple[Tokenised, Tokenised]:
    """Tokenise references and answers; each as one sequence, since the official input has them as lines of a file."""
    check_lengths(answers, rows)
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        where = f"row {number} (id {row.get('id')!r})"
        if not isinstance(answer, str):
            raise ValueError(f"{where}: the answer is a {type(answer).__name__}; give a text, an empty one for none.")
        if not row["references"]:
            raise ValueError(f"{where} has no references; score rows that have some.")
    run = _ptb if tokenizer == "ptb" else tokenize
    found = iter(run([_line(text) for row in rows for text in row["references"]]))
    gts = {number: [next(found) for _ in row["references"]] for number, row in enumerate(rows)}
    res = {number: [text] for number, text in enumerate(run([_line(answer) for answer in answers]))}
    return gts, res


def _line(text: str) -> str:
    """Put a text on one line; the official evaluation does so for line feeds only, and others shift its lines."""
    return " ".join(text.splitlines())


def _ptb(texts: list[str]) -> list[str]:
    """Tokenise with the official program."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({0: [{"caption": text} for text in texts]})[0]
    if len(found) != len(texts):
        raise ValueError(f"PTBTokenizer gave {len(found)} lines for {len(texts)} texts: see what Java has printed.")
    return found


def _cider(gts: Tokenised, res: Tokenised) -> tuple[float, tuple[float, ...]]:
    from pycocoevalcap.cider.cider import Cider

    if not any(text for texts in gts.values() for text in texts):
        raise ValueError("no reference has a word, so that nothing has a document frequency; give the references.")
    value, by_row = Cider().compute_score(gts, res)
    return float(value), tuple(map(float, by_row))


def _bleu(gts: Tokenised, res: Tokenised) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu

    values, _ = Bleu(4).compute_score(gts, res, verbose=0)
    return {f"bleu{order}": float(value) for order, value in enumerate(values, 1)}


def _rouge(gts: Tokenised, res: Tokenised) -> tuple[float, tuple[float, ...]]:
    from pycocoevalcap.rouge.rouge import Rouge

    value, by_row = Rouge().compute_score(gts, res)
    return float(value), tuple(map(float, by_row))


def _meteor(gts: Tokenised, res: Tokenised) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    value, _ = scorer.compute_score(gts, res)
    for stream in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):  # the scorer itself leaves them open
        if stream is not None:
            stream.close()
    return float(value)


def _over(rows: Sequence[Row], tokenizer: str) -> str:
    name = "Stanford PTBTokenizer 3.4.1" if tokenizer == "ptb" else "built-in tokenizer (as PTBTokenizer)"
    alone = "; with one picture every idf, and so CIDEr, is 0" if len(rows) == 1 else ""
    return f"{len(rows)} pictures, {_num_references(rows)}, idf from the references of this set, {name}{alone}"


def _num_references(rows: Sequence[Row]) -> str:
    fewest, most = (choose(len(row["references"]) for row in rows) for choose in (min, max))
    return f"{fewest} references each" if fewest == most else f"{fewest} to {most} references each"


caption_scores = caption_metric()
