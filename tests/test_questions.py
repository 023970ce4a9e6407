"""Prompts that share their beginning generate what they do in calls of their own."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import families_packed
import families_rows
import pytest
import torch
from family import IMAGE, Family, Sample
from PIL import Image
from processors import qwen25vl_processor, tiny_llava_model, tiny_llava_processor, tiny_qwen25vl_model
from torch import Tensor
from zoo import FAMILIES, intervention, shake

import vlreft
from vlreft.reuse.questions import Questions, SharedPrefixes

NUM_TOKENS = 4
MORE = {family.name: family for family in (*families_rows.ROWS, *families_packed.ROWS)}


def tight(family: Family) -> Family:
    """Return a family whose sliding windows are shorter than its prompts."""

    def build() -> Any:
        model = family.build()
        model.config.get_text_config().sliding_window = 6
        return model

    return dataclasses.replace(family, name=f"{family.name}, window of 6", build=build)


CASES = [family for family in FAMILIES.values() if "demo" not in family.name]
CASES += [MORE["gemma3"], tight(MORE["gemma3"]), MORE["qwen3_vl"], MORE["llava_next"]]
by_family = pytest.mark.parametrize("family", CASES, ids=str)

# Three questions of different lengths about one picture, one about another that begins elsewhere.
ABOUT_IMAGES = (
    Sample((5, 8, IMAGE, 11, 12, 13, 14, 15, 16), ()),
    Sample((5, 8, IMAGE, 17, 18), ()),
    Sample((5, 8, IMAGE, 9, 10, 19, 25, 26), ()),
    Sample((7, IMAGE, 10, 9, 8), ()),
)
ABOUT_WORDS = tuple(
    Sample((5, 11, 12, *more), ()) for more in ((13, 14, 15, 16), (9, 10, 17, 18, 19), (20, 21, 22, 23, 24, 25, 26))
)


def samples_of(family: Family) -> tuple[Sample, ...]:
    return ABOUT_IMAGES if family.has_image else ABOUT_WORDS


def doubled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def rows_of(family: Family, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
    return [doubled(family.batch([sample], answer=False)) for sample in samples]


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Where another order of summation cannot be mistaken for another token."""
    model.double()
    try:
        yield
    finally:
        model.float()


def model_of(family: Family, lend: Any) -> Any:
    return lend(family) if family.name in FAMILIES else family.build()


def answers(output: Any) -> list[list[int]]:
    return output[:, -NUM_TOKENS:].tolist()


