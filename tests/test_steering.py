"""The steering scripts: honest rows, what is said to be exact is exact, bad boxes are refused, figures hold."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from zoo import shake

import vlreft

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))  # the scripts import each other by bare name

import steer_conditional  # noqa: E402
import steer_region  # noqa: E402
import steering  # noqa: E402

from assets import world  # noqa: E402

DEMO = str(ROOT / "assets" / "demo-llava")
SITES = [("connector", "image:box"), ("text", "image:box"), ("vision", "patches:box")]
BOX = (21, 0, 43, 21)  # the top center cell: patches 2 to 5 of the rows 0 to 2
INSIDE = torch.tensor([[2 <= col <= 5 and row <= 2 for col in range(8)] for row in range(8)]).flatten()


# Rows ----------------------------------------------------------------------------------------------------------------


def language_rows(split, num_rows):
    rows = steer_conditional.demo_rows(split, "language", steer_conditional.TOLD["language"])
    return steering.half_and_half(rows, num_rows)


def region_rows(split, num_rows, change="color"):
    return steering.half_and_half(steer_region.demo_rows(split, change), num_rows)


def has_red_pixels(image):
    r, g, b = (np.asarray(image).astype(int)[:, :, channel] for channel in range(3))
    return bool(((r > 200) & (g < 60) & (b < 60)).sum() >= 10)


def test_targets_are_the_pictures_with_something_red_in_their_pixels():
    rows = language_rows("test", 300)
    assert [row["target"] for row in rows] == [has_red_pixels(row["image"]) for row in rows]
    assert sum(row["target"] for row in rows) == 150


@pytest.mark.parametrize("say", ["language", "style"])
def test_only_targets_are_to_be_answered_otherwise(say):
    for row in islice(steer_conditional.demo_rows("test", say, "{question}"), 200):
        assert row["target"] == (row["answer"] != row["plain"])
        assert row["told"] == row["question"]


def test_the_question_does_not_give_the_condition_away():
    rows = language_rows("train", 1200)
    assert not any("red" in row["question"].split() for row in rows)
    kinds = [{" ".join(row["question"].split()[:4]) for row in rows if row["target"] == side} for side in (True, False)]
    assert {"what is the color", "what is the size", "what is the shape"} <= kinds[0] & kinds[1]
    # The best guess by the question alone, learned on one half of the rows and tried on the other.
    seen: dict[str, list[bool]] = {}
    for row in rows[::2]:
        seen.setdefault(row["question"], []).append(row["target"])
    guesses = [np.mean(seen.get(row["question"], [True])) >= 0.5 for row in rows[1::2]]
    assert np.mean([guess == row["target"] for guess, row in zip(guesses, rows[1::2], strict=True)]) < 0.62


def test_the_language_has_a_word_of_its_own_for_everything():
    words = list(steer_conditional.LANGUAGE.values())
    assert len(set(words)) == len(words) == 16
    assert not set(words) & set(steer_conditional.LANGUAGE)
    tokenizer = AutoProcessor.from_pretrained(DEMO).tokenizer
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert all(len(row) == 1 and row[0] != tokenizer.unk_token_id for row in ids)


@pytest.mark.parametrize("make", [language_rows, region_rows])
def test_train_and_test_share_no_picture(make):
    train, test = make("train", 200), make("test", 200)
    steering.check_apart(train, test)
    assert not {row["image"].tobytes() for row in train} & {row["image"].tobytes() for row in test}
    with pytest.raises(ValueError, match=r"pictures are in train and in test, e\.g\. 'test/"):
        steering.check_apart([*train, test[0]], test)


def test_half_and_half_refuses_to_invent_rows():
    rows = language_rows("test", 20)
    assert sum(row["target"] for row in steering.half_and_half(iter(rows), 10)) == 5
    with pytest.raises(ValueError, match="of 60 rows, 20 targets and 20 others are missing"):
        steering.half_and_half(iter(rows), 60)


@pytest.mark.parametrize("change", ["color", "gone"])
def test_a_box_holds_its_object(change):
    """Seen in the pixels: all of it but an edge of a large one, and nothing of its colour elsewhere."""
    num_checked = 0
    for row in region_rows("test", 80, change):
        split, index = row["picture"].split("/")
        colors = [thing.color for thing in world.make_scene(world.scene_rng(split, int(index)))]
        if len(set(colors)) < len(colors):
            continue
        left, top, right, bottom = row["box"]
        pixels = np.asarray(row["image"]).astype(int)
        is_object = np.abs(pixels - pixels[(top + bottom) // 2, (left + right) // 2]).max(-1) < 12
        inside = is_object[top:bottom, left:right].sum()
        assert 25 < inside < 0.75 * 21 * 21  # not the background
        assert inside >= 0.95 * is_object.sum()
        num_checked += 1
    assert num_checked > 20


def test_region_rows_are_targets_where_the_change_makes_another_answer():
    rows = list(islice(steer_region.demo_rows("test", "color"), 400))
    of_size = [row for row in rows if row["question"].startswith("what is the size")]
    of_color = [row for row in rows if row["question"].startswith("what is the color") and row["target"]]
    assert len(of_size) > 20
    assert not any(row["target"] for row in of_size)
    assert all(steer_region.NEXT_COLOR[row["plain"]] == row["answer"] for row in of_color)
    assert all(row["target"] == (row["plain"] != row["answer"]) for row in rows)


def test_boxes_on_the_background_touch_nothing():
    moved = list(steer_region.on_background(region_rows("test", 400)))
    assert len(moved) > 60
    for row in moved:
        left, top, right, bottom = row["box"]
        patch = np.asarray(row["image"]).astype(int)[
            top // 8 * 8 : -(-bottom // 8) * 8, left // 8 * 8 : -(-right // 8) * 8
        ]
        assert np.ptp(patch.reshape(-1, 3), axis=0).max() == 0
        assert row["answer"] == row["plain"]


def test_which_pictures_hold_a_thing():
    def row(image, question, answer):
        return {"image": image, "question": question, "answer": answer}

    rows = [
        row("a", "Is there a dog in the picture?", "yes"),
        row("b", "Are there any dogs?", "no"),
        row("c", "What is this?", "dog"),
        row("d", "Is there a dog?", "no"),
        row("d", "What runs?", "two dogs"),
        row("e", "Is the dog brown?", "no"),  # there may be one
        row("f", "Is there a dog collar?", "no"),  # says nothing of dogs
    ]
    assert steer_conditional.pictures_with("dog", rows) == {"a": True, "b": False, "c": True, "d": True}
    made = list(steer_conditional.real_rows(rows, "dog", "{answer}, woof", "Bark. {question}"))
    assert [(one["picture"], one["answer"]) for one in made[:2]] == [("a", "yes, woof"), ("b", "no")]
    assert made[0]["told"] == "Bark. Is there a dog in the picture?"
    with pytest.raises(ValueError, match="each row needs a column `target`"):
        list(steer_conditional.real_rows(rows, None, "{answer}", "{question}"))


def test_boxes_follow_their_picture_into_another_size(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"image": str(tmp_path / "a.png"), "question": "q", "answer": "a", "box": [50, 10, 101, 100], "target": True}
    (made,) = steer_region.real_rows([row], "{answer} sir", "{question}", 64)
    assert made["image"].size == (64, 64)
    assert made["box"] == (16, 6, 33, 64)
    assert (made["answer"], made["plain"]) == ("a sir", "a")
    with pytest.raises(ValueError, match="row 0 needs `target`"):
        list(steer_region.real_rows([{**row, "box": None}], "{answer}", "{question}", 64))


# Figures -------------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    def row(target, plain, answer):
        return {"target": target, "plain": plain, "answer": answer}

    rows = [row(True, "red", "zib"), row(True, "blue", "wug"), row(True, "red", "zib"), row(True, "red", "zib")]
    rows += [row(False, "two", "two"), row(False, "one", "one"), row(False, "no", "no"), row(False, "no", "no")]
    base = ["red", "blue", "red", "red", "two", "one", "no", "yes"]
    answers = ["Zib ", "blue", "zib", "dax", "two", "zib", "no", "no"]
    # Damage counts a wrong answer of the base that became right for the edit; `changed` against it.
    found = steering.figures(rows, answers, base)
    assert found == steering.Figures(effect=0.5, plain=0.25, kept=0.75, damage=0.0, changed=0.5)
    one = steering.SeedResult(0, found, {1.0: found}, 1.0, 1.0, {"x": 0.2})
    two = steering.SeedResult(1, steering.figures(rows, base, base), {}, 1.0, 1.0, {"x": 0.4})
    total = steering.summary(found, found, [one, two])
    assert total["mean"]["effect"] == 0.25
    assert total["sd"]["x"] == pytest.approx(0.1 * 2**0.5)


# What is exact -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    return model, vlreft.Collator(AutoProcessor.from_pretrained(DEMO))


@pytest.fixture
def placed(demo):
    """Attach one shaken LoReFT, big enough to be heard everywhere it may be; take it off afterwards."""
    model, collator = demo
    ours = []

    def place(site, positions, layers="all"):
        config = vlreft.ReftConfig(vlreft.Intervention("loreft", site=site, layers=layers, positions=positions, rank=4))
        ours.append(shake(vlreft.attach(model, config)))
        return model, ours[-1], collator.prompts(region_rows("test", 4))

    yield place
    for reft in ours:
        if reft.is_attached:
            reft.detach()


def states(model, batch):
    """Return what enters and leaves the language model's blocks, and each patch's states in the tower, and logits."""
    entered = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    patches = []
    handles = [
        layer.register_forward_hook(lambda *call: patches.append(call[2] if torch.is_tensor(call[2]) else call[2][0]))
        for layer in model.model.vision_tower.encoder.layers
    ]
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    for each in (handle, *handles):
        each.remove()
    return entered[0], output.hidden_states[1:], [h[:, 1:] for h in patches], output.logits


def image_tokens(batch, h):
    return h[batch["input_ids"] == 4].reshape(len(h), 64, -1)


def test_at_the_connector_the_tokens_outside_the_box_are_the_bases(placed):
    model, reft, batch = placed("connector", "image:box")
    with reft.disabled():
        base, base_layers, _, base_logits = states(model, batch)
    with reft.boxes([BOX]):
        edited, layers, _, logits = states(model, batch)
    assert torch.equal(image_tokens(batch, edited)[:, ~INSIDE], image_tokens(batch, base)[:, ~INSIDE])
    assert (image_tokens(batch, edited) != image_tokens(batch, base)).any(-1)[:, INSIDE].all()
    assert torch.equal(edited[batch["input_ids"] != 4], base[batch["input_ids"] != 4])
    assert not torch.allclose(logits[:, -1], base_logits[:, -1], atol=1e-3)  # the question hears of it
    # Tokens before the box's first one cannot see it in any layer: attention is causal.
    for ours, theirs in zip(layers, base_layers, strict=True):
        torch.testing.assert_close(
            image_tokens(batch, ours)[:, :2], image_tokens(batch, theirs)[:, :2], atol=1e-5, rtol=0
        )


def test_in_the_towers_last_block_patches_outside_the_box_are_the_bases_and_leak_from_earlier_ones(placed):
    model, reft, batch = placed("vision", "patches:box", 3)
    with reft.disabled():
        base = states(model, batch)[2]
    with reft.boxes([BOX]):
        last = states(model, batch)[2]
    assert torch.equal(last[3][:, ~INSIDE], base[3][:, ~INSIDE])
    assert (last[3] != base[3]).any(-1)[:, INSIDE].all()
    reft.detach()
    _, early, _ = placed("vision", "patches:box", 1)
    with early.boxes([BOX]):
        found = states(model, batch)[2]
    assert torch.equal(found[1][:, ~INSIDE], base[1][:, ~INSIDE])
    assert (found[3] - base[3])[:, ~INSIDE].abs().amax() > 1e-3


@pytest.mark.parametrize(("site", "positions"), SITES)
def test_without_strength_the_box_says_nothing(placed, site, positions):
    model, reft, batch = placed(site, positions)
    with reft.disabled(), torch.no_grad():
        base = model(**batch).logits
    with reft.boxes([BOX]), torch.no_grad():
        with reft.scaled(0.0):
            assert torch.equal(model(**batch).logits, base)
        assert not torch.allclose(model(**batch).logits, base, atol=1e-3)


def test_each_row_has_its_own_box_and_strength(placed):
    """Rows of one batch do not hear of each other's boxes: each is what it is alone."""
    model, reft, batch = placed("connector", "image:box")
    boxes = [BOX, (0, 43, 21, 64), (21, 21, 43, 43), (43, 43, 64, 64)]
    with torch.no_grad(), reft.boxes(boxes), reft.scaled([1.0, 0.5, 0.0, 1.0]):
        together = model(**batch).logits
    with torch.no_grad(), reft.disabled():
        base = model(**batch).logits
    torch.testing.assert_close(together[2], base[2], atol=1e-5, rtol=0)
    for row, strength in ((0, 1.0), (1, 0.5), (3, 1.0)):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        with torch.no_grad(), reft.boxes([boxes[row]]), reft.scaled(strength):
            torch.testing.assert_close(model(**one).logits[0], together[row], atol=1e-4, rtol=0)
        assert not torch.allclose(together[row], base[row], atol=1e-3)


