"""The model behind the page: its answers are the model's own, whoever else asks, and bad input is one clear error."""

import html
import itertools
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playing import QUESTION, direct, make_adapters, make_play, picture_number
from processors import qwen25vl_processor, tiny_paligemma_model, tiny_paligemma_processor, tiny_qwen25vl_model
from zoo import shake

import vlreft

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from app_look import safe, tokens
from app_model import Edits, Playground, Seen, check_question, check_strengths, read_box

BOX = (3, 4, 27, 20)

# What a browser sends, and what it is sent ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ([0, 0, 65, 10], "does not lie in the picture, which is 64 x 48"),
        ([0, 0, 10, 49], "does not lie"),
        ([-1, 0, 10, 10], "does not lie"),
        ([5, 5, 5, 10], "does not lie"),
        ([5.5, 5, 8, 10], "four whole numbers"),
        ([True, 5, 8, 10], "four whole numbers"),
        ([1, 2, 3], "four whole numbers"),
        ("[1, 2, 3, 4]", "four whole numbers"),
        ({"box": 1}, "four whole numbers"),
    ],
)
def test_a_box_that_is_none_of_the_picture_is_refused(box, why):
    with pytest.raises(ValueError, match=why):
        read_box(box, Seen(Image.new("RGB", (64, 48)), 6, 8))


def test_a_box_in_the_picture_is_taken_and_no_box_is_none():
    seen = Seen(Image.new("RGB", (64, 48)), 6, 8)
    assert read_box([0, 0, 64, 48], seen) == (0, 0, 64, 48)
    assert read_box([], seen) is None
    with pytest.raises(ValueError, match="no grid"):
        read_box([0, 0, 8, 8], Seen(seen.picture, why_not="no grid"))


