"""The HTML report: one file that loads nothing, says only what it was given, and replaces the former one at once."""

import base64
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlreft
from tasks.drawings import draw_adapter, place_to_draw
from tasks.metrics.score import Score, mean_score
from tasks.page import MAX_DRAWING, MAX_TEXT, NUM_POINTS, Line, averaged, chart, escaped, ticks
from tasks.report import (
    Curve,
    DataPart,
    Drawing,
    Example,
    Opening,
    PartScores,
    Report,
    Trial,
    count_groups,
    examples_of,
    report_html,
    write_report,
)
from tasks.setups import Options, load_setup
from tasks.statistics import paired_bootstrap
from tasks.table import TASKS

GROUPS = ["Fixed by the adapter", "Broken by the adapter", "Still wrong", "Right both times"]
VOID = {"meta", "img", "br", "hr", "link", "input"}
NASTY = """</title><script>alert("1")</script> & 'quotes' <img src=http://example.org/x> שלום \u202eabc 🙂 \x00\ud800"""


class Parsed(HTMLParser):
    """The elements with their attributes, in order, and the text outside of the style sheet."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], "elements that were never closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag, f"{tag} was closed, another was open"

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.elements)

    def pictures(self):
        sources = [found["src"] for tag, found in self.elements if tag == "img"]
        return [Image.open(BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def score(value, **parts):
    return Score("accuracy", value, "120 rows, lower case", parts=parts)


def example(score_before=0.0, score_after=1.0, /, **changed):
    given = {"question": "what is it?", "references": ("red",), "before": "blue", "after": "red"}
    return Example(**{**given, "score_before": score_before, "score_after": score_after, **changed})


def full(**changed):
    """A report with something in every place."""
    answers = [[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]], [0.0, 0.0, 1.0, 0.0]
    comparison = paired_bootstrap(lambda a, rows: mean_score("accuracy", a, f"{len(rows)}"), *answers, [{}] * 4)
    adapted = {"seed 0": score(0.75, colour=0.5), "seed 1": score(1.0, colour=0.625)}
    scores = [PartScores("val", score(0.25, colour=0.125), adapted, comparison)]
    given = {
        "title": "LoReFT, rank 4",
        "task": "demo: questions about shapes",
        "model": "some/model",
        "config": {"interventions": [{"method": "loreft", "rank": 4}, {"method": "red", "rank": None}]},
        "hyperparameters": {"learning_rate": 3e-4, "training": {"warmup": 0.06}},
        "versions": {"torch": "2.14"},
        "data": [DataPart("train", 12345, "ab" * 32)],
        "seeds": (0, 1),
        "num_trained": {"interventions": 1000, "modules": 24},
        "num_weights": 1_024_000,
        "seconds": 3725.0,
        "peak_memory": 3 * 2**29,
        "curves": [Curve(f"seed {n}", [(s, 2.0 / s) for s in range(1, 60)], [(20, 0.5), (40, 0.7)]) for n in range(2)],
        "trials": [Trial({"lr": 3e-4}, 0.7, True), Trial({"lr": 1e-3}, None)],
        "scores": scores,
        "openings": [Opening("2026-01-02", "first")],
        "examples": [example(picture=Image.new("RGB", (900, 600), "red"))],
    }
    return Report(**{**given, **changed})


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_full_report_is_well_formed_and_says_what_it_was_given():
    page = Parsed(report_html(full()))
    assert page.count("html", lang="en") == page.count("main") == page.count("h1") == 1
    for said in (
        *("LoReFT, rank 4", "demo: questions about shapes", "some/model", "seeds 0, 1", "12,345", "ab" * 32),
        *("interventions.0.method loreft", "interventions.1.rank null", "learning_rate 0.0003", "training.warmup 0.06"),
        *("1,024 (interventions 1,000, modules 24); 0.1000 % of the base's 1,024,000", "1 h 02 min", "1.50 GiB"),
        *("opened once, on 2026-01-02 (first)", "0.0003 70.00 selected", "0.001 none", "torch 2.14"),
        *("accuracy on val; mean ± SD of 2 seeds", "val: accuracy, over 120 rows, lower case"),
        "10,000 resamples of the rows' scores",
    ):
        assert said in page.text, said


def test_headline_and_table_have_mean_sd_and_difference():
    page = Parsed(report_html(full()))
    sd = 100 * np.std([0.75, 1.0], ddof=1)
    assert f"87.50 ± {sd:.2f}" in page.text
    assert "base 25.00 difference +62.50" in page.text
    assert f"val 25.00 75.00 100.00 87.50 {sd:.2f} +62.50" in page.text
    assert f"colour 12.50 50.00 62.50 56.25 {sd / 2:.2f}" in page.text


def test_the_same_report_gives_the_same_file(tmp_path):
    for name in ("one", "two"):
        write_report(tmp_path / name, full())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_is_loaded_from_anywhere():
    html = report_html(full(examples=[example(question=NASTY, picture=Image.new("RGB", (20, 20)))], title=NASTY))
    page = Parsed(html)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "use"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), attributes
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|//", style)
    assert page.count("meta", content="default-src 'none'; img-src data:; style-src 'unsafe-inline'") == 1


def test_the_page_knows_light_dark_print_and_phones():
    html = report_html(full())
    assert 'name="viewport"' in html
    for wanted in ("prefers-color-scheme:dark", "@media print", "tabular-nums", "color-scheme:light dark"):
        assert wanted in html
    assert html.count("{") == html.count("}")  # of the style sheet; nothing else in this page has any


def test_every_colour_of_the_style_sheet_is_defined():
    html = report_html(full())
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--\w+):", html))


def test_all_text_is_escaped():
    places = {
        "title": NASTY,
        "task": NASTY,
        "model": NASTY,
        "config": {NASTY: NASTY},
        "hyperparameters": {"a": {NASTY: [NASTY]}},
        "versions": {NASTY: NASTY},
        "data": [DataPart(NASTY, 1, NASTY)],
        "device": NASTY,
        "curves": [Curve(NASTY, [(1, 1.0), (2, 2.0)], [(1, 0.5)])],
        "trials": [Trial({NASTY: NASTY}, 0.5)],
        "scores": [PartScores(NASTY, Score(NASTY, 0.5, NASTY, parts={NASTY: 1.0}), {NASTY: Score(NASTY, 1.0, NASTY)})],
        "openings": [Opening(NASTY, NASTY), Opening(NASTY)],
        "examples": [example(question=NASTY, references=(NASTY,) * 2, before=NASTY, after=NASTY)],
        "num_trained": {NASTY: 3},
        "notes": [NASTY],
    }
    html = report_html(full(**places))
    page = Parsed(html)
    assert not page.count("script")
    assert not page.count("img")
    assert html.count("<title>") >= 1
    assert "<script" not in html
    assert "\x00" not in html
    html.encode("utf-8")  # no lone surrogates
    shown = NASTY.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert page.text.count(shown) >= 25
    clean = Parsed(report_html(full(**{key: _cleaned(value) for key, value in places.items()})))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]


def _cleaned(value):
    """The same thing with a plain text in all places."""
    if isinstance(value, str):
        return "plain" if value == NASTY else value
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cleaned(entry) for entry in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: _cleaned(getattr(value, name)) for name in value.__dataclass_fields__})
    return value


def test_escaped_keeps_what_is_a_character():
    assert escaped("é 🙂 שלום\n\tb\r\nc") == "é 🙂 שלום\n\tb\nc"
    assert escaped("<a b=\"c\" d='e'>&") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;"


def test_texts_have_their_own_direction():
    page = Parsed(report_html(full(examples=[example(question="ما لون الشكل؟", before="שלום")])))
    assert page.count("div", dir="auto") == 4  # question, references, before, after


def test_the_file_is_written_wherever_one_stands(tmp_path, monkeypatch):
    write_report(tmp_path / "a" / "report.html", full())
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    write_report("report.html", full())
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["report.html"]


@pytest.mark.parametrize("step", ["open", "replace"])
def test_an_interrupted_write_leaves_the_former_report(tmp_path, monkeypatch, step):
    path = tmp_path / "report.html"
    write_report(path, full(title="the former"))
    former = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    if step == "open":
        monkeypatch.setattr(os, "fsync", interrupted)  # the draft has all its text by then
    else:
        monkeypatch.setattr(type(path), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, full(title="the new one"))
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_report(path, full(title="the new one"))
    assert "the new one" in path.read_text(encoding="utf-8")


def test_a_report_that_cannot_be_made_leaves_the_former_one(tmp_path):
    write_report(tmp_path / "report.html", full())
    former = (tmp_path / "report.html").read_bytes()
    with pytest.raises(ValueError, match="cannot be read"):
        write_report(tmp_path / "report.html", full(examples=[example(picture=b"no picture")]))
    assert (tmp_path / "report.html").read_bytes() == former


def test_the_file_stays_small_with_the_worst_of_examples():
    noise = np.random.default_rng(0).integers(0, 256, size=(600, 600, 3), dtype=np.uint8)
    long = "<" * 50_000
    worst = example(picture=Image.fromarray(noise), before=long, after=long, question=long, references=(long, "b"))
    curves = [Curve("long", [(n, 1.0) for n in range(200_000)])] * 3
    assert len(report_html(full(examples=[worst] * 24, curves=curves))) < 4e6


# --- drawings -------------------------------------------------------------------------------------------------------


def png(size=(640, 300), noisy=False):
    out = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    (Image.fromarray(pixels) if noisy else Image.new("RGB", size, "navy")).save(out, "png")
    return out.getvalue()


def test_drawings_stand_as_they_are_under_their_heading():
    shown = [Drawing("where <they> act", png()), Drawing("how much", png((300, 100)))]
    page = Parsed(report_html(full(drawings=shown, examples=[])))
    assert [picture.size for picture in page.pictures()] == [(640, 300), (300, 100)]
    assert page.count("img", alt="where <they> act") == page.count("img", alt="how much") == 1
    assert page.text.index("Where the edits act") < page.text.index("where <they> act") < page.text.index("how much")
    assert "Where the edits act" not in Parsed(report_html(full())).text


@pytest.mark.parametrize(
    ("drawings", "says"),
    [
        ([Drawing("a", png())] * 5, "5 drawings; a report shows 4 at most"),
        ([Drawing("a", b"GIF89a")], "'a' must be a PNG"),
        ([Drawing("a", png((900, 900), noisy=True))], f"at most {MAX_DRAWING:,} bytes"),
    ],
    ids=["too many", "another kind", "too large"],
)
def test_drawings_that_would_make_the_file_large_are_refused(drawings, says):
    with pytest.raises(ValueError, match=says):
        report_html(full(drawings=drawings))


def test_an_adapter_is_drawn_in_a_row_that_it_fixed(tmp_path):
    assert [place_to_draw([1, 0, 0, 0], [1, 0, 1, 1]), place_to_draw([1, 0], [0, 0])] == [2, 0]
    folder = Path(__file__).parent.parent / "assets" / "demo-llava"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("assets/demo-llava has no weights in this checkout")
    rows = TASKS["demo_refuse"].load("test", None)
    setup = load_setup(TASKS["demo_refuse"], str(folder), Options("cpu", torch.float32), rows)
    items = [vlreft.Intervention("direft", site=site, rank=1, init="reference") for site in ("vision", "text")]
    reft = vlreft.attach(setup.model, vlreft.ReftConfig(items))
    reft.save_pretrained(tmp_path)
    reft.detach()
    drawings = draw_adapter(setup, tmp_path, rows, 1)
    assert "vlreft" not in dict(setup.model.named_children())
    page = Parsed(report_html(full(drawings=drawings, examples=[])))
    where, how_much = page.pictures()
    assert where.width == how_much.width > 800
    assert min(np.asarray(picture.convert("L")).std() for picture in (where, how_much)) > 10
    assert draw_adapter(setup, tmp_path, rows, 1) == drawings, "the same run must give the same file"


# --- scores ---------------------------------------------------------------------------------------------------------


def test_nothing_but_names_is_a_report_too():
    page = Parsed(report_html(Report("title", "task", "model")))
    assert page.count("h2") == 1  # what was run
    assert "still sealed" in page.text


def test_one_seed_has_no_sd():
    page = Parsed(report_html(full(scores=[PartScores("val", score(0.5), {"seed 0": score(0.6)})])))
    assert "60.00 accuracy on val; one seed" in page.text
    assert "base 50.00 difference +10.00" in page.text
    assert "±" not in page.text
    assert "SD" not in page.text


def test_the_base_alone_has_a_headline():
    page = Parsed(report_html(full(scores=[PartScores("val", score(0.5))])))
    assert "50.00 accuracy on val; the base alone" in page.text


def test_several_tests_have_their_mean_as_headline_and_corrected_p():
    comparison = full().scores[0].comparison
    parts = [
        PartScores(name, score(base), {"seed 0": score(base + 0.5), "seed 1": score(base + 0.75)}, comparison)
        for name, base in (("random", 0.1), ("popular", 0.2))
    ]
    page = Parsed(report_html(full(scores=parts)))
    assert "77.50 ± 17.68 accuracy on 2 tests, their mean" in page.text
    p = comparison.p_value
    assert page.text.count(f"{p:.3f} {min(1, 2 * p):.3f}") == 2


def test_points_are_not_made_percent_and_losses_have_a_minus():
    page = Parsed(report_html(full(scores=[PartScores("mme", score(1510.5), {"s": score(1500)})], factor=1.0)))
    assert "1500.00" in page.text
    assert "difference \N{MINUS SIGN}10.50" in page.text


def test_a_score_that_is_no_number_is_shown_as_such():
    page = Parsed(report_html(full(scores=[PartScores("val", score(0.5), {"a": score(math.nan), "b": score(0.5)})])))
    assert "val 50.00 nan 50.00 nan" in page.text


def test_further_openings_of_the_test_are_a_notice():
    page = Parsed(report_html(full(openings=[Opening("2026-01-02"), Opening("2026-01-03", "a broken picture")])))
    assert page.count("div", **{"class": "notice"}) == 1
    assert "opened 2 times" in page.text
    assert "2026-01-03: a broken picture" in page.text
    assert "no record" in Parsed(report_html(full(openings=[]))).text


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([PartScores("a")], "'a' has no scores"),
        ([PartScores("a", score(1), {"s": score(1)}), PartScores("b", score(1), {"t": score(1)})], "different runs"),
        ([PartScores("a", score(1)), PartScores("b", None, {})], "'b' has no scores"),
        ([PartScores("a", score(1), {"s": score(1)}), PartScores("b", None, {"s": score(1)})], "different runs"),
        ([PartScores("a", score(1), {}, full().scores[0].comparison)], "not both base and adapter"),
        ([PartScores("a", score(0.3), {"s": score(0.2)}, full().scores[0].comparison)], "differ by -0.1 and"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(scores, says):
    with pytest.raises(ValueError, match=says):
        report_html(full(scores=scores))


# --- charts ---------------------------------------------------------------------------------------------------------


def test_curves_are_svg_with_a_line_and_a_key_for_each_training():
    page = Parsed(report_html(full()))
    assert page.count("figure") == page.count("svg", role="img") == 2
    paths = [found for tag, found in page.elements if tag == "path"]
    assert len(paths) == 8  # two charts of two lines, each line in a key too
    assert page.text.count("seed 1") >= 2
    assert "seed 1, step 40: 70" in page.text  # on the scale of the tables
    assert not Parsed(report_html(full(curves=[]))).count("svg")


def test_lines_go_where_their_values_are():
    html = chart("loss", [Line("a", [(0, 0.0), (50, 10.0), (100, 5.0)])])
    points = [tuple(map(float, p)) for p in re.findall(r"[ML]([\d.]+) ([\d.]+)", html.partition("</figure>")[0])][:3]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # up is less in SVG
    assert y2 - y1 == pytest.approx(y0 - y2, abs=0.2)


def test_a_value_that_is_no_number_leaves_a_gap():
    html = chart("loss", [Line("a", [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 2.0), (6, 1.0)])])
    path = next(found["d"] for tag, found in Parsed(html).elements if tag == "path")
    assert re.sub(r"[^ML]", "", path) == "MLML"
    assert "nan" not in html
    assert "inf" not in html


@pytest.mark.parametrize("points", [[(5, 0.3)], [(0, 0.0), (1, 0.0)], [(0, -2.0), (9, -2.0)], [(1, 1e-9), (2, 1e9)]])
def test_flat_and_single_and_wide_lines_are_drawn_inside(points):
    html = chart("x", [Line("a", points)])
    circles = [found for tag, found in Parsed(html).elements if tag == "circle"]
    assert len(circles) == len(points)
    assert all(0 <= float(c["cx"]) <= 420 and 0 <= float(c["cy"]) <= 230 for c in circles)


def test_nothing_to_draw_is_no_chart():
    assert chart("x", []) == chart("x", [Line("a", [])]) == chart("x", [Line("a", [(1, math.nan)])]) == ""


def test_long_lines_are_averaged_whole():
    points = [(n, float(n % 7)) for n in range(10 * NUM_POINTS - 3)]
    short = averaged(points)
    assert len(short) == NUM_POINTS
    assert short[0] == (4.5, np.mean([n % 7 for n in range(10)]))
    assert short[-1][0] == np.mean([x for x, _ in points[-7:]])
    assert averaged(points[:NUM_POINTS]) == points[:NUM_POINTS]
    assert "the mean of 10 or fewer" in chart("x", [Line("a", points)])


@pytest.mark.parametrize("span", [(0, 1), (0.137, 0.141), (-3, 17), (10, 3000), (1e-7, 3e-7), (58.2, 69.8)])
def test_ticks_are_few_round_values_in_the_range(span):
    found = ticks(*span)
    assert 2 <= len(found) <= 9
    assert span[0] - 1e-9 <= found[0]
    assert found[-1] <= span[1] + 1e-9
    mantissas = {f"{(b - a):.3e}"[:5] for a, b in pairwise(found)}
    assert len(mantissas) == 1
    assert mantissas <= {"1.000", "2.000", "5.000"}


# --- examples -------------------------------------------------------------------------------------------------------


def test_examples_stand_in_their_groups():
    shown = [example(0, 1, after="AA"), example(1, 0, after="BB"), example(0.3, 0.4, after="CC"), example(0.5, 1.0)]
    assert [e.group for e in shown] == GROUPS
    text = Parsed(report_html(full(examples=shown))).text
    said = ["AA", "Broken by", "BB", "Still wrong", "CC", "Right both times", "red"]
    places = [text.index("Fixed by")]
    for words in said:
        places.append(text.index(words, places[-1]))  # each after the one before
    assert text.count("after right") == text.count("after wrong") == 2
    assert text.index("AA") > places[0]
    assert text.index("CC") > text.index("BB") > text.index("AA")


def test_groups_without_examples_are_left_out_and_counts_are_shown():
    counts = count_groups([0, 0, 1, 1, 1, 0.2], [1, 1, 0, 1, 0.9, 0.49])
    assert counts == dict(zip(GROUPS, (2, 1, 1, 2), strict=True))
    page = Parsed(report_html(full(examples=[example(1, 1)], num_by_group=counts)))
    assert page.count("h3") == 1 + 4  # the group; data, configuration, hyperparameters, versions
    said = "Of 6 rows: fixed by the adapter 2, broken by the adapter 1, still wrong 1, right both times 2."
    assert said in page.text
    assert "Examples" not in Parsed(report_html(full(examples=[]))).text


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (900, 300)), ("RGBA", (40, 50)), ("L", (256, 256)), ("P", (3, 999))]
)
def test_pictures_are_small_and_can_be_read_again(mode, size, as_bytes):
    picture = Image.new("RGB", size, (200, 30, 30)).convert(mode, palette=Image.Palette.ADAPTIVE)
    given = picture
    if as_bytes:
        out = BytesIO()
        picture.save(out, "png")
        given = out.getvalue()
    (shown,) = Parsed(report_html(full(examples=[example(picture=given)]))).pictures()
    assert max(shown.size) == min(256, max(size))
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.35)
    want = picture.convert("RGB").getpixel((0, 0))
    assert shown.convert("RGB").getpixel((0, 0)) == pytest.approx(want, abs=4)
    assert picture.size == size, "the caller's picture was changed"


def test_long_texts_are_folded_and_very_long_ones_cut():
    page = Parsed(report_html(full(examples=[example(after="word " * 100)])))
    assert page.count("details") == page.count("summary") == 1
    assert "(500 characters)" in page.text
    very = Parsed(report_html(full(examples=[example(after="x" * (MAX_TEXT + 1234))])))
    assert "x" * MAX_TEXT in very.text
    assert "x" * (MAX_TEXT + 1) not in very.text
    assert "1,234 more characters" in very.text
    assert not Parsed(report_html(full(examples=[example()]))).count("details")


def test_empty_answers_and_repeated_references_are_told():
    page = Parsed(report_html(full(examples=[example(before=" ", references=("red",) * 8 + ("blue", "dark red"))])))
    assert "before wrong (0) (empty)" in page.text
    assert "red \N{MULTIPLICATION SIGN}8 · blue · dark red" in page.text
    many = Parsed(report_html(full(examples=[example(references=tuple(f"r{n}" for n in range(15)))])))
    assert "r11 · and 3 more" in many.text


def test_more_than_24_examples_are_refused():
    with pytest.raises(ValueError, match="25 examples"):
        report_html(full(examples=[example()] * 25))


@pytest.mark.parametrize("value", [-0.1, 1.2, math.nan])
def test_an_example_is_right_by_a_share(value):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        example(value, 1.0)


class Rows(list):
    """Rows that remember which of them were read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def __getitem__(self, place):
        self.read.append(place)
        return super().__getitem__(place)


