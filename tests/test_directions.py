"""`steer`: its vectors equal formulas written anew, whatever the batches and the padding, and act like any adapter."""

import numpy as np
import pytest
import torch
from PIL import Image
from processors import text_tokenizer, tiny_llava_model, tiny_llava_processor, tiny_text_model
from tiny import IMAGE_ID, llama, llava, text_batch, untouched

import vlreft
from vlreft.causes.directions import WAYS, Masked, Spread, set_directions, steer

V = vlreft.Intervention
PATCHES = V("vector", site="vision", layers=[0, 1], positions="patches")
WIDTH = 16


@pytest.fixture
def lm():
    return llama()


@pytest.fixture
def demo():
    """The demo model, its collator, a maker of noisy pictures with their scenes, and of captions."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from assets import world

    def picture(split, number, noise):
        rng = world.scene_rng(split, number)
        scene = world.make_scene(rng)
        return world.render(scene, rng, noise=noise), scene

    model = AutoModelForImageTextToText.from_pretrained("assets/demo-llava", dtype=torch.float32).eval()
    return model, vlreft.Collator(AutoProcessor.from_pretrained("assets/demo-llava")), picture, world.caption


def rows(num, seed, lengths=(3, 6)):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (num,), generator=generator).tolist()
    return [{"ids": torch.randint(1, 29, (size,), generator=generator)} for size in sizes]


def padded(side):
    """Return a collator of rows of ids that pads on a side."""

    def collate(given):
        ids = [row["ids"] for row in given]
        masks = [torch.ones_like(row) for row in ids]
        pad = {"batch_first": True, "padding_side": side}
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, **pad),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(masks, **pad),
        }

    return collate


LEFT, RIGHT = padded("left"), padded("right")


@torch.no_grad()
def states(model, given, layer):
    """Return each row's states behind a block, one row at a time, in float64."""
    return [model(row["ids"][None], output_hidden_states=True).hidden_states[layer + 1][0].double() for row in given]


def last(model, given, layer):
    return torch.stack([state[-1] for state in states(model, given, layer)]).numpy()


def vectors(reft):
    return [edit.vector.detach().double().numpy() for edit in reft.edits.values()]


def find(model, config, collate, **options):
    """Return the vectors that `steer` finds, taken off again."""
    reft = steer(model, config, collate, **options)
    found = vectors(reft)
    reft.detach()
    return found


def pca(d_ND):
    c_D = np.linalg.svd(d_ND)[2][0]
    return c_D * (c_D @ d_ND.mean(0))


def vti(d_ND):
    mean_D = d_ND.mean(0)
    values, basis_DD = np.linalg.eigh(np.cov(d_ND.T))
    c_D = basis_DD[:, values.argmax()]
    v_D = mean_D + c_D * np.sign(c_D @ mean_D)
    return v_D / np.linalg.norm(v_D)


# Formulas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [5, 40], ids=["fewer pairs than the width", "more"])
@pytest.mark.parametrize(("how", "formula"), [("pca", pca), ("vti", vti), ("pairs", lambda d_ND: d_ND.mean(0))])
def test_paired_ways_equal_their_formulas(lm, how, formula, num):
    positive, negative = rows(num, 1), rows(num, 2)
    both = find(lm, V("vector", layers=[0, 1]), LEFT, positive=positive, negative=negative, how=how)
    for layer, found in enumerate(both):
        expected = formula(last(lm, positive, layer) - last(lm, negative, layer))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.linalg.norm(expected))


def test_the_mean_difference_is_over_tokens_and_needs_no_pairs(lm):
    positive, negative, where = rows(5, 1), rows(9, 2), V("vector", layers=[1], positions="prompt")
    up, down = (torch.cat(states(lm, given, 1)).mean(0).numpy() for given in (positive, negative))
    (found,) = find(lm, [where], RIGHT, positive=positive, negative=negative)
    np.testing.assert_allclose(found, up - down, atol=1e-7)
    (found,) = find(lm, [where], RIGHT, positive=positive, how="mean")
    np.testing.assert_allclose(found, up, atol=1e-7)