# Same tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["question:f4+l4", "prompt:l4", "response", "f2+l2"])
@by_family
def test_answers_are_those_of_separate_calls(family, positions, attached, lend):
    model, _ = attached(family, intervention("loreft", positions=positions, layers="all"), model=model_of(family, lend))
    samples, options = samples_of(family), family.generation(NUM_TOKENS)
    with in_float64(model):
        alone = [model.generate(**row, **options) for row in rows_of(family, samples)]
        together = model.generate(**doubled(family.batch(samples, side="left", answer=False)), **options)
        shared = SharedPrefixes(model)
        ours = shared.generate(rows_of(family, samples), **options)
    assert answers(ours) == [answers(one)[0] for one in alone]
    assert ours.equal(together)
    assert shared.num_run < len(samples)


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.5},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("same_length", [False, True], ids=["padded", "unpadded"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_every_way_to_choose_tokens_goes_on_from_the_prefix(family, same_length, more, attached):
    family = FAMILIES[family]
    model, _ = attached(family, intervention("loreft", positions="prompt:l2", layers="all"))
    samples = samples_of(family)[:2]
    if same_length:
        samples = (samples[0], Sample((*samples[0].prompt[:-1], 27), ()))
    options = {**family.generation(NUM_TOKENS), **more}
    with in_float64(model):
        torch.manual_seed(0)
        # Pictures of a prompt in chunks are refused by transformers itself.
        plain = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
        wanted = model.generate(**doubled(family.batch(samples, side="left", answer=False)), **plain)
        shared = SharedPrefixes(model)
        shared.generate(rows_of(family, samples), **family.generation(1))  # its trial draws no random number
        torch.manual_seed(0)
        assert shared.generate(rows_of(family, samples), **options).equal(wanted)


def test_rows_with_and_without_images_go_in_one_batch(attached):
    family = FAMILIES["qwen2_5_vl"]
    model, _ = attached(family, intervention("loreft", positions="question:f2+l2", layers="all"))
    first, second, third, other = ABOUT_IMAGES
    samples = (first, other, Sample((6, 17, 18, 9), ()), second, Sample((6, 17, 20, 21), ()), third)
    with in_float64(model):
        alone = [model.generate(**row, **family.generation(NUM_TOKENS)) for row in rows_of(family, samples)]
        shared = SharedPrefixes(model)
        ours = shared.generate(rows_of(family, samples), **family.generation(NUM_TOKENS))
    assert answers(ours) == [answers(one)[0] for one in alone]
    assert shared.num_run == 3


def test_gives_what_generate_gives(attached):
    family = FAMILIES["llava"]
    model, _ = attached(family, intervention("loreft", positions="question:l1", layers="all"))
    options = family.generation(NUM_TOKENS, return_dict_in_generate=True, output_logits=True)
    wanted = model.generate(**family.batch(ABOUT_IMAGES, side="left", answer=False), **options)
    rows = [family.batch([sample], answer=False) for sample in ABOUT_IMAGES]
    ours = SharedPrefixes(model).generate(rows, **options)
    assert ours.sequences.equal(wanted.sequences)
    for a, b in zip(ours.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# What runs ---------------------------------------------------------------------------------------------------------


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Collect how many image tokens run through the decoder, forward by forward."""
    found: list[int] = []

    def before(_module: Any, _args: Any, kwargs: Any) -> None:
        found.append(int((kwargs["input_ids"] == 60).sum()))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def test_an_image_runs_once_for_all_its_questions_and_adapters(attached):
    family = FAMILIES["llava"]
    model, first = attached(family, intervention("loreft", positions="question:l2", layers="all"))
    _, second = attached(family, intervention("red", positions="response", layers="all"), name="second")
    shake(second, seed=5)
    samples, options = ABOUT_IMAGES[:3], family.generation(NUM_TOKENS)

    def each(answer: Any) -> list[Any]:
        found = [answer()]
        for switched_off in ((first,), (second,), (first, second)):
            for reft in switched_off:
                reft._set(False)
            found.append(answer())
            for reft in switched_off:
                reft._set(True)
        return found

    with in_float64(model):
        batch, rows = doubled(family.batch(samples, side="left", answer=False)), rows_of(family, samples)
        wanted = each(lambda: answers(model.generate(**batch, **options)))
        shared = SharedPrefixes(model)
        shared.generate(rows, **options)  # the trial runs an image in full
        shared.forget()
        with counted(model) as num_image_tokens:
            ours = each(lambda: answers(shared.generate(rows, **options)))
    assert ours == wanted
    assert len({str(one) for one in wanted}) == 4
    assert sum(num_image_tokens) == 4


def test_num_kept_bounds_what_is_kept(attached):
    family = FAMILIES["llava"]
    model, _ = attached(family, intervention("loreft", positions="question:l2"))
    a, b = ([family.batch([sample], answer=False)] for sample in (ABOUT_IMAGES[0], ABOUT_IMAGES[3]))
    for num_kept, num_run in ((0, 6), (1, 4), (2, 2)):
        shared = SharedPrefixes(model, num_kept=num_kept)
        for rows in (a, a, b, b, a, b) if num_kept != 1 else (a, a, b, b, a, a, b, b):
            shared.generate(rows, **family.generation(1))
        assert shared.num_run == num_run
    with pytest.raises(ValueError, match="num_kept"):
        SharedPrefixes(model, num_kept=-1)


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "f2+l2"},
        {"positions": "image:f2"},
        {"positions": "image:rows[0:1]cols[:]"},
        {"site": "vision", "positions": "patches", "layers": 0},
        {"site": "connector", "positions": "image", "layers": 0},
    ],
    ids=str,
)
def test_an_edited_prefix_is_shared_by_questions_and_not_by_adapters(fields, attached):
    """Within a call the edits are the same for all its rows; with another adapter they are not."""
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", **{"layers": "all", **fields}))
    samples, options = ABOUT_IMAGES[:2], family.generation(NUM_TOKENS)
    with in_float64(model):
        batch, rows = doubled(family.batch(samples, side="left", answer=False)), rows_of(family, samples)
        shared, found = SharedPrefixes(model), []
        for is_on in (False, True, False, True):
            reft._set(is_on)
            assert shared.generate(rows, **options).equal(model.generate(**batch, **options))
            found.append(shared.num_run)
    assert found == [1, 2, 2, 3]


def test_pads_are_those_of_the_call(attached):
    family = FAMILIES["llama"]
    model, _ = attached(family, intervention("loreft", positions="prompt:l1"))
    rows = [family.batch([sample], answer=False) for sample in ABOUT_WORDS]
    options = {**family.generation(NUM_TOKENS), "pad_token_id": 7, "repetition_penalty": 3.0}
    batch = family.batch(ABOUT_WORDS, side="left", answer=False)
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    assert SharedPrefixes(model).generate(rows, **options).equal(model.generate(**batch, **options))


def test_rows_whose_edits_differ_in_the_prefix_do_not_share_it(attached):
    family = FAMILIES["llava"]
    model, _ = attached(family, intervention("loreft", positions="uniform5", layers="all"))
    samples, options = ABOUT_IMAGES[:3], family.generation(NUM_TOKENS)
    with in_float64(model):
        shared = SharedPrefixes(model)
        ours = shared.generate(rows_of(family, samples), **options)
        wanted = model.generate(**doubled(family.batch(samples, side="left", answer=False)), **options)
    assert ours.equal(wanted)
    assert shared.num_run == 3


def test_a_trained_connector_is_not_kept():
    family = FAMILIES["llava"]
    model = family.build()
    config = vlreft.ReftConfig(
        [intervention("loreft", positions="question:l1")], modules_to_save=["multi_modal_projector"]
    )
    reft = shake(vlreft.attach(model, config))
    rows, options = [family.batch([ABOUT_IMAGES[0]], answer=False)], family.generation(NUM_TOKENS)
    shared = SharedPrefixes(model)
    edited = [shared.generate(rows, **options) for _ in range(2)]
    assert shared.num_run == 2
    with reft.disabled():
        base = shared.generate(rows, **options)
        assert base.equal(model.generate(**rows[0], **options))
    assert edited[0].equal(edited[1])
    assert edited[0].equal(model.generate(**rows[0], **options))


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("paligemma", "gives other logits from a cache"),
        ("exaone4_5", "gives other logits from a cache"),  # its `generate` counts pads as positions
        ("florence2", "is no causal decoder"),
        ("blip2", "takes no cache"),
        ("qwen3_5", "does not run from a cache .*LinearAttention"),
    ],
)
def test_says_why_a_model_shares_no_prefix(name, reason, attached, caplog):
    family = MORE[name]
    positions = "response" if name == "florence2" else "question:l1"
    model, _ = attached(family, intervention("loreft", positions=positions, layers=0), model=family.build())
    rows = [family.batch([sample], answer=False) for sample in ABOUT_IMAGES[:2]]
    with pytest.raises(ValueError, match=f"prefixes cannot be shared: .*{reason}"):
        SharedPrefixes(model).generate(rows, **family.generation(1))
    with caplog.at_level(logging.INFO, "vlreft"):
        careful = SharedPrefixes(model, required=False)
        rows = [family.batch([sample], answer=False) for sample in (ABOUT_IMAGES[0],) * 6]
        rows += [family.batch([ABOUT_IMAGES[1]], answer=False)] * 6
        assert careful.generate(rows, **family.generation(1)) is None
    assert "prefixes are not shared" in caplog.text
    assert careful.generate(rows, **family.generation(1)) is None


def test_padded_and_unpadded_calls_are_tried_apart(attached):
    """A family that is right without pads is not trusted with them."""
    family = MORE["exaone4_5"]
    model, _ = attached(family, intervention("loreft", positions="question:l1"), model=family.build())
    rows = [family.batch([sample], answer=False) for sample in ABOUT_IMAGES[:2]]
    shared = SharedPrefixes(model)
    wanted = model.generate(**rows[1], **family.generation(NUM_TOKENS))
    assert shared.generate([rows[1], rows[1]], **family.generation(NUM_TOKENS))[1:].equal(wanted)
    with pytest.raises(ValueError, match="gives other logits from a cache"):
        shared.generate(rows, **family.generation(NUM_TOKENS))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"use_cache": False}, "`use_cache`"),
        ({"cache_implementation": "static"}, "`cache_implementation`"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens`"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "`inputs_embeds` cannot be given"),
    ],
    ids=str,
)
def test_refuses_arguments_that_bring_their_own_cache_or_prompt(more, reason, attached):
    model, _ = attached("llama", intervention("loreft", positions="prompt:l2"))
    with pytest.raises(ValueError, match=reason):
        SharedPrefixes(model).generate([{"input_ids": torch.tensor([[5, 6, 7]])}], max_new_tokens=1, **more)


def test_refuses_rows_that_are_none(attached, lend):
    model = lend("llama")
    with pytest.raises(ValueError, match="no interventions attached"):
        SharedPrefixes(model)
    _, _ = attached("llama", intervention("loreft", positions="prompt:l2"))
    shared, ids = SharedPrefixes(model), torch.tensor([[5, 6, 7]])
    for rows in ([{"input_ids": ids[0]}], [{"input_ids": ids.repeat(2, 1)}], [{"attention_mask": ids}]):
        with pytest.raises(ValueError, match="row 0 must hold the `input_ids` of one prompt"):
            shared.generate(rows, max_new_tokens=1)
    with pytest.raises(ValueError, match="without padding"):
        shared.generate([{"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])}], max_new_tokens=1)
    with pytest.raises(ValueError, match="at least one prompt"):
        shared.generate([], max_new_tokens=1)
    with pytest.raises(ValueError, match="a single token"):
        shared.generate([{"input_ids": ids[:, :1]}], max_new_tokens=1)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        shared.generate([{"input_ids": ids}], max_new_tokens=1)


def test_refuses_a_prompt_that_ends_with_its_image_and_several_boxes(attached):
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", positions="image:box"))
    shared = SharedPrefixes(model)
    with pytest.raises(ValueError, match="row 0 ends with its image"), reft.boxes([(0, 0, 9, 9)]):
        shared.generate([family.batch([Sample((5, IMAGE), ())], answer=False)], max_new_tokens=1)
    rows = [family.batch([sample], answer=False) for sample in ABOUT_IMAGES[:2]]
    with pytest.raises(ValueError, match="several boxes"), reft.boxes([(0, 0, 9, 9), (9, 9, 20, 20)]):
        shared.generate(rows, max_new_tokens=1)
    batch = family.batch(ABOUT_IMAGES[:2], side="left", answer=False)
    with reft.boxes([(0, 0, 9, 9)]):
        ours = shared.generate(rows, **family.generation(NUM_TOKENS))
        assert ours.equal(model.generate(**batch, **family.generation(NUM_TOKENS)))


# Texts and pictures ------------------------------------------------------------------------------------------------

QUESTIONS = ["what is in the picture?", "is the square left of the circle?", "how many circles are there?", "a"]


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (56, 56), color)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_asks_several_questions_about_one_image(kind):
    if kind == "llava":
        processor = tiny_llava_processor(image_size=84)
        model: Any = tiny_llava_model(processor)
    else:
        processor = qwen25vl_processor()
        model = tiny_qwen25vl_model(processor)
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="question:f4+l4"))))
    collator, options = vlreft.Collator(processor), {"max_new_tokens": 8, "do_sample": False}

    def separate(image: Any) -> list[str]:
        found = []
        for question in QUESTIONS:
            pictures = {"images": image} if isinstance(image, list) else {"image": image} if image else {}
            batch = collator.prompts([{**pictures, "question": question}])
            found += collator.decode(model.generate(**batch, **options), batch["input_ids"].shape[1])
        return found

    questions = Questions(model, collator)
    for image in (picture("red"), picture("blue"), [picture("red"), picture("blue")], None):
        assert questions.ask(image, QUESTIONS, **options) == separate(image)
        with reft.disabled():
            assert questions.ask(image, QUESTIONS, **options) == separate(image)
    assert questions.shared.num_run == 5  # three of images, and one of words, whose first ones are edited, twice
    assert questions.ask(picture("red"), [], **options) == []
    with pytest.raises(ValueError, match="must be a list"):
        questions.ask(picture("red"), QUESTIONS[0])


def test_answers_examples_grouped_by_what_they_begin_with():
    processor = tiny_llava_processor(image_size=84)  # 36 image tokens
    model: Any = tiny_llava_model(processor)
    shake(vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="question:l2"))))
    collator, options = vlreft.Collator(processor), {"max_new_tokens": 8, "do_sample": False}
    examples: list[dict[str, Any]] = [
        {"image": picture(color), "question": question} for question in QUESTIONS for color in ("red", "blue")
    ]
    batch = collator.prompts(examples)
    wanted = collator.decode(model.generate(**batch, **options), batch["input_ids"].shape[1])
    careful = Questions(model, collator, required=False)
    assert careful.answer(examples, **options) == wanted
    assert careful.shared.num_run == 2
    alone = [example for example in examples if example["question"] == QUESTIONS[0]]
    careful.shared.forget()
    assert careful.answer(alone, **options) == [wanted[0], wanted[1]]
    assert careful.shared.num_run == 2  # nothing to share: the plain call
    assert careful.answer(examples, **options, use_cache=False) == wanted
