"""Metrics of short answers: what the official scripts say of thousands of answers (tests/golden/record_answers.py)."""

import gzip
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tasks.metrics.answers import (
    anls,
    aokvqa_accuracy,
    arithmetic_accuracy,
    commonsense_accuracy,
    exact_match,
    gqa_accuracy,
    pope_scores,
    scienceqa_accuracy,
)
from tasks.metrics.score import Score
from tasks.metrics.vqa import normalise_evalai, normalise_vqav2, vqa_accuracy

GOLDEN = Path(__file__).parent / "golden" / "answers.json.gz"
Case = dict[str, Any]


@cache
def golden(name: str) -> Case:
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as file:
        return json.load(file)[name]


def answers_to(cases: Sequence[Case]) -> list[str]:
    return [case["answer"] for case in cases]


def chosen(case: Case) -> list[str]:
    return [case["texts"][int(place)] for place in case["which"]]


def assert_shares(score: Score, cases: Sequence[Case], official: Sequence[Any]) -> None:
    """Compare each row; shares that the official script has in percent, with 13 digits, are a little off."""
    assert score.by_row is not None
    assert len(score.by_row) == len(cases) == len(official) >= 2000
    pairs = zip(cases, score.by_row, map(float, official), strict=True)
    assert [(case, ours, theirs) for case, ours, theirs in pairs if abs(ours - theirs) > 1e-12] == []
    assert score.value == pytest.approx(sum(map(float, official)) / len(official), abs=1e-12)
    assert 0.1 < score.value < 0.9  # or the cases would tell little


# VQA


@pytest.mark.parametrize("normaliser", ["vqav2", "evalai"])
def test_vqa_accuracy_is_the_official_one(normaliser):
    cases, official = golden("vqa")["cases"], golden("vqa")[normaliser]
    rows = [{"references": chosen(case)} for case in cases]
    score = vqa_accuracy(normaliser)(answers_to(cases), rows)
    assert_shares(score, cases, official["scores"])
    assert score.over == f"{len(cases)} questions, 1 to 12 references each, normaliser {normaliser}"


def test_vqa_accuracy_is_the_official_total():
    cases, total = golden("vqa")["cases"], golden("vqa")["vqav2"]["overall"]
    score = vqa_accuracy("vqav2")(answers_to(cases), [{"references": chosen(case)} for case in cases])
    assert 100 * score.value == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize(("name", "normalise"), [("vqav2", normalise_vqav2), ("evalai", normalise_evalai)])
def test_normalised_text_is_the_official_one(name, normalise):
    cases, forms = golden("vqa")["cases"], golden("vqa")[name]["forms"]
    assert len(cases) == len(forms) >= 2000
    ours = [normalise(case["answer"]) for case in cases]
    assert [both for both in zip(answers_to(cases), ours, forms, strict=True) if both[1] != both[2]] == []


def test_the_two_normalisers_differ_where_their_docstrings_say():
    assert (normalise_vqav2("man's hat"), normalise_evalai("man's hat")) == ("man's hat", "man 's hat")
    assert (normalise_vqav2("red,blue"), normalise_evalai("red,blue")) == ("red blue", "redblue")
    assert normalise_vqav2("." * 35) == normalise_evalai("." * 35) == "..."
    assert normalise_vqav2("the couldnt've") == "couldn't've"
    assert normalise_vqav2("a-b-\tc") == "ab c"
    assert normalise_vqav2("Im a-b 1,000") == "im ab 1000"


def test_identical_references_are_not_normalised_by_vqav2_alone():
    rows = [{"references": ["Two"] * 10}]
    assert vqa_accuracy("vqav2")(["two"], rows).value == 0
    assert vqa_accuracy("evalai")(["two"], rows).value == 1


def test_vqa_accuracy_by_number_of_annotators_who_agree():
    rows = [{"references": ["red"] * num + [f"x{i}" for i in range(10 - num)]} for num in range(6)]
    assert vqa_accuracy("vqav2")(["red"] * 6, rows).by_row == pytest.approx((0, 0.3, 0.6, 0.9, 1, 1))


def test_vqa_accuracy_of_each_answer_type():
    rows = [{"references": ["a b"] * 10, "answer_type": kind} for kind in ("other", "number", "other")]
    score = vqa_accuracy("vqav2")(["a b", "a b", "c"], rows)
    assert score.parts == {"other": 0.5, "number": 1.0}


# One text


def test_gqa_accuracy_is_the_official_one():
    cases = golden("gqa")["cases"]
    score = gqa_accuracy(answers_to(cases), [{"answer": case["text"]} for case in cases])
    assert_shares(score, cases, golden("gqa")["right"])
    assert score.parts == {}