def test_vectors_of_vti_interventions_have_length_one(lm):
    config = [V("vti", layers=[0]), V("vector", layers=[0])]
    unit, plain = find(lm, config, LEFT, positive=rows(5, 1), negative=rows(9, 2))
    assert abs(np.linalg.norm(plain) - 1) > 0.05
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), atol=1e-6)


def test_parts_have_vectors_of_their_own_unless_one_read_serves_them(lm):
    positive, negative = rows(4, 1), rows(4, 2)
    sets = {"positive": positive, "negative": negative}
    found = find(lm, V("vector", layers=[0, 1], positions="f1+l1"), LEFT, **sets)
    for layer in (0, 1):
        up, down = (np.stack([state[[0, -1]] for state in states(lm, given, layer)]) for given in (positive, negative))
        np.testing.assert_allclose(np.stack(found[2 * layer : 2 * layer + 2]), (up - down).mean(0), atol=1e-7)
    shared = find(lm, V("vector", layers=[0, 1], positions="f1+l1"), LEFT, read="l1", **sets)
    for got, place in zip(shared, (1, 1, 3, 3), strict=True):
        np.testing.assert_array_equal(got, found[place])
    (merged,) = find(lm, V("vector", layers=[1], positions="f1+l1", tied=True), LEFT, **sets)
    np.testing.assert_allclose(merged, (found[2] + found[3]) / 2, atol=1e-7)


def test_each_intervention_has_a_read_of_its_own(lm):
    sets = {"positive": rows(4, 1), "negative": rows(4, 2)}
    config = [V("vector", layers=[1], positions=text) for text in ("l1", "f1", "response")]
    one, two, three = find(lm, config, LEFT, read=[None, "l1", "f1"], **sets)
    np.testing.assert_array_equal(one, two)
    (first,) = find(lm, config[1], LEFT, **sets)
    np.testing.assert_array_equal(three, first)
    assert np.abs(one - three).max() > 1e-3


def test_what_is_read_can_be_another_component_and_single_heads(lm):
    sets = {"positive": rows(4, 1), "negative": rows(4, 2)}
    (plain,) = find(lm, V("vector", layers=[1]), LEFT, **sets)
    (at_mlp,) = find(lm, V("vector", layers=[1], component="mlp"), LEFT, read_component="output", **sets)
    np.testing.assert_array_equal(plain, at_mlp)
    seen = []
    hook = lm.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1]))
    with torch.no_grad():
        for row in sets["positive"] + sets["negative"]:
            lm(row["ids"][None])
    hook.remove()
    heads = find(lm, V("vector", layers=[1], component="heads", heads=[1, 0]), LEFT, **sets)
    expected = torch.stack(seen[:4]).mean(0) - torch.stack(seen[4:]).mean(0)
    np.testing.assert_allclose(np.concatenate(heads[::-1]), expected.numpy(), atol=1e-7)