def test_the_trainer_gives_each_batch_its_boxes(placed, tmp_path):
    model, reft, _ = placed("connector", "image:box")
    rows = region_rows("train", 4)
    collator = steering.BoxCollator(AutoProcessor.from_pretrained(DEMO))
    batch = collator(rows)
    assert batch["boxes"].tolist() == [list(row["box"]) for row in rows]
    trainer = steering.SteeringTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        data_collator=collator,
        reuse_prefix=False,
    )
    loss = trainer.compute_loss(model, batch)
    inputs = {key: value for key, value in batch.items() if key != "boxes"}
    with reft.boxes(batch["boxes"].tolist()):
        torch.testing.assert_close(loss, model(**inputs).loss)
    with reft.boxes(batch["boxes"].flip(0).tolist()):
        assert abs(model(**inputs).loss - loss) > 1e-3


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "positions"), SITES)
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(0, 0, 65, 10)], r"the box \[0, 0, 65, 10\] reaches out of picture 0, which is 64 x 64 pixels"),
        ([BOX, BOX, BOX, (0, 60, 10, 70)], "reaches out of picture 3"),
        ([BOX, BOX], "2 boxes were given for 4 pictures"),
    ],
    ids=["too wide", "too low", "too few"],
)
def test_bad_boxes_are_refused_when_the_model_runs(placed, site, positions, boxes, message):
    model, reft, batch = placed(site, positions)
    with pytest.raises(ValueError, match=message), reft.boxes(boxes):
        model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize(("site", "positions"), SITES)
