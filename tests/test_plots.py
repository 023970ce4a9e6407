"""Figures of edits: the data are those of list comprehensions, the drawings hold what the data say."""

import math
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from family import IMAGE, SAMPLES, TEXT_ONLY
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from processors import (
    llama_tokenizer,
    qwen25vl_processor,
    text_tokenizer,
    tiny_llava_model,
    tiny_llava_processor,
    tiny_qwen25vl_model,
    tiny_text_model,
)
from test_families import TAIL
from tiny import IMAGE_ID
from tiny import llava as bare_llava
from transformers import AutoProcessor
from zoo import FAMILIES, Spy, plain_positions, plain_tower_positions, shake

import vlreft
from vlreft.drawing.glyphs import break_lines, chips_of, drawable, text_width
from vlreft.drawing.maps import edit_norms, next_tokens, placement
from vlreft.drawing.plots import draw_edits, draw_placement, plot_edits, plot_next_tokens, plot_placement

TOKENIZER = llama_tokenizer()
CASES = [
    *[("llama", "text", p) for p in ("prompt", "f2+l1", "response")],
    *[("llava", "text", p) for p in ("question:f4+l4", "image:f2+l1", "text:[1:3]+l1")],
    *[("qwen2_5_vl", "text", p) for p in ("prompt", "image")],
]
TOWERS = [
    *[("llava", p) for p in ("cls", "patches", "all", "f2", "patches:rows[0:1]cols[:]")],
    *[("qwen2_5_vl", p) for p in ("patches", "patches:f1+l2", "patches:box[3,0,15,9]", "patches:rows[-1:]cols[1:2]")],
]


@pytest.fixture(autouse=True)
def _demo_is_there(request):
    if "demo" in request.node.name and "demo-llava" not in FAMILIES:
        pytest.skip("assets/demo-llava has no weights in this checkout")


def words(figure):
    """Return all that a figure says."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def as_drawn(figure):
    """Draw it, as a file would be; warnings are errors."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    assert pixels.std() > 1, "a blank figure"
    return figure


# Where they act ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "site", "positions"), CASES)
def test_edited_tokens_are_those_that_positions_name(name, site, positions, side, attached):
    family = FAMILIES[name]
    samples = SAMPLES if family.has_image else TEXT_ONLY
    _, reft = attached(family, vlreft.Intervention("vector", site=site, layers=[0, 2], positions=positions))
    batch = family.batch(samples, side=side)
    for row, sample in enumerate(samples):
        shown = placement(reft, batch, TOKENIZER, row=row)
        (found,) = shown.maps
        tokens = family.tokens(sample)
        assert found.text_L.nonzero()[:, 0].tolist() == plain_positions(positions, tokens)
        assert shown.texts["text"].is_image_L.tolist() == [token.is_image for token in tokens]
        assert (found.site, found.positions, found.layers) == (site, positions, (0, 2))
        assert len(shown.texts["text"].tokens) == len(tokens)


@pytest.mark.parametrize(("name", "positions"), TOWERS)
def test_edited_patches_are_those_that_positions_name(name, positions, attached):
    family = FAMILIES[name]
    _, reft = attached(family, vlreft.Intervention("vector", site="vision", layers=[0], positions=positions))
    batch = family.batch(SAMPLES)
    first = 0 if family.cls_last else family.num_cls
    rows, cols = family.grid
    selected = {place - first for place in plain_tower_positions(positions, family)}
    for row, sample in enumerate(SAMPLES):
        (found,) = placement(reft, batch, TOKENIZER, row=row).maps
        assert len(found.patches) == len(found.others) == sample.prompt.count(IMAGE)
        for mask_RC, others_N in zip(found.patches, found.others, strict=True):
            assert mask_RC.tolist() == [[r * cols + c in selected for c in range(cols)] for r in range(rows)]
            assert others_N.tolist() == [place - first in selected for place in range(family.num_cls)]