def test_gqa_accuracy_of_binary_and_open_questions():
    kinds = ["query", "query", "verify", "logical", "choose"]
    rows = [{"answer": "yes", "structural": kind, "semantic": "obj"} for kind in kinds]
    score = gqa_accuracy(["Yes.", "no", "no", "yes", "no"], rows)
    assert score.parts == pytest.approx(
        {"query": 0.5, "verify": 0, "logical": 1, "choose": 0, "obj": 0.4, "open": 0.5, "binary": 1 / 3}
    )


def test_exact_match_strips_and_folds_case_and_no_more():
    pairs = [(" Yes\n", "yes"), ("STRASSE", "straße"), ("yes.", "yes"), ("a cat", "cat"), ("", " ")]
    score = exact_match([answer for answer, _ in pairs], [{"answer": text} for _, text in pairs])
    assert score.by_row == (1, 1, 0, 0, 1)


def test_exact_match_undoes_case_and_margins_of_many_texts():
    texts = [case["text"] for case in golden("gqa")["cases"]]
    changed = [f"\t{text.upper()} \n" for text in texts]
    assert exact_match(changed, [{"answer": text} for text in texts]).value == 1
    assert exact_match([text + "x" for text in texts], [{"answer": text} for text in texts]).value == 0


# Choices and yes or no


def science_rows(cases: Sequence[Case]) -> list[Case]:
    return [{"answer": case["gold"], "choices": ["x"] * case["num"], "has_image": case["image"]} for case in cases]


def test_scienceqa_accuracy_is_the_official_one():
    cases = golden("scienceqa")["cases"]
    score = scienceqa_accuracy(answers_to(cases), science_rows(cases))
    assert_shares(score, cases, golden("scienceqa")["right"])
    ours = [f"{100 * share:.2f}" for share in (score.value, score.parts["img_accuracy"])]
    assert ours == golden("scienceqa")["percent"]


def test_scienceqa_without_pictures_has_no_accuracy_of_them():
    score = scienceqa_accuracy(["A"], [{"answer": "A", "choices": ["x", "y"], "has_image": False}])
    assert (score.value, score.parts, score.over) == (1, {}, "1 questions, 0 with a picture")


def test_pope_scores_are_the_official_ones():
    cases, groups = golden("pope")["cases"], golden("pope")["groups"]
    assert len(cases) == 50 * len(groups) >= 2000
    for place, official in enumerate(groups):
        some = cases[50 * place : 50 * place + 50]
        score = pope_scores(answers_to(some), [{"answer": case["gold"]} for case in some])
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        ours = {**score.parts, "f1": score.value}
        assert [ours[name] for name in names] == pytest.approx(official, abs=1e-12)
        assert score.by_row is None


def test_pope_answers_are_read_as_the_official_script_reads_them():
    cases = golden("pope")["cases"]
    ours = [pope_scores([case["answer"]], [{"answer": "yes"}]).parts["yes_ratio"] for case in cases]
    theirs = [float(flag) for flag in golden("pope")["is_yes"]]
    assert [both for both in zip(answers_to(cases), ours, theirs, strict=True) if both[1] != both[2]] == []
    assert 0.1 < sum(theirs) / len(theirs) < 0.9


def test_pope_of_no_yes_at_all_is_zero():
    score = pope_scores(["no", "no"], [{"answer": "yes"}, {"answer": "no"}])
    assert (score.value, score.parts["precision"], score.parts["accuracy"]) == (0, 0, 0.5)


# Several references


def test_anls_is_the_challenges_and_strictly_the_papers():
    cases, official = golden("anls")["cases"], golden("anls")
    rows = [{"references": case["texts"]} for case in cases]
    score = anls(answers_to(cases), rows)
    assert_shares(score, cases, official["scores"])
    strict = [anls([case["answer"]], [row]).parts["strict"] for case, row in zip(cases, rows, strict=True)]
    assert strict == pytest.approx(official["strict"], abs=1e-12)
    assert score.parts["strict"] == pytest.approx(sum(strict) / len(strict), abs=1e-12)
    assert sum(ours != theirs for ours, theirs in zip(strict, official["scores"], strict=True)) > 100


def test_anls_at_the_threshold():
    score = anls(["ab", "abc", ""], [{"references": ["ac"]}, {"references": ["axx"]}, {"references": [""]}])
    assert score.by_row == (0.5, 0, 1)
    assert score.parts["strict"] == pytest.approx(1 / 3)


def aokvqa_rows(cases: Sequence[Case]) -> list[Case]:
    return [
        {
            "references": chosen(case),
            "choices": case["choices"],
            "correct": case["choices"][case["correct"]],
            "difficult_direct_answer": case["difficult"],
        }
        for case in cases
    ]