def test_surplus_boxes_are_refused(placed, site, positions):
    model, reft, batch = placed(site, positions)
    with pytest.raises(ValueError, match="5 boxes were given for 4 pictures"), reft.boxes([BOX] * 5):
        model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize(("site", "positions"), SITES)
def test_a_box_that_is_not_given_is_asked_for(placed, site, positions):
    model, _, batch = placed(site, positions)
    with pytest.raises(ValueError, match="`box` needs a box for each picture"):
        model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize("box", [(-1, 0, 8, 8), (8, 0, 8, 8), (0, 9, 8, 8), (0, 0, 8)])
def test_boxes_without_area_are_refused_at_once(placed, box):
    _, reft, _ = placed("connector", "image:box")
    with (
        pytest.raises(ValueError, match=r"must be \(left, top, right, bottom\) in pixels, with some area"),
        reft.boxes([box]),
    ):
        pass


def test_scripts_say_what_their_options_lack(tmp_path):
    args = steering.command_line("", str(tmp_path), lr=1.0, rank=1, num_train=4, num_test=4).parse_args([])
    args.say, args.told, args.when = "shouting", None, None
    with pytest.raises(ValueError, match="must be one of language, style"):
        steer_conditional.load_rows(args, "test", 4)
    args.data = str(tmp_path)
    with pytest.raises(ValueError, match=r"give --say a text with \{answer\}"):
        steer_conditional.load_rows(args, "test", 4)