@pytest.mark.parametrize(("name", "merge"), [("llava", 1), ("qwen2_5_vl", 2), ("demo-llava", 1)])
def test_image_tokens_lie_in_their_pictures(name, merge, attached):
    """A region of image tokens is drawn where it lies, in the second picture of a row as in its first."""
    family = FAMILIES[name]
    item = vlreft.Intervention("vector", site="connector", positions="image:rows[-1:]cols[1:2]")
    _, reft = attached(family, item)
    (found,) = placement(reft, family.batch(SAMPLES), TOKENIZER, row=2).maps
    rows, cols = (size // merge for size in family.grid)
    assert len(found.patches) == 2
    for mask_RC in found.patches:
        assert mask_RC.tolist() == [[(r, c) == (rows - 1, 1) for c in range(cols)] for r in range(rows)]


def test_rows_without_a_picture_have_no_patches(attached):
    family = FAMILIES["llava"]
    _, reft = attached(family, vlreft.Intervention("vector", site="vision", layers=[0], positions="patches"))
    shown = placement(reft, family.batch(SAMPLES), TOKENIZER, row=1)
    assert shown.pictures == shown.maps[0].patches == shown.maps[0].others == ()
    as_drawn(draw_edits(edit_norms(reft, family.batch(SAMPLES), TOKENIZER, row=1)))


def test_layers_that_act_alike_share_a_map_and_parts_of_one_intervention_too(attached):
    items = (
        vlreft.Intervention("loreft", layers=[0, 2], positions="f2+l1", rank=2, tied=False),
        vlreft.Intervention("vector", layers=[1], positions="l1"),
        vlreft.Intervention("red", layers=[1], positions="l1"),
    )
    _, reft = attached("llama", *items)
    shown = placement(reft, FAMILIES["llama"].batch(TEXT_ONLY), TOKENIZER, row=1)
    found = [(m.positions, m.layers, m.text_L.nonzero()[:, 0].tolist()) for m in shown.maps]
    last = len(FAMILIES["llama"].tokens(TEXT_ONLY[1], answer=True)) - len(TEXT_ONLY[1].answer) - 1
    assert found == [("f2+l1", (0, 2), [0, 1, last]), ("l1", (1,), [last])]
    norms = edit_norms(reft, FAMILIES["llama"].batch(TEXT_ONLY), TOKENIZER, row=1)
    assert [(m.positions, m.layers) for m in norms.maps] == [
        *(("f2+l1", (layer,)) for layer in (0, 2)),
        *(("l1", (1,)) for _ in range(2)),  # two at one place, one behind the other
    ]


def test_boxes_of_the_call_are_drawn(attached):
    family = FAMILIES["llava"]
    _, reft = attached(family, vlreft.Intervention("vector", site="vision", layers=[0], positions="patches:box"))
    with reft.boxes([(15, 1, 27, 13)]):
        (found,) = placement(reft, family.batch(SAMPLES[:1]), TOKENIZER).maps
    assert found.patches[0].tolist() == [[False, True], [False, False]]


# By how much ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["text", "vision", "connector"])
def test_norms_are_the_edits_lengths_by_the_states(site, attached):
    family = FAMILIES["llava"]
    positions = {"text": "prompt:f3+l2", "vision": "all", "connector": "image"}[site]
    layers = None if site == "connector" else [1]
    fields = {} if layers is None else {"layers": layers}
    model, reft = attached(family, vlreft.Intervention("loreft", site=site, positions=positions, rank=2, **fields))
    batch, row = family.batch(SAMPLES), 2
    block = family.blocks(model, site)[0 if layers is None else 1]
    with Spy(block, of_input=site == "connector") as spy, torch.no_grad():
        model(**batch)
    before, after = spy.kept[0].double(), spy.kept_after[0].double()
    want = ((after - before).norm(dim=-1) / before.norm(dim=-1)).tolist()
    (found,) = edit_norms(reft, batch, TOKENIZER, row=row).maps
    if site == "vision":
        pictures = [want[1], want[2]]  # the first row has one, the second none
        got = [[*o.tolist(), *p.flatten().tolist()] for p, o in zip(found.patches, found.others, strict=True)]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(pictures), rtol=1e-4, atol=1e-6)
        return
    tokens = family.tokens(SAMPLES[row])
    chosen = plain_positions(positions, tokens)
    got = found.text_L.tolist()
    assert [place for place, value in enumerate(got) if not math.isnan(value)] == chosen
    assert [got[place] for place in chosen] == pytest.approx([want[row][place] for place in chosen], rel=1e-4)