def pictures(num, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixels": torch.randn(3, 8, 8, generator=generator)} for _ in range(num)]


def with_picture(given):
    ids_BL = torch.tensor([[3, *[IMAGE_ID] * 4, 5, 6]]).repeat(len(given), 1)
    return {"input_ids": ids_BL, "pixel_values": torch.stack([row["pixels"] for row in given])}


def test_towers_and_image_tokens_are_read_where_they_are():
    model, positive, negative = llava(), pictures(5, 1), pictures(3, 2)
    config = [PATCHES, V("vector", site="connector", positions="image"), V("vector", layers=[0], positions="image")]
    found = find(model, config, with_picture, positive=positive, negative=negative, batch_size=2)
    means = []
    for given in (positive, negative):
        batch = with_picture(given)
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
            tower = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        places = [tower[1][:, 1:], tower[2][:, 1:], hidden[0][:, 1:5], hidden[1][:, 1:5]]
        means.append([place.flatten(0, 1).mean(0).numpy() for place in places])
    for got, up, down in zip(found, *means, strict=True):
        np.testing.assert_allclose(got, up - down, atol=1e-6)


# Invariance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
def test_neither_batches_nor_padding_change_a_direction(lm, how):
    sets = {"positive": rows(23, 1), "negative": None if how == "mean" else rows(23, 2)}
    batches = ((LEFT, 1), (LEFT, 7), (RIGHT, 5), (RIGHT, 100))
    found = [
        find(lm, V("vector", layers=[1]), collate, how=how, batch_size=size, **sets)[0] for collate, size in batches
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-5 * np.linalg.norm(found[0]))


def test_the_mode_of_the_model_does_not_matter_and_stays():
    model, sets = llama(attention_dropout=0.5), {"positive": rows(4, 1), "negative": rows(4, 2)}
    (before,) = find(model, V("vector", layers=[1]), LEFT, **sets)
    model.train()
    (after,) = find(model, V("vector", layers=[1]), LEFT, **sets)
    assert model.training
    np.testing.assert_array_equal(after, before)


def test_a_bfloat16_base_has_float32_vectors_near_those_of_float32(lm):
    sets = {"positive": rows(8, 1), "negative": rows(8, 2)}
    (expected,) = find(lm, V("vector", layers=[1]), LEFT, **sets)
    model = llama().to(torch.bfloat16)
    reft = steer(model, V("vector", layers=[1]), LEFT, **sets)
    assert {parameter.dtype for parameter in reft.parameters()} == {torch.float32}
    assert np.linalg.norm(vectors(reft)[0] - expected) < 0.02 * np.linalg.norm(expected)
    assert model(**text_batch()).logits.dtype == torch.bfloat16


def test_memory_does_not_follow_the_data():
    spread, generator = Spread(), torch.Generator().manual_seed(0)
    x_ND = torch.randn(1000, 6, generator=generator, dtype=torch.float64) + 3.0
    for part in x_ND.split(4):
        spread.add(part)
        assert sum(len(kept) for kept in spread.kept) < 6
    centred = np.linalg.svd((x_ND - x_ND.mean(0)).numpy(), full_matrices=False)[2][0]
    assert abs(centred @ spread.component(centred=True).numpy()) == pytest.approx(1, abs=1e-9)
    assert spread.component(centred=True) @ spread.value > 0


# As an adapter -------------------------------------------------------------------------------------------------------

SAME = (V("vector", layers=[1], positions="prompt:l1"), V("vector", layers=[1], positions="response"))


def test_one_direction_acts_on_the_prompt_and_on_generated_tokens(lm):
    reft = steer(lm, list(SAME), LEFT, positive=rows(4, 1), negative=rows(4, 2), read="prompt:l1")
    prompt, generated = vectors(reft)
    np.testing.assert_array_equal(prompt, generated)
    batch = LEFT(rows(3, 5))
    with reft.scaled(20.0):
        steered = lm.generate(**batch, max_new_tokens=6, do_sample=False)
    with reft.disabled():
        assert torch.equal(lm.generate(**batch, max_new_tokens=6, do_sample=False), generate(lm, batch, None))
    reft.detach()
    assert torch.equal(steered, generate(lm, batch, 20.0 * torch.tensor(prompt, dtype=torch.float32)))
    assert not torch.equal(steered, generate(lm, batch, None))


def generate(model, batch, vector_D):
    """Generate with a vector added behind block 1: to a prompt's last token, then to every token."""

    def add(_module, _given, h_BTD):
        moved = h_BTD.clone()
        moved[:, -1] += 0.0 if vector_D is None else vector_D
        return moved

    hook = model.model.layers[1].register_forward_hook(add)
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    hook.remove()
    return out


def test_saved_loaded_and_switched_off(lm, tmp_path):
    sets = {"positive": rows(4, 1), "negative": rows(4, 2)}
    batch = text_batch()
    base = lm(**batch).logits
    reft = steer(lm, [V("vector"), V("vti", component="mlp", scale=0.3, positions="prompt")], LEFT, **sets)
    steered = lm(**batch).logits
    with reft.disabled():
        assert torch.equal(lm(**batch).logits, base)
    with reft.scaled(0.0):
        assert torch.equal(lm(**batch).logits, base)
    assert not torch.allclose(steered, base, atol=1e-3)
    reft.save_pretrained(tmp_path)
    reft.detach()
    again = vlreft.load(lm, tmp_path)
    assert torch.equal(lm(**batch).logits, steered)
    again.detach()
    assert torch.equal(lm(**batch).logits, base)


def test_training_goes_on_from_a_direction(tmp_path):
    from transformers import TrainingArguments

    model, collator = tiny_text_model(text_tokenizer(chat=True)), vlreft.Collator(text_tokenizer(chat=True))
    data = [{"question": "is it left?", "answer": "yes"}, {"question": "is it right?", "answer": "no"}] * 4
    reft = steer(model, V("vector", layers=[0]), collator, positive=data[:1], negative=data[1:2])
    start = vectors(reft)[0]
    settings = TrainingArguments(str(tmp_path), max_steps=4, learning_rate=1e-2, report_to="none", use_cpu=True)
    trainer = vlreft.ReftTrainer(model=model, args=settings, train_dataset=data, data_collator=collator)
    trainer.train()
    moved = np.abs(vectors(reft)[0] - start).max()
    assert 1e-3 < moved < 0.1


def test_answers_of_rows_can_be_read():
    model, collator = tiny_text_model(text_tokenizer(chat=True)), vlreft.Collator(text_tokenizer(chat=True))
    ask = {"question": "is it left?"}
    positive, negative = ([{**ask, "answer": text} for text in texts] for texts in (["yes", "yes, it is"], ["no"]))
    where = V("vector", layers=[0], positions="response")
    reft = steer(model, where, collator, positive=positive, negative=negative, read="response", batch_size=1)
    found = vectors(reft)[0]
    reft.detach()
    means = []
    for given in (positive, negative):
        taken = []
        for row in given:
            batch = collator([row])
            with torch.no_grad():
                states_LD = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1][0]
            taken.append(states_LD[batch["labels"][0] != -100])
        means.append(torch.cat(taken).mean(0))
    np.testing.assert_allclose(found, (means[0] - means[1]).numpy(), atol=1e-6)


