# ruff: noqa: RUF001 (typographic signs are what some of the texts are about)
"""Laws of the caption scores: the official tokens and the official numbers, as `golden/record_captions.py` has them."""

import gzip
import json
import shutil
import time
from pathlib import Path

import pytest

from tasks.metrics.captions import caption_metric, caption_scores, text_scores
from tasks.metrics.tokenizer import DROPPED, tokenize, tokens

RECORD = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "captions.json.gz").read_bytes()))
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer and METEOR need Java")


@pytest.fixture(scope="module")
def ours():
    return tokenize(RECORD["texts"])


def differing(ours, start, stop):
    return [(a, b) for a, b in zip(ours[start:stop], RECORD["tokens"][start:stop], strict=True) if a != b]


def set_of(case):
    """Return answers and rows of a recorded set: five texts of six are a picture's references."""
    starts = range(case["start"], case["start"] + 6 * len(case["answers"]), 6)
    return case["answers"], [{"id": str(at), "references": RECORD["texts"][at : at + 5]} for at in starts]


def rows_of(*references):
    return [{"id": str(number), "references": texts} for number, texts in enumerate(references)]


# --- tokens -------------------------------------------------------------------------------------------------------


def test_tokens_of_captions_are_the_official_ones(ours):
    assert RECORD["num_plain"] >= 3000
    assert differing(ours, 0, RECORD["num_plain"]) == []


def test_tokens_of_hard_texts_are_nearly_always_the_official_ones(ours):
    num_hard = len(ours) - RECORD["num_plain"]
    assert num_hard >= 2000
    assert len(differing(ours, RECORD["num_plain"], None)) <= num_hard / 100


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A man's dog isn't here, he cannot stay!", "a man 's dog is n't here he can not stay"),
        ('the "STOP" sign (red) on 5th Ave. at 3:30 p.m.', "the stop sign -lrb- red -rrb- on 5th ave. at 3:30 p.m."),
        ("it’s 50% off... $5.00 & 1/2 – “new”", "it 's 50 % off $ 5.00 & 1/2 new"),
        ("a well-known t-shirt and/or 80's '90s hats", "a well-known t-shirt and/or 80 's '90s hats"),
        ("", ""),
        (" . ,\t- ' \n", ""),
        ("a 🚲 by 東京", "a by 東京"),
        ("3 1/2 feet", "3\u00a01/2 feet"),
    ],
)
def test_tokens_by_example(text, wanted):
    assert " ".join(tokens(text)) == wanted


def test_an_initial_ends_by_what_the_next_text_starts_with():
    assert tokenize(["the letter C.", "The man"])[0] == "the letter c"
    assert tokenize(["the letter C.", "Man here"])[0] == "the letter c."


def test_no_token_has_a_space_or_is_dropped_punctuation(ours):
    found = {token for text in ours for token in text.split(" ") if text}
    assert "" not in found
    assert not found & DROPPED


def test_every_character_can_be_tokenised():
    for code in range(0x21, 0x11000, 41):
        assert tokens(f"one {chr(code)} two")[0] == "one"
        assert tokens(f"one {chr(code)} two")[-1] == "two"