def test_norms_of_a_packed_tower_are_at_their_patches(attached):
    """Each patch by itself, named by row and column, has the length that the map of all has there."""
    family = FAMILIES["qwen2_5_vl"]
    model, reft = attached(family, vlreft.Intervention("vector", site="vision", layers=[0], positions="patches"))
    batch = family.batch(SAMPLES[:1])
    (everywhere,) = edit_norms(reft, batch, TOKENIZER).maps
    numbers = [parameter.detach().clone() for parameter in reft.parameters()]
    reft.detach()
    assert everywhere.patches[0].unique().numel() == 16  # no two alike: a wrong place would be seen
    for row in range(4):
        for col in range(4):
            one = f"patches:rows[{row}:{row + 1}]cols[{col}:{col + 1}]"
            alone = vlreft.Intervention("vector", site="vision", layers=[0], positions=one)
            _, single = attached(family, alone, is_shaken=False, model=model)
            for parameter, number in zip(single.parameters(), numbers, strict=True):
                parameter.data.copy_(number)
            with Spy(family.blocks(model, "vision")[0]) as spy, torch.no_grad():
                model(**batch)
            single.detach()
            changed = spy.kept_after[0] - spy.kept[0]
            (place,) = changed.norm(dim=-1).nonzero()[:, 0].tolist()
            want = changed[place].norm() / spy.kept[0][place].norm()
            torch.testing.assert_close(everywhere.patches[0][row, col], want, rtol=1e-4, atol=0)


# What comes next -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("llama", "right"), ("llava", "left")])
@pytest.mark.parametrize("answer", [True, False])
def test_next_tokens_are_those_behind_the_prompt(name, side, answer, attached):
    family = FAMILIES[name]
    samples = TEXT_ONLY if name == "llama" else SAMPLES
    model, reft = attached(family, vlreft.Intervention("loreft", positions="prompt:l2", rank=2))
    batch = family.batch(samples, side=side, answer=answer)
    for row, sample in enumerate(samples):
        shown = next_tokens(reft, batch, TOKENIZER, row=row, top=5)
        alone = family.batch([sample], answer=False)  # padding and answers change nothing
        with torch.no_grad():
            edited_V = model(**alone).logits[0, -1].double().softmax(-1)
            with reft.disabled():
                base_V = model(**alone).logits[0, -1].double().softmax(-1)
        pairs = list(zip(base_V.tolist(), edited_V.tolist(), strict=True))
        ids = sorted(range(len(pairs)), key=lambda n: -max(pairs[n]))[:5]
        assert list(shown.ids) == ids
        assert shown.base == pytest.approx([pairs[n][0] for n in ids], rel=1e-3)
        assert shown.edited == pytest.approx([pairs[n][1] for n in ids], rel=1e-3)
        assert shown.divergence == pytest.approx(sum(q * math.log(q / p) for p, q in pairs), rel=1e-3)
        assert shown.divergence > 0.01
    with reft.disabled():
        same = next_tokens(reft, batch, TOKENIZER, row=0)
    assert same.base == same.edited
    assert same.divergence == 0


# What is refused -----------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_error(attached):
    family = FAMILIES["llava"]
    _, reft = attached(family, vlreft.Intervention("vector", site="vision", layers=[0], positions="patches"))
    batch = family.batch(SAMPLES)
    picture = Image.new("RGB", (28, 28))
    for row in (-1, 3):
        with pytest.raises(ValueError, match=re.escape(f"`row` (={row}) must be one of the batch's 3 rows")):
            placement(reft, batch, TOKENIZER, row=row)
        with pytest.raises(ValueError, match="must be one of the batch's 3 rows"):
            next_tokens(reft, batch, TOKENIZER, row=row)
    with pytest.raises(ValueError, match="1 images were given and the row has 2 pictures"):
        placement(reft, batch, TOKENIZER, row=2, image=picture)
    with pytest.raises(TypeError, match="must be a PIL image, or one for each picture of the row, got str"):
        placement(reft, batch, TOKENIZER, row=0, image=["a.png"])
    with pytest.raises(ValueError, match=re.escape("`top` (=0) must be at least 1")):
        next_tokens(reft, batch, TOKENIZER, top=0)
    with pytest.raises(TypeError, match="must be a processor with a tokenizer"):
        placement(reft, batch, object())
    with reft.disabled(), pytest.raises(ValueError, match="'default' are switched off here"):
        placement(reft, batch, TOKENIZER)