@pytest.fixture
def answered(tmp_path):
    Image.new("RGB", (640, 480), "green").save(tmp_path / "a.png")
    rows = Rows(
        {"id": str(n), "image": str(tmp_path / "a.png"), "question": f"question {n}?", "references": ["yes", "no"]}
        for n in range(80)
    )
    generator = np.random.default_rng(0)
    before, after = (generator.integers(0, 2, size=80).astype(float).tolist() for _ in range(2))
    return rows, [f"before {n}" for n in range(80)], [f"after {n}" for n in range(80)], before, after


def test_examples_are_drawn_by_group_and_seed(answered):
    rows, _, _, before, after = answered
    drawn = examples_of(*answered, per_group=5)
    assert [e.group for e in drawn] == [name for name in GROUPS for _ in range(5)]
    assert len(set(rows.read)) == len(rows.read) == 20  # only the drawn rows
    for e in drawn:
        place = int(e.before.split()[1])
        assert (e.after, e.question, e.references) == (f"after {place}", f"question {place}?", ("yes", "no"))
        assert (e.score_before, e.score_after) == (before[place], after[place])
        assert max(e.picture.size) == 256

    def places(seed):
        return [e.before for e in examples_of(*answered, per_group=5, seed=seed)]

    assert places(0) == [e.before for e in drawn]
    assert places(1) != places(0)