@pytest.mark.parametrize("part", ["a", "a-", "a,", "a'", "a.", "1,", "<", "@", "&", "http://a", "n't", "🚲"])
def test_a_long_text_takes_no_time_out_of_proportion(part):
    text = part * (4000 // len(part))
    start = time.perf_counter()
    tokens(text)
    assert time.perf_counter() - start < 5


# --- scores -------------------------------------------------------------------------------------------------------


def test_enough_captions_are_recorded():
    assert sum(6 * len(case["answers"]) for case in RECORD["sets"]) >= 2000


@pytest.mark.parametrize("case", RECORD["sets"], ids=lambda case: str(case["start"]))
def test_scores_are_the_official_ones(case):
    answers, rows = set_of(case)
    score = caption_scores(answers, rows)
    parts = {f"bleu{order}": value for order, value in enumerate(case["bleu"], 1)} | {"rouge_l": case["rouge_l"]}
    found = (score.value, list(score.by_row), dict(score.parts))
    if case["start"] < RECORD["num_plain"]:
        assert found == (case["cider"], case["by_row"], parts)
    else:  # hard texts, where few tokens differ
        assert score.value == pytest.approx(case["cider"], abs=0.01)
        assert score.parts == pytest.approx(parts, abs=0.005)


@needs_java
def test_scores_by_the_official_tokenizer_are_those_recorded():
    case = RECORD["sets"][-1]
    score = caption_metric("ptb")(*set_of(case))
    assert (score.value, list(score.by_row)) == (case["cider"], case["by_row"])
    assert "PTBTokenizer 3.4.1" in score.over


@needs_java
@pytest.mark.slow
def test_meteor_is_the_one_recorded():
    case = RECORD["sets"][-1]
    assert caption_metric("ptb", meteor=True)(*set_of(case)).parts["meteor"] == case["meteor"]


def test_value_is_the_mean_of_the_pictures():
    score = caption_scores(*set_of(RECORD["sets"][0]))
    assert score.value == pytest.approx(sum(score.by_row) / len(score.by_row), rel=1e-12)


def test_over_says_what_cider_depends_on():
    rows = rows_of(["a cat", "the cat"], ["a dog"])
    assert caption_scores(["a cat", "a dog"], rows).over == (
        "2 pictures, 1 to 2 references each, idf from the references of this set, built-in tokenizer (as PTBTokenizer)"
    )


def test_one_picture_has_a_cider_of_zero_and_says_so():
    score = caption_scores(["a red cat"], rows_of(["a red cat"]))
    assert score.value == 0
    assert score.parts["bleu1"] == pytest.approx(1)
    assert "CIDEr, is 0" in score.over


def test_empty_answers_score_zero():
    score = caption_scores(["", " . "], rows_of(["a red cat sits"], ["a blue dog runs"]))
    assert (score.value, score.by_row, score.parts["rouge_l"]) == (0, (0, 0), 0)
    assert score.parts["bleu1"] < 1e-9


def test_a_line_break_does_not_shift_the_other_texts():
    rows = rows_of(["a red cat sits\rdown"], ["a blue dog runs\u2028away"])
    plain = rows_of(["a red cat sits down"], ["a blue dog runs away"])
    answers = ["a red\ncat", "a blue\r\ndog runs"]
    assert caption_scores(answers, rows) == caption_scores(["a red cat", "a blue dog runs"], plain)


def test_nothing_is_printed(capfd):
    caption_scores(["a cat", "a dog"], rows_of(["a cat"], ["a dog"]))
    assert capfd.readouterr() == ("", "")


def test_texts_are_scored_by_rouge_l():
    score = text_scores(["the red cat", "nothing"], rows_of(["The red cat."], ["a dog"]))
    assert (score.name, score.value, score.by_row) == ("rouge_l", 0.5, (1, 0))
    assert set(score.parts) == {"bleu1", "bleu2", "bleu3", "bleu4"}
    half = text_scores(["a b"], rows_of(["a b c d"]))  # precision 1, recall 1/2, beta 1.2
    assert half.value == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [caption_scores, text_scores])
def test_rows_and_answers_that_cannot_be_scored_are_named(metric):
    with pytest.raises(ValueError, match="1 answers to 2 rows"):
        metric(["a"], rows_of(["a"], ["b"]))
    with pytest.raises(ValueError, match=r"row 1 \(id '1'\) has no references"):
        metric(["a", "b"], rows_of(["a"], []))
    with pytest.raises(ValueError, match=r"row 0 \(id '0'\): the answer is a list"):
        metric([["a"]], rows_of(["a"]))


def test_references_without_a_word_are_refused():
    with pytest.raises(ValueError, match="no reference has a word"):
        caption_scores(["a"], rows_of(["."]))


@pytest.mark.parametrize("options", [{"tokenizer": "ptb"}, {"meteor": True}])
def test_java_is_asked_for_where_it_is_missing(options, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="no `java` on PATH: install a JRE"):
        caption_metric(**options)


def test_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="must be 'builtin' or 'ptb'"):
        caption_metric("spacy")  # pyright: ignore[reportArgumentType]