def test_aokvqa_accuracy_is_the_official_one():
    cases, official = golden("aokvqa")["cases"], golden("aokvqa")
    rows = aokvqa_rows(cases)
    easy = [{**row, "difficult_direct_answer": False} for row in rows]
    assert_shares(aokvqa_accuracy(answers_to(cases), easy), cases, official["direct"])
    score = aokvqa_accuracy(answers_to(cases), rows)
    assert [100 * score.value, 100 * score.parts["multiple_choice"]] == pytest.approx(official["overall"], abs=1e-10)
    assert score.by_row is None
    assert score.over == f"direct answers to {sum(not c['difficult'] for c in cases)} of {len(cases)} questions"


# Commonsense and arithmetic


@pytest.mark.parametrize("extraction", ["pyreft", "llm-adapters"])
def test_commonsense_accuracy_is_the_official_one(extraction):
    cases = golden("commonsense")["cases"]
    rows = [{"answer": case["gold"], "subset": case["subset"]} for case in cases]
    score = commonsense_accuracy(extraction)(answers_to(cases), rows)
    assert_shares(score, cases, golden("commonsense")[extraction])
    assert len(score.parts) == 8
    assert extraction in score.over


def test_commonsense_without_a_trigger_takes_the_whole_answer():
    rows = [{"answer": "true", "subset": "boolq"}] * 3
    said = ["true", "true.", "the correct answer is true"]
    assert commonsense_accuracy("pyreft")(said, rows).by_row == (0, 0, 1)
    assert commonsense_accuracy("pyreft", trigger="")(said, rows).by_row == (1, 0, 0)
    assert commonsense_accuracy("llm-adapters")(said, rows).by_row == (1, 1, 1)


@pytest.mark.parametrize("official", ["pyreft", "llm-adapters"])
def test_arithmetic_accuracy_is_the_official_one(official):
    cases = golden("arithmetic")["cases"]
    if official == "llm-adapters":
        cases = [case for case in cases if case["subset"] != "mawps"]
    rows = [{"answer": case["gold"], "subset": case["subset"]} for case in cases]
    score = arithmetic_accuracy(answers_to(cases), rows)
    assert_shares(score, cases, golden("arithmetic")[official])


def test_arithmetic_parts_are_those_of_each_subset():
    rows = [
        {"answer": "C", "subset": "AQuA"},
        {"answer": "12", "subset": "gsm8k"},
        {"answer": "1000", "subset": "gsm8k"},
    ]
    score = arithmetic_accuracy(["Answer: C", "3 + 9 = 12.", "$1,000 or 1"], rows)
    assert score.parts == {"AQuA": 0, "gsm8k": 0.5}


def test_numbers_are_read_in_any_script():
    rows = [
        {"answer": "2.3", "subset": "SVAMP"},
        {"answer": "-4", "subset": "mawps"},
        {"answer": "4", "subset": "mawps"},
    ]
    assert arithmetic_accuracy(["so 2.٣", "9 or -4.", "9-4"], rows).by_row == (1, 1, 0)


# Refusals


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        (vqa_accuracy("vqav2"), {"id": "7", "references": []}, r"row 0 \(id '7'\) has no references"),
        (anls, {"id": "7", "references": []}, r"row 0 \(id '7'\) has no references"),
        (pope_scores, {"id": "7", "answer": "Yes"}, r"row 0 \(id '7'\): `answer` must be 'yes' or 'no', got 'Yes'"),
        (commonsense_accuracy(), {"id": "7", "answer": "true", "subset": "copa"}, "no subset 'copa'; there are boolq"),
        (arithmetic_accuracy, {"id": "7", "answer": "1", "subset": "MATH"}, "no subset 'MATH'"),
        (arithmetic_accuracy, {"id": "7", "answer": "1,000", "subset": "gsm8k"}, "number without commas .*'1,000'"),
        (aokvqa_accuracy, {"references": ["x"], "difficult_direct_answer": True}, "all 1 rows are"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(metric: Callable[..., Score], row: Case, message: str):
    with pytest.raises(ValueError, match=message):
        metric(["x"], [row])


@pytest.mark.parametrize(
    "metric", [vqa_accuracy("evalai"), exact_match, gqa_accuracy, pope_scores, anls, aokvqa_accuracy]
)
def test_answers_and_rows_must_be_as_many(metric: Callable[..., Score]):
    with pytest.raises(ValueError, match="there must be one answer to each"):
        metric(["x"], [])


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="got 'vqa'"):
        vqa_accuracy("vqa")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got 'reft'"):
        commonsense_accuracy("reft")  # pyright: ignore[reportArgumentType]