def test_questions_and_strengths_that_the_page_does_not_offer_are_refused():
    for question in ("", " \n", None, "x" * 501):
        with pytest.raises(ValueError, match=r"Ask something|at most 500"):
            check_question(question)
    for strength in (-0.1, 3.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be from 0 to 3"):
            check_strengths({"style": strength})
    check_question("x" * 500)
    check_strengths({"style": 0.0, "code": 3.0})


def test_no_text_becomes_markup_or_a_template():
    hostile = "<img src=x onerror=alert(1)> {{value}} ${1+1} `x` \"'&"
    assert not set("<>{}$`\"'") & set(safe(hostile))
    assert html.unescape(safe(hostile)) == hostile
    assert hostile not in tokens(Edits(words=[(hostile, 0.5)]))


# The model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    return make_play(make_adapters(tmp_path_factory.mktemp("adapters")))


CASES = [({}, None), ({"words": 1.0}, None), ({"words": 0.4}, None), ({"region": 1.0}, BOX)]
CASES += [({"region": 1.0}, (30, 30, 64, 64)), ({"words": 1.0, "region": 1.0}, BOX)]


@pytest.mark.parametrize("question", [QUESTION, "describe the image"])
def test_answers_are_those_of_the_model_itself(play, question):
    answers = set()
    for strengths, box in CASES:
        steps = list(play.answer(picture_number(7), question, strengths, box))
        assert steps[-1] == direct(play, picture_number(7), question, strengths, box)
        assert all(after.startswith(before) for before, after in itertools.pairwise(steps))
        answers.add(steps[-1])
    assert len(answers) >= 4  # the adapters, the strength and the box do make a difference
    with play.refts["words"].disabled(), play.refts["region"].disabled():
        assert direct(play, picture_number(7), question, {}) == list(play.answer(picture_number(7), question, {}))[-1]


def test_an_answer_streams_and_strength_zero_is_the_base(play):
    steps = list(play.answer(picture_number(4), "describe the image", {}))
    assert len(steps) > 3
    assert list(play.answer(picture_number(4), "describe the image", {"words": 0.0, "region": 0.0}, BOX)) == steps


def test_marks_are_on_the_patches_that_the_box_touches_and_on_the_edited_words(play):
    edits = Edits()
    list(play.answer(picture_number(7), QUESTION, {"region": 1.0, "words": 1.0}, BOX, edits))
    marked = {(at // 8, at % 8) for at, share in enumerate(edits.patches) if share > 0}
    assert marked == {(row, col) for row in (0, 1, 2) for col in (0, 1, 2, 3)}  # pixels 3 to 27, 4 to 20; 8 a patch
    assert [text for text, _ in edits.words] == ["<s>", "<user>", "[picture]", *QUESTION.split(), "<assistant>"]
    assert [text for text, share in edits.words if share > 0] == ["the", "circle", "?", "<assistant>"]
    bare = Edits()
    list(play.answer(picture_number(7), QUESTION, {"words": 1.0}, BOX, bare))
    assert len(bare.patches) == 64
    assert not any(bare.patches)


def test_what_the_visitor_sees_is_what_the_model_gets(play):
    same = picture_number(7)
    assert np.abs(np.asarray(play.see(same).picture, dtype=int) - np.asarray(same, dtype=int)).max() == 0
    wide = Image.new("RGB", (200, 50))
    wide.paste((250, 10, 10), (100, 0, 200, 50))
    seen = play.see(wide)
    assert (seen.picture.size, seen.rows, seen.cols, seen.why_not) == ((64, 64), 8, 8, "")
    assert seen.picture.getpixel((10, 32)) == (0, 0, 0)
    assert seen.picture.getpixel((54, 32)) == (250, 10, 10)
    assert play.see(Image.new("RGB", (1, 1))).picture.size == (64, 64)


def test_an_answer_that_nobody_reads_any_more_ends(play):
    steps = []
    handle = play.model.register_forward_hook(lambda *_: (steps.append(1), time.sleep(0.05))[0])
    try:
        begun = play.answer(picture_number(4), "describe the image", {"words": 0.0})
        next(begun)
        begun.close()
        play.see(picture_number(4))  # waits for the model's thread
    finally:
        handle.remove()
    assert len(steps) < 8  # of about twenty, one for each word
    assert list(play.answer(picture_number(7), QUESTION, {}))[-1] == direct(play, picture_number(7), QUESTION, {})


def test_an_error_in_the_model_reaches_the_visitor_and_no_one_after(play):
    with pytest.raises(ValueError, match="leave '<image>' out of the question"):
        list(play.answer(picture_number(4), "<image> what ?", {}))
    with pytest.raises(ValueError, match="needs a box for each picture"):
        list(play.answer(picture_number(4), QUESTION, {"region": 1.0}))
    assert list(play.answer(picture_number(4), QUESTION, {}))[-1] == direct(play, picture_number(4), QUESTION, {})


def test_two_visitors_at_once_do_not_see_each_others_adapters(play):
    asked = [*CASES, *CASES]
    expected = [direct(play, picture_number(7), QUESTION, *case) for case in asked]
    got = [""] * len(asked)

    def visit(number):
        for _ in range(4):
            *_, got[number] = play.answer(picture_number(7), QUESTION, *asked[number])
            assert got[number] == expected[number]

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_adapters_say_what_they_are(play):
    assert [play.needs_box(name) for name in play.names] == [False, True]
    assert play.describe("region") == "loreft at vision, patches:box · 4,112 numbers"
    with pytest.raises(ValueError, match="no adapter to play with"):
        Playground(play.model, play.processor, {})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers' PaliGemma and numpy
@pytest.mark.parametrize(("family", "num"), [("qwen25vl", 2), ("paligemma", 1)])  # patches a side of an image token
def test_boxes_and_marks_are_true_on_models_of_other_families(family, num, tmp_path):
    processor = {"qwen25vl": qwen25vl_processor, "paligemma": tiny_paligemma_processor}[family]()
    model = {"qwen25vl": tiny_qwen25vl_model, "paligemma": tiny_paligemma_model}[family](processor).eval()
    items = [("vision", "patches:box"), ("text", "image:box")]
    reft = vlreft.attach(
        model,
        vlreft.ReftConfig(
            [vlreft.Intervention("loreft", site=site, layers=[0], positions=where, rank=2) for site, where in items]
        ),
    )
    shake(reft).save_pretrained(tmp_path)
    reft.detach()
    play = Playground(model, processor, {"region": tmp_path}, max_new_tokens=3)
    picture = Image.new("RGB", (56, 56), "gray")
    seen = play.see(picture)
    assert seen.why_not == ""
    patch = seen.picture.width // seen.cols
    edits, box = Edits(), (0, 0, num * patch, num * patch)
    list(play.answer(picture, "what is in the picture?", {"region": 1.0}, box, edits))
    marked = {(at // seen.cols, at % seen.cols) for at, share in enumerate(edits.patches) if share > 0}
    assert marked == set(itertools.product(range(num), range(num)))
    assert len(edits.patches) == seen.rows * seen.cols > len(marked)
    assert sum(word == "[picture]" for word, _ in edits.words) == 1
    assert dict(edits.words)["[picture]"] > 0