def test_a_batch_that_nothing_is_edited_in_is_drawn_as_such(attached):
    family = FAMILIES["llava"]
    _, reft = attached(family, vlreft.Intervention("vector", site="vision", layers=[0], positions="patches"))
    batch = family.batch(TEXT_ONLY)
    assert placement(reft, batch, TOKENIZER).maps == edit_norms(reft, batch, TOKENIZER).maps == ()
    assert "not edited" in words(as_drawn(plot_placement(reft, batch, TOKENIZER)))
    assert "nothing is edited in this row" in words(as_drawn(plot_edits(reft, batch, TOKENIZER)))


def test_image_tokens_without_a_patch_grid_are_a_strip_that_says_so(attached):
    """How Gemma 3's connector pools patches to image tokens is not known to the library."""
    family = next(family for family in TAIL if family.name == "gemma3")
    model = family.build()
    item = vlreft.Intervention("vector", layers=[1], positions="image:f2")
    _, reft = attached(family, item, model=model)
    batch = family.batch(SAMPLES[:1])
    (found,) = placement(reft, batch, TOKENIZER).maps
    assert found.patches == ()
    assert "not known" in found.no_grid
    assert found.text_L.nonzero()[:, 0].tolist() == plain_positions("image:f2", family.tokens(SAMPLES[0]))
    for figure in (plot_placement(reft, batch, TOKENIZER), plot_edits(reft, batch, TOKENIZER)):
        assert f"image tokens in their order, no picture: {found.no_grid}" in words(as_drawn(figure))
        strips = [axes.images[0].get_array() for axes in figure.axes if axes.images]
        (strip,) = (np.ma.filled(values, np.nan) for values in strips if values.shape == (1, 4))
        assert (strip[0] > 0).tolist() == [True, True, False, False]  # nothing is larger than not-a-number
    region = vlreft.Intervention("vector", layers=[1], positions="image:rows[0:1]cols[:]")
    reft.detach()
    with pytest.raises(ValueError, match="how its image tokens lie in the picture is not known"):
        vlreft.attach(model, vlreft.ReftConfig(region))


def test_a_batch_of_tiles_is_refused_where_rows_are_not_known(attached):
    family = next(family for family in TAIL if family.name == "llava_next")
    item = vlreft.Intervention("vector", site="vision", layers=[0], positions="patches")
    _, reft = attached(family, item, model=family.build())
    with pytest.raises(ValueError, match="give a batch of one row"):
        placement(reft, family.batch(SAMPLES), TOKENIZER, row=2)
    (found,) = placement(reft, family.batch(SAMPLES[:1]), TOKENIZER).maps
    assert all(bool(mask_RC.all()) for mask_RC in found.patches)
    assert len(found.patches) > 1  # its tiles


# Pictures and tokens as people see them ------------------------------------------------------------------------------