# The tower's corrupted pictures --------------------------------------------------------------------------------------


def test_masked_copies_keep_the_patches_that_are_not_masked():
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    row = {"image": Image.fromarray(noise), "question": "how many?"}
    masked, again = (Masked([row, row], side=5, share=0.6, num=3, seed=seed) for seed in (1, 1))
    mean = noise.reshape(-1, 3).mean(0).round()
    for copy, same in zip(masked, again, strict=True):
        pixels = np.asarray(copy["image"])
        patches = pixels.reshape(5, 8, 5, 12, 3).swapaxes(1, 2).reshape(25, -1, 3)
        originals = noise.reshape(5, 8, 5, 12, 3).swapaxes(1, 2).reshape(25, -1, 3)
        is_mean = (np.abs(patches.astype(int) - mean) <= 1).all((1, 2))
        is_kept = (patches == originals).all((1, 2))
        assert (is_mean.sum(), is_kept.sum()) == (15, 10)
        assert np.array_equal(pixels, np.asarray(same["image"]))
        assert copy["question"] == "how many?"
    assert len(masked) == 6
    assert len({np.asarray(copy["image"]).tobytes() for copy in masked}) == 6
    assert np.array_equal(np.asarray(Masked([row], side=5, share=0.0, num=1)[0]["image"]), noise)
    assert np.array_equal(np.asarray(row["image"]), noise)