def test_small_groups_give_what_they_have(answered):
    rows, before, after, *_ = answered
    drawn = examples_of(rows, before, after, [0.0] * 80, [0.0] * 78 + [1.0] * 2, per_group=6)
    assert [e.group for e in drawn] == ["Fixed by the adapter"] * 2 + ["Still wrong"] * 6


def test_rows_of_texts_rankings_and_bytes_are_shown_too(tmp_path):
    out = BytesIO()
    Image.new("RGB", (9, 9)).save(out, "png")
    rows = [
        {"text": "a man sleeps", "text_pair": "he is awake", "answer": "no"},
        {"image": {"path": None, "bytes": out.getvalue()}, "answer": 3.5},
    ]
    first, second = examples_of(rows, ["a", ["x", "y"]], ["b", ("y", "x")], [0, 0], [1, 1])
    assert (first.question, first.references, first.picture) == ("a man sleeps\nhe is awake", ("no",), None)
    assert (second.before, second.after, second.references) == ("x, y", "y, x", ("3.5",))
    assert second.picture.size == (9, 9)
    write_report(tmp_path / "report.html", full(examples=[first, second]))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    broken = [{"id": "q7", "image": str(tmp_path / "broken.png"), "question": "?"}]
    with pytest.raises(ValueError, match=r"row 0 \(id q7\) has an image that cannot be read"):
        examples_of(broken, ["a"], ["b"], [0], [1])


def test_answers_that_are_not_one_to_a_row_are_refused(answered):
    rows, before, after, *scores = answered
    with pytest.raises(ValueError, match="lengths"):
        examples_of(rows, before[:-1], after, *scores)