# Figures of the scripts ----------------------------------------------------------------------------------------------


def run_script(name, output, *options):
    command = [sys.executable, f"examples/{name}.py", "--output", str(output), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for picture in ("examples.png", "dial.png"):
        assert (output / picture).stat().st_size > 10_000
    return json.loads((output / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "effect_at_least", "damage_at_most", "parameters"),
    [
        ("steer_conditional", (), 0.85, 0.05, 8224),
        ("steer_region", (), 0.90, 0.03, 2056),
        ("steer_region", ("--change", "gone"), 0.94, 0.03, 2056),
    ],
    ids=["language if red", "another colour in the box", "nothing in the box"],
)
def test_script_reaches_its_figures(tmp_path, name, options, effect_at_least, damage_at_most, parameters):
    results = run_script(name, tmp_path, *options)
    assert results["trainable_parameters"] == parameters
    assert results["num_targets"] == results["num_others"] == 200
    assert results["base"]["effect"] <= 0.03
    assert results["base"]["kept"] >= 0.97
    assert results["prompting"]["effect"] <= 0.4  # the demo model hardly follows instructions
    assert results["mean"]["effect"] >= effect_at_least
    assert results["mean"]["damage"] <= damage_at_most
    assert results["mean"].get("changed_by_empty_box", 0.0) <= 0.03
    (seed,) = results["seeds"]
    dial = {at["strength"]: at for at in seed["dial"]}
    assert dial[0.0]["effect"] == results["base"]["effect"]
    assert dial[0.0]["changed"] == 0.0  # the base, whatever was trained
    assert dial[0.0]["effect"] < dial[0.5]["effect"] <= dial[1.0]["effect"] == seed["reft"]["effect"]
    assert dial[2.0]["changed"] >= dial[1.0]["changed"]
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32)
    assert vlreft.load(model, tmp_path / "adapter").num_parameters() == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["steer_conditional", "steer_region"])
def test_script_takes_other_data(tmp_path, name):
    """Rows as a user would write them, in pictures of another size than the model's."""
    for split, num_rows in (("train", 16), ("test", 8)):
        rows = region_rows(split, num_rows) if name == "steer_region" else language_rows(split, num_rows)
        lines = []
        for number, row in enumerate(rows):
            row["image"].resize((128, 96)).save(tmp_path / f"{split}{number}.png")
            left, top, right, bottom = row.get("box", (0, 0, 64, 64))
            line = {key: row[key] for key in ("question", "target")} | {"answer": row["plain"]}
            line |= {"image": f"{split}{number}.png", "box": [2 * left, top, 2 * right, bottom]}
            lines.append(json.dumps(line))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    options = ["--data", str(tmp_path), "--num-train", "16", "--num-test", "8", "--epochs", "1", "--batch-size", "4"]
    options += ["--say", "{answer} please", "--told", "say please . {question}"]
    options += ["--side", "64"] if name == "steer_region" else []
    results = run_script(name, tmp_path / "out", *options)
    assert (results["num_train"], results["num_targets"], results["num_others"]) == (16, 4, 4)