def chequered(width, height):
    """A picture that differs in every pixel's neighbourhood, so that a patch out of place is seen."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 13) % 256], -1).astype(np.uint8))


@pytest.mark.parametrize(("kind", "size"), [("llava", (56, 56)), ("qwen", (112, 84))])
def test_pictures_are_read_back_from_what_the_model_is_given(kind, size, attached):
    if kind == "llava":
        processor = tiny_llava_processor(image_size=56)
        model, text = tiny_llava_model(processor), "<image> what is it?"
    else:
        processor = qwen25vl_processor()
        model, text = tiny_qwen25vl_model(processor), "<|vision_start|><|image_pad|><|vision_end|> what is it?"
    picture = chequered(*size)
    batch = processor(text=[text], images=[picture], return_tensors="pt")
    _, reft = attached(kind, vlreft.Intervention("vector", layers=[0], positions="image"), model=model)
    shown = placement(reft, batch, processor)
    assert np.abs(shown.pictures[0].astype(int) - np.asarray(picture)).max() <= 1
    other = picture.rotate(180)
    assert (placement(reft, batch, processor, image=other).pictures[0] == np.asarray(other)).all()
    assert placement(reft, batch, processor.tokenizer).pictures == (None,)  # a tokenizer does not know how
    assert "".join(t for t in shown.texts["text"].tokens if "image" not in t).endswith("what is it?")


def test_open_clip_shows_picture_and_text_apart(attached):
    folder = Path(__file__).parent.parent / "assets" / "demo-clip"
    if not (folder / "open_clip_model.safetensors").is_file():
        pytest.skip("assets/demo-clip has no weights in this checkout")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    picture = chequered(64, 64)
    rows = [{"image": Image.new("RGB", (64, 64)), "text": "a red circle"}, {"image": picture, "text": "blue square"}]
    batch = vlreft.PairCollator(preprocess, tokenize)(rows)
    del batch["labels"]
    items = (
        vlreft.Intervention("vector", site="vision", layers=[0], positions="all"),
        vlreft.Intervention("vector", site="text", layers=[0], positions="eos"),
    )
    _, reft = attached("clip", *items, model=model.eval())
    shown = placement(reft, batch, tokenize, row=1)
    vision, text = shown.maps
    assert bool(vision.patches[0].all() and vision.others[0].all())
    assert [t.strip() for t in shown.texts["text"].tokens] == ["<s>", "blue", "square", "</s>"]
    assert text.text_L.tolist() == [False, False, False, True]
    assert np.abs(shown.pictures[0].astype(int) - np.asarray(picture)).max() <= 1
    as_drawn(draw_placement(shown))
    with pytest.raises(ValueError, match="has no next token: it writes no text"):
        next_tokens(reft, batch, tokenize)
    reft.detach()


def test_tokens_are_spelt_with_their_blanks(attached):
    processor = text_tokenizer()
    ids = processor("how many circles? $x$ \u4e2d\n", return_tensors="pt")
    _, reft = attached("llama", vlreft.Intervention("vector", layers=[0]), model=tiny_text_model(processor))
    shown = placement(reft, ids, processor)
    assert "".join(shown.texts["text"].tokens).startswith("how many circles? $x$ ")
    assert len(shown.texts["text"].tokens) == ids["input_ids"].shape[1]
    as_drawn(draw_placement(shown))  # dollars are no formulas, and what no font has is a box


def test_what_no_font_has_is_a_box():
    assert drawable("\U000e0041a") == "\u25a1a"
    assert drawable(" a\nb\t") == "a\u21b5b\u21e5"
    assert drawable("  ") == "\u2423\u2423"


def test_long_stretches_are_shown_by_their_ends():
    tokens = [f"t{n}" for n in range(100)]
    edited = [40 <= n < 43 for n in range(100)]
    chips = chips_of(tokens, [False] * 100, edited, longest=10, kept=3)
    assert [chip.text for chip in chips] == [
        *("t0", "t1", "t2", "\u2026 34 tokens \u2026", "t37", "t38", "t39"),
        *("t40", "t41", "t42"),
        *("t43", "t44", "t45", "\u2026 51 tokens \u2026", "t97", "t98", "t99"),
    ]
    assert [place for chip in chips for place in chip.places] == list(range(100))
    assert [chip.text for chip in chips if chip.is_edited] == ["t40", "t41", "t42"]
    image = chips_of(["i"] * 5 + ["a"], [True] * 5 + [False], [True] * 2 + [False] * 4, 10, 3)
    assert [(chip.text, chip.is_edited) for chip in image] == [("image \u00d7 2 of 5", True), ("a", False)]


def test_lines_of_tokens_end_in_time():
    chips = chips_of(["word", " longer", "x" * 400] * 9, [False] * 27, [False] * 27, 99, 9)
    lines = break_lines(chips, 8.0, 200.0)
    assert len(lines) > 9
    assert all(line[-1][0] + line[-1][1] <= 200 for line in lines)
    assert sum(map(len, lines)) == 27
    assert text_width("wwww", 8.0) > text_width("iiii", 8.0) > 0


# Drawings ------------------------------------------------------------------------------------------------------------


def test_figures_of_the_demo_say_what_the_data_say(attached):
    processor = AutoProcessor.from_pretrained(Path(__file__).parent.parent / "assets" / "demo-llava")
    items = (
        vlreft.Intervention("loreft", site="vision", positions="patches:rows[2:5]cols[0:3]", rank=2),
        vlreft.Intervention("loreft", site="text", layers=[0, 1, 3], positions="image:box[8,8,40,24]", rank=2),
        vlreft.Intervention("loreft", site="text", positions="question:f1+l2", rank=2),
    )
    _, reft = attached("demo-llava", *items)
    rows = [{"image": chequered(64, 64), "question": question} for question in ("what color is it ?", "is it red ?")]
    batch = vlreft.Collator(processor).prompts(rows)
    figure = as_drawn(plot_placement(reft, batch, processor, row=1))
    assert isinstance(figure, Figure)
    said = words(figure)
    assert "layers 0\u20133 \u00b7 9 of 64" in said
    assert "layers 0\u20131, 3 \u00b7 8 of 64" in said
    assert "layers 0\u20133 \u00b7 3 of 7 text tokens, 0 of 64 image tokens" in said
    orange = [
        patch
        for patch in figure.axes[0].patches
        if patch.get_facecolor()[:3] == pytest.approx((0.902, 0.624, 0), abs=0.01)
    ]
    assert len(orange) == 1 + 3  # the image's chip of one, three words of the other
    figure = as_drawn(plot_edits(reft, batch, processor, row=1))
    norms = edit_norms(reft, batch, processor, row=1)
    of_text = [found.text_L for found in norms.maps if found.positions == "question:f1+l2"]
    values = torch.stack(of_text)
    largest, mean = float(values[~values.isnan()].max()), float(values[~values.isnan()].mean())
    assert f"edit's length / state's length \u00b7 mean {mean:.2g}, max {largest:.2g}" in words(figure)
    heat = next(axes for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (4, 8))
    drawn = np.ma.filled(heat.images[0].get_array(), np.nan)
    want = values[:, [0, 1, 2, *range(66, values.shape[1])]]  # its 64 image tokens in one column
    np.testing.assert_allclose(drawn, want.numpy(), rtol=1e-6)
    figure = as_drawn(plot_next_tokens(reft, batch, processor, row=1, top=4))
    found = next_tokens(reft, batch, processor, row=1, top=4)
    assert {drawable(token) for token in found.tokens} <= set(words(figure))
    assert f"KL(with \u2016 without) = {found.divergence:.3g} nats" in words(figure)
    long = [bar.get_width() for bar in figure.axes[0].patches if bar.get_height() == pytest.approx(0.125)]
    shares = [share for pair in zip(found.base, found.edited, strict=True) for share in pair]
    np.testing.assert_allclose(np.array(long) / max(long), np.array(shares) / max(shares), atol=1e-6)


def test_no_figure_is_left_with_pyplot(attached):
    from matplotlib import _pylab_helpers

    _, reft = attached("llama", vlreft.Intervention("loreft", rank=2, positions="l1"))
    before = list(_pylab_helpers.Gcf.figs)
    plot_placement(reft, FAMILIES["llama"].batch(TEXT_ONLY), TOKENIZER)
    plot_next_tokens(reft, FAMILIES["llama"].batch(TEXT_ONLY), TOKENIZER)
    assert list(_pylab_helpers.Gcf.figs) == before


def test_edits_of_no_length_are_drawn_too():
    model = bare_llava()
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("vector", positions="prompt")))
    batch = {
        "input_ids": torch.tensor([[1, *[IMAGE_ID] * 4, 5]]),
        "pixel_values": torch.zeros(1, 3, 8, 8),
    }
    assert "edit's length / state's length \u00b7 nothing changes in this row" in words(
        as_drawn(plot_edits(reft, batch, TOKENIZER))
    )
    shake(reft)
    assert all(bool((found.text_L > 0).all()) for found in edit_norms(reft, batch, TOKENIZER).maps)
