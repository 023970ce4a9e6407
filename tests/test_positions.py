"""The position language against a resolver over plain Python lists; slots; what its errors point at.

A row is written with one letter a token: `.` pad, `t` text, `i` image, `a` answer, `j` an answer token with the image's
id (which is no image: images stand in prompts only).
"""

import random
from fractions import Fraction

import pytest
import torch

from vlreft.layout import Vocabulary, prompt_from_labels, text_layout, tower_layout
from vlreft.positions import SEGMENTS, parse_positions, select

IMAGE_ID = 7
LAYOUT_SEGMENTS = ("prompt", "text", "image", "question", "response")
DEVICE = torch.device("cpu")


def reference(row, text):
    """Return a list of token numbers for each part of a position string."""
    segment, _, spelled = text.partition(":") if text.split(":")[0] in SEGMENTS else ("prompt", "", text)
    prompt = [k for k, kind in enumerate(row) if kind in "ti"]
    images = [k for k in prompt if row[k] == "i"]
    words = [k for k in prompt if row[k] == "t"]
    tokens = {
        "prompt": prompt,
        "text": words,
        "image": images,
        "question": [k for k in words if not images or k > images[-1]],
        "response": [k for k, kind in enumerate(row) if kind in "aj"],
    }[segment]
    parts, n = (spelled or "all").split("+"), len(tokens)
    share = {"f", "l"} <= {part[0] for part in parts}
    groups, taken = [], set()
    for part in parts:
        if part == "all":
            chosen = tokens
        elif part[0] == "f":
            chosen = tokens[: min(int(part[1:]), n // 2 if share else n)]
        elif part[0] == "l":
            chosen = tokens[n - min(int(part[1:]), n - n // 2 if share else n) :]
        elif part[0] == "u":
            count = int(part[len("uniform") :])
            picks = {int(Fraction(2 * i + 1, 2 * count) * n) for i in range(count)}
            chosen = [token for k, token in enumerate(tokens) if k in picks]
        else:
            start, stop = (int(bound) if bound else None for bound in part[1:-1].split(":"))
            chosen = tokens[start:stop]
        groups.append([token for token in chosen if token not in taken])
        taken.update(chosen)
    return groups


def layout_of(rows):
    ids = {".": 0, "t": 3, "i": IMAGE_ID, "a": 4, "j": IMAGE_ID}
    return text_layout(
        (len(rows), len(rows[0])),
        DEVICE,
        Vocabulary((IMAGE_ID,)),
        input_ids_BL=torch.tensor([[ids[kind] for kind in row] for row in rows]),
        attention_mask_BL=torch.tensor([[int(kind != ".") for kind in row] for row in rows]),
        is_prompt_BL=torch.tensor([[kind not in "aj" for kind in row] for row in rows]),
    )


def resolved(rows, text):
    """Return what vlreft selects, in the form of `reference`: [row][part] -> token numbers."""
    masks = parse_positions(text).masks(layout_of(rows))
    return [[mask_BL[row].nonzero().flatten().tolist() for mask_BL in masks] for row in range(len(rows))]


def pad(rows, side):
    width = max(map(len, rows))
    fill = {"left": lambda row: row.rjust(width, "."), "right": lambda row: row.ljust(width, ".")}
    return [fill[side](row) for row in rows]


def random_rows(rng, side):
    rows = []
    for _ in range(rng.randint(1, 4)):
        stretches = [kind * rng.randint(0, 6) for kind in rng.choice(["t", "it", "ti", "tit", "titit", "iit", "i"])]
        answer = "".join(rng.choice("aaaj") for _ in range(rng.randint(0, 5)))
        rows.append("".join(stretches) + answer)
    return pad([*rows, "t"], side)


def selects_something(part):
    start, stop = (int(bound) if bound else None for bound in part[1:-1].split(":"))
    return any(range(n)[start:stop] for n in range(40))


def random_slice(rng):
    while True:
        start, stop = (rng.choice(["", *map(str, range(-6, 7))]) for _ in range(2))
        if selects_something(f"[{start}:{stop}]"):
            return f"[{start}:{stop}]"


def random_positions(rng, segment):
    kinds = rng.sample(["f", "l", "all", "uniform", "slice", "slice"], rng.randint(1, 3))
    spell = {"all": "all", "f": f"f{rng.randint(1, 7)}", "l": f"l{rng.randint(1, 7)}"}
    parts = [random_slice(rng) if kind == "slice" else spell.get(kind, f"uniform{rng.randint(1, 9)}") for kind in kinds]
    return rng.choice([segment, *[f"{segment}:{'+'.join(parts)}"] * 9])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("segment", LAYOUT_SEGMENTS)
def test_positions_equal_the_plain_resolver(segment, side):
    rng = random.Random(f"{segment} {side}")
    for _ in range(150):
        rows, text = random_rows(rng, side), random_positions(rng, segment)
        positions = parse_positions(text)
        groups = resolved(rows, text)
        assert groups == [reference(row, text) for row in rows], (text, rows)
        for row, parts in zip(rows, groups, strict=True):
            flat = [token for part in parts for token in part]
            assert len(flat) == len(set(flat)), (text, row)
            assert all(row[token] != "." for token in flat), (text, row)
            for part, chosen in zip(positions.selects, parts, strict=True):
                assert part.num_slots is None or len(chosen) <= part.num_slots, (text, row)


@pytest.mark.parametrize("segment", LAYOUT_SEGMENTS)
def test_padding_moves_the_positions_with_the_tokens(segment):
    rng = random.Random(segment)
    for _ in range(50):
        rows, text = [row.strip(".") for row in random_rows(rng, "left")], random_positions(rng, segment)
        for side in ("left", "right"):
            padded = pad(rows, side)
            for row, wide, groups in zip(rows, padded, resolved(padded, text), strict=True):
                shift = len(wide) - len(wide.lstrip("."))
                alone = resolved([row], text)[0] if row else [[] for _ in groups]
                assert groups == [[token + shift for token in part] for part in alone]


@pytest.mark.parametrize(
    ("text", "length", "groups"),
    [
        ("f7+l7", 20, [[0, 1, 2, 3, 4, 5, 6], [13, 14, 15, 16, 17, 18, 19]]),
        ("f7+l7", 14, [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]]),
        ("f7+l7", 5, [[0, 1], [2, 3, 4]]),
        ("l7+f7", 5, [[2, 3, 4], [0, 1]]),
        ("f2+l7", 5, [[0, 1], [2, 3, 4]]),
        ("f7+l7", 1, [[], [0]]),
        ("f7", 5, [[0, 1, 2, 3, 4]]),
        ("l7", 5, [[0, 1, 2, 3, 4]]),
        ("uniform2", 8, [[2, 6]]),
        ("uniform9", 4, [[0, 1, 2, 3]]),
        ("uniform1", 9, [[4]]),
        ("[2:-2]", 7, [[2, 3, 4]]),
        ("[-3:]", 2, [[0, 1]]),
        ("[:]", 3, [[0, 1, 2]]),
        ("f2+all", 4, [[0, 1], [2, 3]]),
        ("all+l2", 3, [[0, 1, 2], []]),
    ],
)
def test_examples(text, length, groups):
    assert resolved(["t" * length], text) == [groups]


def test_question_is_the_text_after_the_last_image():
    rows = pad(["tiitititt", "ttt", "tii", "iit"], "left")
    assert resolved(rows, "question") == [[[7, 8]], [[6, 7, 8]], [[]], [[8]]]


def test_a_bare_segment_is_all_of_it_and_no_segment_is_the_prompt():
    rows = ["ttitta"]
    assert resolved(rows, "image") == resolved(rows, "image:all")
    assert resolved(rows, "f2+l1") == resolved(rows, "prompt:f2+l1")


@pytest.mark.parametrize(
    "text", ["f4+l4", "question:l2+uniform3+[1:-1]", "image", "image:all", "[:3]", "response:[1:4]+all"]
)
def test_parts_spell_the_selects(text):
    positions = parse_positions(text)
    again = [parse_positions(part).selects[0] for part in positions.parts]
    assert tuple(again) == positions.selects


# Layouts -------------------------------------------------------------------------------------------------------------


def test_without_masks_everything_is_prompt():
    layout = text_layout((2, 3), DEVICE)
    assert layout.mask("prompt").all()
    assert not layout.mask("response").any()
    assert (layout.num_rows, layout.num_tokens) == (2, 3)


def test_the_prompt_ends_at_the_first_label():
    labels_BL = torch.tensor([[-100, -100, 5, -100, 6], [1, 2, 3, 4, 5], [-100] * 5])
    assert prompt_from_labels(labels_BL).int().tolist() == [[1, 1, 0, 0, 0], [0] * 5, [1] * 5]


@pytest.mark.parametrize("num_cls", [0, 1, 2])
def test_tower_segments(num_cls):
    layout = tower_layout((1, 6), DEVICE, num_cls)
    assert layout.mask("prompt").all()
    assert layout.mask("patches")[0].nonzero().flatten().tolist() == list(range(num_cls, 6))
    if num_cls:
        assert layout.mask("cls")[0].nonzero().flatten().tolist() == list(range(num_cls))
    else:
        with pytest.raises(ValueError, match=r"no segment 'cls' .*no class token.*'prompt', 'patches'"):
            layout.mask("cls")


@pytest.mark.parametrize(
    ("image_token_ids", "input_ids", "why"),
    [
        ((), None, "the model is text-only"),
        (None, None, "the model does not mark its image tokens"),
        ((IMAGE_ID,), None, "which were not given"),
    ],
)
def test_an_absent_segment_says_why(image_token_ids, input_ids, why):
    layout = text_layout((1, 3), DEVICE, Vocabulary(image_token_ids), input_ids_BL=input_ids)
    with pytest.raises(ValueError, match=f"no segment 'image' .*{why}.*the segments are 'prompt', 'response'"):
        parse_positions("image:f1").masks(layout)


# Generated answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selects", ["all", "f3", "f3+[2:5]", "[2:]", "[1:4]+f2+all"])
def test_answers_are_edited_alike_in_training_and_decoding(selects):
    positions = parse_positions(f"response:{selects}")
    for length in range(1, 8):
        trained = positions.masks(layout_of(["tt" + "a" * length]))
        decoded = positions.generated(torch.arange(-2, length))
        in_answer = torch.arange(-2, length) >= 0
        for mask_1L, mask_T in zip(trained, decoded, strict=True):
            assert torch.equal(mask_1L[0], mask_T & in_answer)


@pytest.mark.parametrize("selects", ["l2", "uniform3", "[-2:]", "[1:-1]", "f2+l2"])
def test_decoding_cannot_know_the_answers_end(selects):
    with pytest.raises(ValueError, match="needs the answer's length, which is unknown"):
        parse_positions(f"response:{selects}").generated(torch.arange(3))


@pytest.mark.parametrize("text", ["prompt", "question:l2+f1", "image", "text:uniform3"])
def test_prompt_segments_leave_generated_tokens_alone(text):
    assert not torch.stack(parse_positions(text).generated(torch.arange(4))).any()


# Slots ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, 0, 2, 50])
def test_slots_are_distinct_and_fillers_are_invalid(extra):
    torch.manual_seed(0)
    for _ in range(60):
        num_rows, num_tokens = (int(n) for n in torch.randint(1, 12, (2,)))
        mask_BT = torch.rand(num_rows, num_tokens) < torch.rand(())
        fullest = int(mask_BT.sum(1).max())
        num_slots = None if extra is None else fullest + extra
        selection = select(mask_BT, num_slots)
        assert torch.equal(selection.mask_BT, mask_BT)
        if selection.index_BP is None:
            assert selection.valid_BP is None
            assert (num_slots or max(fullest, 1)) >= num_tokens
            continue
        assert selection.index_BP.shape == (num_rows, max(fullest, 1) if extra is None else num_slots)
        is_full = bool((mask_BT.sum(1) == selection.index_BP.shape[1]).all())
        assert (selection.valid_BP is None) == is_full  # on the CPU, where looking is free
        valid_BP = torch.ones_like(selection.index_BP, dtype=torch.bool) if is_full else selection.valid_BP
        for mask_T, index_P, valid_P in zip(mask_BT, selection.index_BP, valid_BP, strict=True):
            assert len(set(index_P.tolist())) == len(index_P)
            assert sorted(index_P[valid_P].tolist()) == mask_T.nonzero().flatten().tolist()
            assert not mask_T[index_P[~valid_P]].any()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", 0),
        ("questoin:f4", 0),
        (":f4", 0),
        ("Text:f4", 0),
        ("question :f4", 0),
        ("prompt:", 7),
        ("question:g4", 9),
        ("question:f0", 9),
        ("text:image:f4", 5),
        ("text:rows[2:5]cols[0:3]", 5),
        ("f4+", 3),
        ("f4+l", 3),
        ("f4+l0", 3),
        ("f4+f2", 3),
        ("l1+f2+l3", 6),
        ("f4 +l4", 2),
        ("f4+ l4", 3),
        ("f4,l4", 2),
        ("f4l4", 0),
        ("F4", 0),
        ("f\N{ARABIC-INDIC DIGIT FOUR}", 0),
        ("f-4", 0),
        ("-4", 0),
        ("all4", 0),
        ("uniform", 0),
        ("text:uniform0", 5),
        ("[a:b]", 0),
        ("[1:2:3]", 0),
        ("[4]", 0),
        ("f4+[3:3]", 3),
        ("text:f1+[-2:-4]", 8),
        ("[-3:0]", 0),
        ("[:0]", 0),
        ("f99999999999999999999", 0),
        ("[0:99999999999999999999]", 0),
    ],
)
def test_the_caret_points_at_the_typo(text, place):
    with pytest.raises(ValueError, match="`positions`") as caught:
        parse_positions(text)
    headline, shown, caret, expected = str(caught.value).splitlines()
    assert repr(text) in headline
    assert f"(character {place + 1})" in headline
    assert shown == f"    {text}"
    assert caret == f"    {' ' * place}^"
    assert expected.startswith("expected: ")


@pytest.mark.parametrize(
    ("text", "offer"), [("questoin:f4", "question"), ("f4+g4", "lN"), ("foo", "a segment: prompt")]
)
def test_the_error_says_what_is_expected(text, offer):
    with pytest.raises(ValueError, match=f"expected: .*{offer}"):
        parse_positions(text)


def test_slices_are_refused_exactly_where_they_never_select_anything():
    bounds = ["", *map(str, range(-4, 5))]
    for part in (f"[{start}:{stop}]" for start in bounds for stop in bounds):
        if selects_something(part):
            assert parse_positions(part).text == part
        else:
            with pytest.raises(ValueError, match="selects nothing"):
                parse_positions(part)


@pytest.mark.parametrize("value", [None, 4, ["f4", "l4"], [[0, 1]], {"f": 4}, b"f4"])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="`positions` must be a string such as 'question:f4"):
        parse_positions(value)


def test_garbage_parses_or_is_a_value_error():
    rng = random.Random(0)
    pieces = [
        *SEGMENTS,
        "f4",
        "l2",
        "uniform9",
        "all",
        "[2:-1]",
        ":",
        "+",
        " ",
        "\n",
        "0",
        "-",
        "[",
        "]",
        "²",
        "é",
        "_",
        "f",
        "9" * 30,
    ]
    layout, outcomes = layout_of(["..tiittaaj", "tttttttttt"]), {True: 0, False: 0}
    for _ in range(1000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 5)))
        try:
            positions = parse_positions(text)
        except ValueError as error:
            assert str(error).startswith("`positions`")  # noqa: PT017 - either outcome is right
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert positions.text == text
        if positions.segment in layout.segments:
            assert len(positions.masks(layout)) == len(positions.parts)
    assert min(outcomes.values()) > 40