def test_vti_for_the_tower_from_masked_copies():
    model, collator = tiny_llava_model(tiny_llava_processor()), vlreft.Collator(tiny_llava_processor())
    generator = np.random.default_rng(0)
    data = [
        {"image": Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8)), "question": "what is it?"}
        for _ in range(3)
    ]
    where = V("vti", site="vision", component="mlp", positions="all", scale=0.09)
    positive, negative = (Masked(data, side=4, share=share, num=2) for share in (0.9, 0.0))
    reft = steer(model, where, collator, positive=positive, negative=negative, how="vti", read_component="output")
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-6) for vector in vectors(reft))
    batch = collator.prompts(data)
    with reft.recording() as edits:
        logits = model(**batch).logits
    assert max(float(edit.relative_BT.max()) for edit in edits) < 0.0901  # |h| unit(unit(h) + 0.09 v) is no further
    with reft.disabled():
        assert not torch.equal(model(**batch).logits, logits)


@pytest.mark.slow
def test_vti_makes_the_demo_describe_noisy_pictures_better(demo):
    """Masked copies lead away from noise: captions name fewer made-up objects, which a random direction does not do."""
    model, collator, picture, caption = demo
    test = [(*picture("vtitest", number, 40.0), "describe the image") for number in range(60)]

    def made_up():
        batch = collator.prompts([{"image": image, "question": question} for image, _, question in test])
        ids_BS = model.generate(**batch, max_new_tokens=32, do_sample=False)
        said = [text.split(" , ") for text in collator.decode(ids_BS, batch["input_ids"].shape[1])]
        true = [caption(scene).split(" , ") for _, scene, _ in test]
        wrong = [name not in names for found, names in zip(said, true, strict=True) for name in found]
        return sum(wrong) / len(wrong)

    base = made_up()
    demos = [{"image": picture("vtitrain", number, 40.0)[0], "question": "describe the image"} for number in range(20)]
    positive, negative = (Masked(demos, side=8, share=share, num=5) for share in (0.99, 0.0))
    where = V("vti", site="vision", component="mlp", positions="all", scale=0.09)
    reft = steer(model, where, collator, positive=positive, negative=negative, how="vti", read_component="output")
    steered = made_up()
    set_directions(reft, [torch.nn.functional.normalize(torch.randn(128), dim=0) for _ in reft.edits])
    drawn = made_up()
    assert base > 0.35
    assert steered < base - 0.08 < drawn


# Bad input -----------------------------------------------------------------------------------------------------------

TWO, THREE = rows(2, 1), rows(3, 2)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (V("loreft", rank=2), {}, "method 'loreft'"),
        ([V("vector"), V("interchange", init="reference")], {}, "intervention 1 has method 'interchange'"),
        (V("vector"), {"positive": []}, "`positive` has 0 rows"),
        (V("vector"), {"negative": []}, "`negative` has 0 rows"),
        (V("vector"), {"positive": TWO[0]}, "must be a list of rows"),
        (V("vector"), {"negative": None}, "give `negative`"),
        (V("vector"), {"how": "mean"}, "leave `negative` out"),
        (V("vector"), {"how": "median"}, "must be one of 'mean'"),
        (V("vector"), {"batch_size": 0}, "`batch_size`"),
        (V("vector"), {"how": "pca"}, "2 positive and 3 negative rows"),
        (V("vector"), {"how": "pairs", "negative": THREE[:2], "read": "prompt"}, "pair 0 has . positive and"),
        (V("vector"), {"how": "vti", "positive": TWO[:1], "negative": THREE[:1]}, "needs at least 2"),
        (V("vector", positions="response"), {}, "say where to read"),
        (V("vector", positions="response"), {"read": [None, "l1"]}, "`read` has 2 entries for 1"),
        (V("vector", positions="f1+l1"), {"read": "f1+l1+[1:2]"}, "has 3 parts"),
        (V("vector"), {"read": "prompt:l"}, "is no select"),
        (V("vector"), {"read": "patches"}, "no segment 'patches'"),
        (V("vector"), {"read": "[50:60]"}, "no token"),
        (V("vector", component="heads", heads="all"), {"read_component": "mlp"}, "edits heads"),
        (V("vector"), {"negative": rows(2, 1, (4, 4))}, "do not differ"),
        (V("vti"), {"negative": rows(2, 1, (4, 4)), "how": "vti"}, "do not differ"),
        (V("vector"), {"name": "no name"}, "`name`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_with_one_clear_error_and_nothing_stays(lm, config, options, message):
    call = {"positive": rows(2, 1, (4, 4)), "negative": rows(3, 2, (6, 6)), **options}
    with untouched(lm), pytest.raises(ValueError, match=message):
        steer(lm, config, LEFT, **call)


def test_a_row_without_the_tokens_to_read_is_refused(lm):
    given = [*rows(2, 2, (6, 6)), *rows(1, 3, (3, 3))]
    call = {"positive": given[:2], "read": "[4:6]"}
    with untouched(lm), pytest.raises(ValueError, match="negative rows 0 to 2: number 2 of these has no token"):
        steer(lm, V("vector"), LEFT, negative=given, **call)
    with untouched(lm), pytest.raises(ValueError, match="negative rows 2 to 2: number 0"):
        steer(lm, V("vector"), LEFT, negative=given, batch_size=2, **call)


def test_states_that_are_not_finite_are_refused():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1 are not finite"):
        steer(model, V("vector"), LEFT, positive=TWO, negative=THREE)
    assert not hasattr(model, "vlreft")


def test_failing_rows_leave_an_earlier_adapter_as_it_was(lm):
    def fail(_):
        raise KeyError("rows are broken")

    first = vlreft.attach(lm, vlreft.ReftConfig(V("loreft", rank=2)))
    with untouched(lm), pytest.raises(KeyError):
        steer(lm, V("vector"), fail, positive=TWO, negative=THREE, name="second")
    with pytest.raises(ValueError, match="attached already"):
        steer(lm, V("vector"), LEFT, positive=TWO, negative=THREE)
    first.detach()


def test_given_directions_have_to_fit(lm):
    reft = vlreft.attach(lm, vlreft.ReftConfig(V("vector", layers=[0, 1])))
    given = [torch.arange(WIDTH), torch.ones(WIDTH, dtype=torch.float64)]
    set_directions(reft, given)
    assert [vector.tolist() for vector in vectors(reft)] == [direction.tolist() for direction in given]
    bad = torch.full((WIDTH,), torch.inf)
    for wrong, message in (
        ([torch.ones(WIDTH)], "1 directions were given for 2"),
        ([torch.ones(WIDTH), torch.ones(8)], "has shape .8,. and the states there have width 16"),
        ([torch.ones(WIDTH), bad], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            set_directions(reft, wrong)
    assert [vector.tolist() for vector in vectors(reft)] == [direction.tolist() for direction in given]
    reft.detach()
    trained = vlreft.attach(lm, vlreft.ReftConfig(V("loreft", layers=[0], rank=1)))
    with pytest.raises(ValueError, match="method 'loreft'"):
        set_directions(trained, [torch.ones(WIDTH)])
    trained.detach()


def test_pairs_need_as_many_pictures():
    def one_or_two(given):
        batch = with_picture([*given, *given]) if given[0]["two"] else with_picture(given)
        return batch

    positive, negative = ([{**row, "two": two} for row in pictures(2, two)] for two in (1, 0))
    with pytest.raises(ValueError, match="4 positive and 2 negative pictures"):
        steer(llava(), PATCHES, one_or_two, positive=positive, negative=negative, how="pca")
