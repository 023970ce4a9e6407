"""Laws of `Collator` over processors and tokenizers, and of the loaders over small folders in both layouts."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processors import (
    llava15_processor,
    pad_is_eos_tokenizer,
    qwen25vl_processor,
    text_tokenizer,
    tiny_llava_model,
    tiny_llava_processor,
    tiny_paligemma_model,
    tiny_paligemma_processor,
    tiny_qwen25vl_model,
    tiny_text_model,
    word_tokenizer,
)
from transformers import CLIPImageProcessor, CLIPProcessor

from vlreft.data.collator import Collator
from vlreft.data.datasets import load_captions, load_jsonl, load_vqa

VISION = {"llava": tiny_llava_processor, "qwen25vl": qwen25vl_processor}
TEXT = {
    "chat": lambda: text_tokenizer(chat=True),
    "plain": text_tokenizer,
    "pad=eos": pad_is_eos_tokenizer,
    "words": word_tokenizer,
}
ALL = {**VISION, **TEXT}
MODELS = {
    "llava": tiny_llava_model,
    "qwen25vl": tiny_qwen25vl_model,
    "chat": tiny_text_model,
    "pad=eos": tiny_text_model,
}


def picture(colour="red", size=(60, 40)):
    return Image.new("RGB", size, colour)


def examples_for(kind):
    """Rows with one image, none and two (the last two also differ in size), or rows of text alone."""
    rows = [
        {"question": "what is in the picture?", "answer": "a red circle", "id": "first"},
        {"question": "is the square left of the circle?", "answer": "yes"},
        {"question": "how many circles are there?", "answer": "two circles, and a zebra é", "question_id": 7},
    ]
    if kind in VISION:
        rows[0]["image"] = picture()
        rows[1]["images"] = []
        rows[2]["images"] = [picture("blue"), picture("green", (28, 120))]
    return rows


def real(batch, row, key="input_ids"):
    return batch[key][row][batch["attention_mask"][row].bool()].tolist()


def answer_ids(batch, row):
    return [i for i in batch["labels"][row].tolist() if i != -100]


@pytest.fixture(params=ALL)
def case(request):
    processor = ALL[request.param]()
    return Collator(processor, prompt_format="question: {question} answer:"), examples_for(request.param)


# --- prompts and labels -------------------------------------------------------------------------------------------


def test_the_prompt_of_training_is_the_prompt_of_generation(case):
    collator, examples = case
    train, generate = collator(examples), collator.prompts(examples)
    for row in range(len(examples)):
        ids = real(train, row)
        assert ids[: len(ids) - len(answer_ids(train, row))] == real(generate, row)


def test_a_prompt_does_not_depend_on_its_batch(case):
    collator, examples = case
    for make in (collator, collator.prompts):
        batch = make(examples)
        for row, example in enumerate(examples):
            alone = make([example])
            assert alone["attention_mask"].all()
            for key in alone.keys() & {"input_ids", "labels", "mm_token_type_ids", "token_type_ids"}:
                assert real(batch, row, key) == alone[key][0].tolist()


@pytest.mark.parametrize("kind", VISION)
def test_prompts_equal_the_processors_own_route(kind):
    processor = VISION[kind]()
    examples = examples_for(kind)
    batch = Collator(processor).prompts(examples)
    pixels = []
    for row, example in enumerate(examples):
        images = example.get("images", [example.get("image")])
        parts = [{"type": "image", "image": image} for image in images]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": example["question"]}]}]
        own = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert real(batch, row) == own["input_ids"][0].tolist()
        pixels += [own["pixel_values"]] if images else []
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))


def test_text_prompts_equal_the_tokenizers_own_route():
    tokenizer = text_tokenizer(chat=True)
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is it left?"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    batch = Collator(tokenizer).prompts([{"question": "is it left?"}])
    assert batch["input_ids"][0].tolist() == list(own["input_ids"])


@pytest.mark.parametrize("kind", VISION)
def test_left_padding_equals_the_processors_own(kind):
    processor = VISION[kind]()
    examples = [e | {"images": e.get("images", []) or [e.get("image", picture())]} for e in examples_for(kind)]
    examples = [{k: v for k, v in e.items() if k != "image"} for e in examples]
    batch = Collator(processor).prompts(examples)
    turns = [as_messages(e, "column")["messages"][:1] for e in examples]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    bos = bool(processor.tokenizer.bos_token) and texts[0].startswith(processor.tokenizer.bos_token)
    own = processor(
        text=texts,
        images=[e["images"] for e in examples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not bos,
    )
    assert batch.keys() == own.keys()
    assert all(torch.equal(batch[key], own[key]) for key in own)


def test_labels_are_the_answer_and_one_end_token(case):
    collator, examples = case
    batch = collator(examples)
    eos = collator.tokenizer.eos_token_id
    is_labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_labelled], batch["input_ids"][is_labelled])
    for row, example in enumerate(examples):
        ids = answer_ids(batch, row)
        assert ids[-1] == eos
        assert ids.count(eos) == 1
        assert real(batch, row)[-len(ids) :] == ids
        if collator.tokenizer.unk_token_id not in ids:
            assert collator.tokenizer.decode(ids[:-1]).strip() == example["answer"]


def test_padding_is_right_for_training_and_left_for_generation(case):
    collator, examples = case
    train, generate = collator(examples), collator.prompts(examples)
    assert (train["attention_mask"].diff(dim=1) <= 0).all()
    assert (generate["attention_mask"].diff(dim=1) >= 0).all()
    assert "labels" not in generate
    for batch in (train, generate):
        pad = collator.tokenizer.pad_token_id
        is_pad = batch["attention_mask"] == 0
        assert (batch["input_ids"][is_pad] == (collator.tokenizer.eos_token_id if pad is None else pad)).all()
        assert all(value.dtype == torch.int64 for key, value in batch.items() if key != "pixel_values")
    assert (train["labels"][train["attention_mask"] == 0] == -100).all()


def test_the_end_is_learnt_where_pad_is_the_end():
    tokenizer = pad_is_eos_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = Collator(tokenizer)([{"question": "is it?", "answer": a} for a in ("yes", "no, it is not a circle")])
    num_ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert num_ends.tolist() == [1, 1]
    num_seen = ((batch["input_ids"] == tokenizer.eos_token_id) & batch["attention_mask"].bool()).sum(1)
    assert num_seen.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ALL)
def test_an_answer_that_ends_with_the_end_token_has_it_once(kind):
    processor = ALL[kind]()
    collator = Collator(processor)
    bare = {"question": "is it?", "answer": "yes"}
    ended = bare | {"answer": f"yes{collator.tokenizer.eos_token}"}
    assert answer_ids(collator([bare]), 0) == answer_ids(collator([ended]), 0)


def test_a_start_token_is_there_once():
    tokenizer = pad_is_eos_tokenizer()
    for prompt_format in ("{question}", "<s>{question}"):
        batch = Collator(tokenizer, prompt_format=prompt_format)([{"question": "is it?", "answer": "yes"}])
        assert batch["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    with pytest.raises(ValueError, match="row 1 of the batch begins with the start token '<s>' and row 0"):
        Collator(tokenizer).prompts([{"question": "is it?"}, {"question": "<s>is it?"}])


def test_braces_around_the_question_are_text():
    batch = Collator(text_tokenizer(), prompt_format='{"q": "{question}"}').prompts([{"question": "is {it}?"}])
    assert text_tokenizer().decode(batch["input_ids"][0]) == '{"q": "is {it}?"}'


def test_an_answer_is_tokenised_as_it_follows_its_prompt():
    tokenizer = text_tokenizer()
    batch = Collator(tokenizer, prompt_format="{question} answer:")([{"question": "is it?", "answer": "yes, it is"}])
    assert real(batch, 0)[:-1] == tokenizer("is it? answer: yes, it is")["input_ids"]


def test_an_answer_on_a_new_line_is_no_word_after_a_blank():
    tokenizer = pad_is_eos_tokenizer()
    batch = Collator(tokenizer, prompt_format="{question}\n")([{"question": "is it?", "answer": "yes"}])
    assert real(batch, 0)[:-1] == tokenizer("is it?\nyes")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(answer_ids(batch, 0)) != [*tokenizer.tokenize("yes"), "</s>"]


def test_the_answer_never_merges_into_the_prompt():
    tokenizer = text_tokenizer()
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    collator = Collator(tokenizer, prompt_format="{question}\n")
    example = {"question": "there are two circles", "answer": "\nyes"}
    answer = answer_ids(collator([example]), 0)
    assert real(collator([example]), 0) == real(collator.prompts([example]), 0) + answer
    assert tokenizer.decode(answer[:-1]) == "\nyes"


def test_a_template_that_writes_its_past_otherwise_gives_the_bare_answer():
    tokenizer = text_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[think]{% endif %}"
    )
    batch = Collator(tokenizer)([{"question": "is it?", "answer": "yes"}])
    assert tokenizer.decode(real(batch, 0)) == "[user]is it?[think]yes<|im_end|>"


def test_a_template_that_drops_the_answer_gives_the_bare_answer():
    tokenizer = text_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    batch = Collator(tokenizer)([{"question": "is it?", "answer": "yes"}])
    assert tokenizer.decode(real(batch, 0)) == "is it? yes<|im_end|>"


def test_no_blank_is_learnt_between_an_answer_and_its_end():
    collator = Collator(tiny_llava_processor())
    example = {"question": "is it?", "answer": "yes"}
    assert collator.processor.apply_chat_template(as_messages(example, "held")["messages"]).endswith("yes ")
    answer = collator.tokenizer.convert_ids_to_tokens(answer_ids(collator([example]), 0))
    assert "".join(answer) == "▁yes</s>"


def test_a_turn_mark_that_is_not_the_end_token_is_kept_before_it():
    tokenizer = text_tokenizer(chat=True)
    tokenizer.eos_token = "<|endoftext|>"
    batch = Collator(tokenizer)([{"question": "is it?", "answer": "yes"}])
    assert tokenizer.decode(answer_ids(batch, 0)) == "yes<|im_end|><|endoftext|>"


# --- images -------------------------------------------------------------------------------------------------------


def test_llava15_has_576_tokens_an_image():
    processor = llava15_processor()
    batch = Collator(processor)(examples_for("llava"))
    counts = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert counts.tolist() == [576, 0, 1152]
    assert batch["pixel_values"].shape == (3, 3, 336, 336)


def test_qwen_has_as_many_tokens_as_features():
    processor = qwen25vl_processor()
    batch = Collator(processor)(examples_for("qwen25vl"))
    is_image = batch["input_ids"] == processor.image_token_id
    assert len(batch["image_grid_thw"]) == 3
    assert is_image.sum() == batch["image_grid_thw"].prod(1).sum() // 4
    assert torch.equal(is_image, batch["mm_token_type_ids"] == 1)


@pytest.mark.parametrize("kind", VISION)
def test_a_batch_without_images_has_no_pixels(kind):
    collator = Collator(VISION[kind]())
    examples = [{"question": "is it?", "answer": "yes"}, {"question": "is it not?", "answer": "no", "image": None}]
    for batch in (collator(examples), collator.prompts(examples)):
        assert not batch.keys() & {"pixel_values", "image_grid_thw"}


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK"])
def test_images_of_every_mode_and_paths_are_read_alike(kind, mode, tmp_path):
    collator = Collator(VISION[kind]())
    image = picture().convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    image.save(path)
    batches = [
        collator.prompts([{"question": "is it?", **columns}])
        for columns in ({"image": image}, {"image": str(path)}, {"images": [path]})
    ]
    assert all(torch.equal(batches[0]["pixel_values"], batch["pixel_values"]) for batch in batches)


def test_images_are_turned_upright(tmp_path):
    image = picture(size=(28, 112))
    image.paste("blue", (0, 0, 28, 56))
    turned = image.rotate(90, expand=True)
    exif = Image.Exif()
    exif[274] = 6  # "turn by 90 degrees to the right to see it upright"
    turned.save(tmp_path / "turned.png", exif=exif)
    collator = Collator(qwen25vl_processor())
    ours, theirs = (collator.prompts([{"question": "x", "image": i}]) for i in (tmp_path / "turned.png", image))
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


# --- chat messages ------------------------------------------------------------------------------------------------


def as_messages(example, layout, path=None):
    """The columns as messages: images in the entries, as files, or in the column that the entries draw from."""
    images = example.get("images", [example["image"]] if "image" in example else [])
    if layout == "paths":
        for number, image in enumerate(images):
            image.save(path / f"{number}.png")
        images = [str(path / f"{number}.png") for number in range(len(images))]
    held = layout in ("held", "paths")
    entries = [{"type": "image", "image": image if held else None, "text": None} for image in images]
    content = [*entries, {"type": "text", "text": example["question"]}]
    answer = example["answer"] if layout == "column" else [{"type": "text", "text": example["answer"]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({} if held else {"images": images})


@pytest.mark.parametrize("kind", [*VISION, "chat"])
@pytest.mark.parametrize("layout", ["held", "column", "paths"])
def test_messages_equal_columns(kind, layout, tmp_path):
    collator = Collator(ALL[kind]())
    for example in examples_for(kind):
        chat = as_messages(example, layout, tmp_path)
        for make in (collator, collator.prompts):
            ours, theirs = make([chat]), make([example])
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", [*VISION, "chat"])
def test_a_text_as_content_is_a_list_of_one_text(kind):
    collator = Collator(ALL[kind]())
    bare = {"messages": [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]}
    columns = {"question": "is it?", "answer": "yes"}
    assert torch.equal(collator([bare])["input_ids"], collator([columns])["input_ids"])


@pytest.mark.parametrize("kind", [*VISION, "chat"])
def test_only_the_last_answer_of_a_conversation_is_learnt(kind):
    collator = Collator(ALL[kind]())
    turns = ["is it a circle?", "yes", "a blue one?", "no, it is red"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    batch = collator([{"messages": messages}])
    assert collator.tokenizer.decode(answer_ids(batch, 0)[:-1]).strip() == turns[-1]
    assert all(turn in collator.tokenizer.decode(real(batch, 0)) for turn in turns)
    with_user_last = collator.prompts([{"messages": messages[:-1]}])
    assert torch.equal(with_user_last["input_ids"], collator.prompts([{"messages": messages}])["input_ids"])


def test_entries_without_an_image_take_the_columns_next():
    collator = Collator(tiny_llava_processor())
    first, held, last = picture("red"), picture("green"), picture("blue")
    entries = [{"type": "image"}, {"type": "image", "image": held}, {"type": "image"}]
    content = [*entries, {"type": "text", "text": "is it?"}]
    mixed = {"messages": [{"role": "user", "content": content}], "images": [first, last]}
    columns = {"question": "is it?", "images": [first, held, last]}
    assert torch.equal(collator.prompts([mixed])["pixel_values"], collator.prompts([columns])["pixel_values"])


def test_a_placeholder_may_be_written_in_the_text():
    collator = Collator(tiny_llava_processor())
    written = {"messages": [{"role": "user", "content": "<image>\nis it?"}], "images": [picture()]}
    entry = {"question": "is it?", "image": picture()}
    assert torch.equal(collator.prompts([written])["input_ids"], collator.prompts([entry])["input_ids"])


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_cutting_takes_the_end_of_the_answer_alone(kind, caplog):
    processor = ALL[kind]()
    example = examples_for(kind)[0] | {"answer": "there are two circles and a square"}
    whole = Collator(processor)([example])
    num_prompt = Collator(processor).prompts([example])["input_ids"].shape[1]
    for num_left in range(1, len(answer_ids(whole, 0)) + 1):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vlreft"):
            cut = Collator(processor, max_length=num_prompt + num_left, overflow="cut")([example])
        assert real(cut, 0) == real(whole, 0)[: num_prompt + num_left]
        assert answer_ids(cut, 0) == answer_ids(whole, 0)[:num_left]
        assert [r.name for r in caplog.records] == ["vlreft"] * (num_left < len(answer_ids(whole, 0)))
        assert all("sample 'first' (row 0 of the batch)" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("kind", ALL)
def test_the_tokenizers_own_limit_cuts_nothing(kind):
    processor, short = ALL[kind](), ALL[kind]()
    collator = Collator(short)
    collator.tokenizer.model_max_length = 6
    examples = examples_for(kind)
    assert torch.equal(collator(examples)["input_ids"], Collator(processor)(examples)["input_ids"])


def test_a_prompt_is_never_cut():
    collator = Collator(tiny_llava_processor())
    example = {"question": "is it?", "answer": "yes", "image": picture(), "question_id": 9}
    length = collator.prompts([example])["input_ids"].shape[1]
    for overflow in ("error", "cut"):
        small = Collator(collator.processor, max_length=length, overflow=overflow)
        message = rf"sample 9 \(row 1 of the batch\) has a prompt of {length} tokens, 4 of them image tokens"
        short = {"question": "", "answer": "a"}
        with pytest.raises(ValueError, match=message):
            small([short, example])
        with pytest.raises(ValueError, match="raise `max_length` or use smaller images"):
            Collator(collator.processor, max_length=length - 1, overflow=overflow).prompts([example])
        assert torch.equal(small.prompts([example])["input_ids"], collator.prompts([example])["input_ids"])


def test_an_answer_beyond_the_limit_is_an_error_that_names_it():
    example = {"question": "is it?", "answer": "yes, it is", "id": "q1"}
    length = Collator(text_tokenizer())([example])["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"sample 'q1' \(row 0 of the batch\).*`max_length` \(=\d+\).*overflow='cut'"):
        Collator(text_tokenizer(), max_length=length - 1)([example])
    Collator(text_tokenizer(), max_length=length)([example])


# --- errors -------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "is it?"}
REPLY = {"role": "assistant", "content": "yes"}
BAD_ROWS = {
    "no known column": ({"prompt": "x", "label": "y"}, r"'label', 'prompt'\]; expected `question`"),
    "no answer": ({"question": "x"}, "expected `question` and `answer`"),
    "empty answer": ({"question": "x", "answer": " \n"}, "empty answer"),
    "empty reply": ({"messages": [USER, REPLY | {"content": ""}]}, "empty answer"),
    "answer of another type": ({"question": "x", "answer": ["y"]}, "`answer` of type list"),
    "image token in the answer": ({"question": "x", "answer": "a <image> b"}, "special token"),
    "pad token in the answer": ({"question": "x", "answer": "a <pad> b"}, "special token"),
    "end token in the answer": ({"question": "x", "answer": "a </s> b"}, "end token '</s>' inside"),
    "image token in the question": ({"question": "<image> x", "answer": "y"}, r"0 image\(s\) and 1 place"),
    "image without a place": ({"messages": [USER, REPLY], "images": [picture()]}, r"1 image\(s\) and 0 place.*add an"),
    "place without an image": (
        {"messages": [USER | {"content": [{"type": "image"}]}, REPLY]},
        r"0 image\(s\) and 1 place.*give an image",
    ),
    "image in the answer": ({"messages": [USER, REPLY | {"content": [{"type": "image"}]}]}, "image in its answer"),
    "user last": ({"messages": [USER]}, "the last must be the assistant's"),
    "no messages": ({"messages": []}, "the last must be the assistant's"),
    "nothing asked": ({"messages": [REPLY]}, "no message before"),
    "a video": ({"messages": [USER | {"content": [{"type": "video"}]}, REPLY]}, "message entry .*video"),
    "a url": (
        {"messages": [USER | {"content": [{"type": "image", "url": "http://x"}]}, REPLY]},
        "download what has a url",
    ),
    "no content": ({"messages": [USER | {"content": None}, REPLY]}, "content is None"),
    "image missing": ({"question": "x", "answer": "y", "image": "gone.png"}, "cannot be read: 'gone.png'"),
    "image of another type": ({"question": "x", "answer": "y", "image": 3}, "image of type int"),
    "images not a list": ({"question": "x", "answer": "y", "images": picture()}, "`images` of type Image"),
    "two columns": ({"question": "x", "answer": "y", "image": picture(), "images": []}, "both `image` and `images`"),
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named(row):
    example, message = BAD_ROWS[row]
    good = {"question": "is it?", "answer": "yes"}
    collator = Collator(tiny_llava_processor())
    with pytest.raises(ValueError, match=rf"(?s)sample 'bad' \(row 1 of the batch\).*{message}"):
        collator([good, example | {"id": "bad"}])
    with pytest.raises(ValueError, match=rf"(?s)^row 0 of the batch.*{message}"):
        collator([example])


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_names_path_and_sample(content, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sample 'bad'.*picture\.png"):
        Collator(tiny_llava_processor()).prompts([{"question": "x", "image": path, "id": "bad"}])


def test_a_tokenizer_takes_no_images_and_no_messages_without_a_template():
    with pytest.raises(ValueError, match="row 0 of the batch has 1 image"):
        Collator(text_tokenizer()).prompts([{"question": "x", "image": picture()}])
    with pytest.raises(ValueError, match="has no chat template; give `question`"):
        Collator(text_tokenizer()).prompts([{"messages": [USER]}])
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        Collator(text_tokenizer()).prompts([{"question": ""}])
    with pytest.raises(ValueError, match="at least one example"):
        Collator(text_tokenizer())([])
    with pytest.raises(ValueError, match=r"row 0 of the batch \(a str\)"):
        Collator(text_tokenizer())(["question"])


def test_wrong_settings_are_refused():
    for processor in (None, "llava", CLIPImageProcessor()):
        with pytest.raises(ValueError, match="must be a transformers processor"):
            Collator(processor)
    for settings in (
        {"max_length": 0},
        {"overflow": "drop"},
        {"prompt_format": "Q:"},
        {"prompt_format": "{x}"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Collator(text_tokenizer(), **settings)
    endless, padless = text_tokenizer(), tiny_llava_processor()
    endless.eos_token = padless.tokenizer.pad_token = None
    for processor, token in ((endless, "end token"), (padless, "pad token")):
        with pytest.raises(ValueError, match=f"without an? {token}"):
            Collator(processor)


def test_a_processor_without_an_image_token_takes_text_alone():
    collator = Collator(CLIPProcessor(CLIPImageProcessor(), pad_is_eos_tokenizer()))
    with pytest.raises(ValueError, match="CLIPProcessor has no image token"):
        collator.prompts([{"question": "x", "image": picture()}])
    assert collator.prompts([{"question": "is it?"}])["input_ids"].numel()


def test_a_tokenizer_that_ends_prompts_is_refused():
    from tokenizers.processors import TemplateProcessing

    tokenizer = pad_is_eos_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    with pytest.raises(ValueError, match="ends the prompt with its end token '</s>'"):
        Collator(tokenizer).prompts([{"question": "is it?"}])


# --- the collator as an object ------------------------------------------------------------------------------------


def test_a_pickled_collator_makes_the_same_batches(case):
    collator, examples = case
    copy = pickle.loads(pickle.dumps(collator))
    for make, remake in ((collator, copy), (collator.prompts, copy.prompts)):
        ours, theirs = make(examples), remake(examples)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_is_left_as_it_was(case, side):
    collator, examples = case
    tokenizer = collator.tokenizer
    tokenizer.padding_side = side
    before = (side, tokenizer.truncation_side, tokenizer.pad_token_id, len(tokenizer), tokenizer.chat_template)
    reference = tokenizer(["is it?"])["input_ids"]
    collator(examples), collator.prompts(examples)
    with pytest.raises(ValueError, match="empty answer"):
        collator([*examples, {"question": "x", "answer": ""}])
    after = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id, len(tokenizer))
    assert (*after, tokenizer.chat_template) == before
    assert tokenizer(["is it?"])["input_ids"] == reference


def test_examples_are_left_as_they_were():
    example = as_messages(examples_for("llava")[2], "column")
    before = repr(example)
    Collator(tiny_llava_processor())([example])
    assert repr(example) == before


def test_decode_gives_what_follows_the_prompt(case):
    collator, examples = case
    train, generate = collator(examples), collator.prompts(examples)
    width = generate["input_ids"].shape[1]
    answers = [torch.tensor(answer_ids(train, row)) for row in range(len(examples))]
    pad = collator.tokenizer.pad_token_id or collator.tokenizer.eos_token_id
    tails = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad)
    texts = collator.decode(torch.cat([generate["input_ids"], tails], dim=1), width)
    for text, ids, example in zip(texts, answers, examples, strict=True):
        if collator.tokenizer.unk_token_id not in ids.tolist():
            assert text == example["answer"]
    with pytest.raises(ValueError, match="`prompt_length`"):
        collator.decode(generate["input_ids"], width + 1)


def test_importing_is_light():
    # Run as files: the package around them imports more.
    folder = Path(__file__).parent.parent / "vlreft"
    code = (
        "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]];"
        "assert not {'datasets', 'pyarrow', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, folder / "data/collator.py", folder / "data/datasets.py"], check=True)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_on_the_batch(kind):
    processor = ALL[kind]()
    model = MODELS[kind](processor)
    batch = Collator(processor)(examples_for(kind))
    output = model(**batch)
    output.loss.backward()
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(logits, labels))
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", MODELS)
def test_generation_of_a_batch_equals_that_of_its_rows(kind):
    processor = ALL[kind]()
    model, collator = MODELS[kind](processor), Collator(processor)

    def generated(examples):
        batch = collator.prompts(examples)
        ids = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        return ids[:, batch["input_ids"].shape[1] :]

    examples = examples_for(kind)
    assert torch.equal(generated(examples), torch.cat([generated([example]) for example in examples]))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # PaliGemma's processor
def test_prompts_have_no_labels_where_the_processor_makes_its_own():
    processor, (example, *_) = tiny_paligemma_processor(), examples_for("llava")
    assert "labels" in processor(text="<image>x", images=picture(), return_tensors="pt")
    assert "labels" not in Collator(processor).prompts([example])
    labels = Collator(processor)([example])["labels"]
    assert processor.decode(labels[0][labels[0] >= 0], skip_special_tokens=True).strip() == example["answer"]


def models_with_batches():
    for kind in MODELS:
        processor = ALL[kind]()
        yield MODELS[kind](processor), Collator(processor)([examples_for(kind)[0]])
    processor = tiny_paligemma_processor()
    yield tiny_paligemma_model(processor), Collator(processor)([examples_for("llava")[0]])


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # PaliGemma's processor
def test_no_answer_token_is_read_before_it_is_predicted():
    for model, batch in models_with_batches():
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, -2] += 1
        with torch.no_grad():
            before, after = model(**batch).logits, model(**changed).logits
        assert torch.equal(before[:, :-2], after[:, :-2]), type(model).__name__
        assert not torch.equal(before[:, -2:], after[:, -2:]), type(model).__name__


# --- folders ------------------------------------------------------------------------------------------------------

QUESTIONS = [{"question_id": 10 + i, "image_id": i % 2, "question": f"what is {i}?"} for i in range(3)]
NOTES = [
    {
        "question_id": q["question_id"],
        "image_id": q["image_id"],
        "multiple_choice_answer": "a",
        "answers": [{"answer": "a"}],
    }
    for q in QUESTIONS
]
LAYOUTS = {  # questions, annotations, captions, pictures; the folder to load is "task"
    "demo": ("val_questions", "val_annotations", "val_captions", "images/val/DEMO_val_{:012d}.png"),
    "demo, own": ("val_questions", "val_annotations", "val_captions", "images_task/val/DEMO_val_{:012d}.webp"),
    "official": (
        *("v2_OpenEnded_mscoco_val2014_questions", "v2_mscoco_val2014_annotations", "captions_val2014"),
        "task/val2014/COCO_val2014_{:012d}.jpg",
    ),
    "one folder": ("val_questions", "val_annotations", "val_captions", "task/images/{:012d}.JPEG"),
    "by split": ("val_questions", "val_annotations", "val_captions", "task/images/val/{:012d}.jpg"),
}


def make_folder(root, layout, questions=QUESTIONS, notes=NOTES, **captions):
    names = LAYOUTS[layout]
    folder = root / "task"
    folder.mkdir()
    (folder / f"{names[0]}.json").write_text(json.dumps({"questions": questions}))
    (folder / f"{names[1]}.json").write_text(json.dumps({"annotations": notes}))
    (folder / f"{names[2]}.json").write_text(json.dumps(captions))
    for number, colour in enumerate(["red", "blue"]):
        path = root / names[3].format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(colour).save(path)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vqa_folders_load_in_every_layout(layout, tmp_path, monkeypatch):
    folder = make_folder(tmp_path, layout)
    data = load_vqa(folder, "val")
    assert data.column_names == ["image", "question", "answer", "answers", "question_id", "image_id"]
    assert [row["question_id"] for row in data] == [10, 11, 12]
    assert [row["image"].convert("RGB").getpixel((0, 0))[2] > 200 for row in data] == [False, True, False]
    assert data[0]["answers"] == ["a"]
    monkeypatch.chdir(folder)
    assert load_vqa(".", "val").to_dict()["question"] == data.to_dict()["question"]
    batch = Collator(tiny_llava_processor())(list(data))
    assert batch["pixel_values"].shape[0] == 3


def test_pictures_are_not_opened_before_they_are_read(tmp_path):
    folder = make_folder(tmp_path, "one folder")
    for path in (folder / "images").iterdir():
        path.write_bytes(b"broken")
    data = load_vqa(folder, "val")
    with pytest.raises(Exception, match="cannot identify image"):
        data[0]


def test_the_image_folder_may_be_given(tmp_path):
    folder = make_folder(tmp_path, "one folder")
    (folder / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="give `images`"):
        load_vqa(folder, "val")
    assert len(load_vqa(folder, "val", images=tmp_path / "elsewhere")) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("listed", [True, False])
def test_caption_folders_load_in_every_layout(layout, listed, tmp_path):
    name = LAYOUTS[layout][3].rsplit("/", 1)[1]
    images = [{"id": i, "file_name": name.format(i)} for i in (0, 1)] if listed else []
    notes = [{"id": 5 + i, "image_id": i // 2, "caption": f"caption {i}"} for i in range(4)]
    folder = make_folder(tmp_path, layout, images=images, annotations=notes)
    data = load_captions(folder, "val")
    assert data.column_names == ["image", "question", "answer", "image_id"]
    assert data["answer"][:] == [f"caption {i}" for i in range(4)]
    assert set(data["question"]) == {"describe the image"}
    assert data[3]["image"].convert("RGB").getpixel((0, 0))[2] > 200
    assert set(load_captions(folder, "val", prompt="say")["question"]) == {"say"}


def without(rows, key, at=1):
    return [{k: v for k, v in row.items() if i != at or k != key} for i, row in enumerate(rows)]


def changed(rows, at=1, **values):
    return [row | values if i == at else row for i, row in enumerate(rows)]


BAD_FOLDERS = {
    "missing key": (
        {"questions": without(QUESTIONS, "question")},
        r"val_questions\.json, questions row 1: .*'question'",
    ),
    "missing note key": (
        {"notes": without(NOTES, "answers")},
        r"val_annotations\.json, annotations row 1: .*'answers'",
    ),
    "wrong type": ({"questions": changed(QUESTIONS, image_id="1")}, r"questions row 1: 'image_id' \(='1'\)"),
    "a true for a number": ({"questions": changed(QUESTIONS, image_id=True)}, "questions row 1: 'image_id'"),
    "not an object": ({"questions": [*QUESTIONS, 3]}, "questions row 3: got a int"),
    "question twice": ({"questions": [*QUESTIONS, QUESTIONS[0]]}, "questions row 3: the id 10 is there a second time"),
    "annotation twice": ({"notes": [*NOTES, NOTES[0]]}, "annotations row 3: the id 10 is there a second time"),
    "annotation without question": ({"questions": QUESTIONS[:2]}, "annotations row 2: annotation 12 has no question"),
    "question without annotation": ({"notes": NOTES[:2]}, "questions row 2: question 12 has no annotation"),
    "another image": ({"notes": changed(NOTES, image_id=0)}, "annotations row 1: is for image 0"),
    "missing image": (
        {"questions": changed(QUESTIONS, image_id=9), "notes": changed(NOTES, image_id=9)},
        "questions row 1: there is no image 9",
    ),
    "no rows": ({"questions": [], "notes": []}, r"val_questions\.json: holds no rows"),
    "mixed ids": (
        {"questions": changed(QUESTIONS, question_id="x"), "notes": changed(NOTES, question_id="x")},
        r"val_questions\.json, questions row 1: 'question_id' \(='x'\) is of another type",
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_fault_in_a_folder_names_file_and_row(fault, tmp_path):
    files, message = BAD_FOLDERS[fault]
    with pytest.raises(ValueError, match=message):
        load_vqa(make_folder(tmp_path, "demo", **files), "val")


def test_broken_and_missing_files_are_named(tmp_path):
    folder = make_folder(tmp_path, "demo")
    for split in ("train", "../val"):
        with pytest.raises(ValueError, match="split"):
            load_vqa(folder, split)
    with pytest.raises(ValueError, match="must be a folder that exists"):
        load_vqa(tmp_path / "nowhere", "val")
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one file of questions for the split 'val'.*val2014"):
        load_vqa(folder, "val")
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    (folder / "val_annotations.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"val_annotations\.json: is not JSON"):
        load_vqa(folder, "val")
    (folder / "val_annotations.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"val_annotations\.json: is not JSON in UTF-8"):
        load_vqa(folder, "val")


def test_a_number_that_two_pictures_have_is_refused(tmp_path):
    folder = make_folder(tmp_path, "by split")
    picture().save(folder / "images" / "val" / "other_000000000001.png")
    with pytest.raises(ValueError, match=r"other_000000000001\.png: the id 1 is there a second time"):
        load_vqa(folder, "val")


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd"])
def test_a_file_name_may_not_leave_its_folder(name, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    notes = [{"id": 1, "image_id": 0, "caption": "x"}]
    folder = make_folder(tmp_path, "one folder", images=[{"id": 0, "file_name": name}], annotations=notes)
    with pytest.raises(ValueError, match=r"captions\.json, images row 0: the file name .* leaves the folder"):
        load_captions(folder, "val")
    rows = tmp_path / "task" / "rows.jsonl"
    rows.write_text(json.dumps({"question": "x", "answer": "y", "image": name}))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: the file name .* leaves the folder"):
        load_jsonl(rows)


def test_jsonl_rows_load_with_and_without_images(tmp_path):
    picture().save(tmp_path / "a.png")
    rows = [{"question": "x", "answer": "y", "image": image, "level": 2} for image in ("a.png", None)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    data = load_jsonl(file)
    assert data.column_names == ["question", "answer", "image", "level"]
    assert [row["image"] is None for row in data] == [False, True]
    file.write_text(json.dumps({"question": "x", "answer": "y"}))
    assert load_jsonl(file).to_dict() == {"question": ["x"], "answer": ["y"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "got a list"),
        ('{"question": "x"}', "has no 'answer'"),
        ('{"question": "x", "answer": 3}', r"'answer' \(=3\) has the wrong type int"),
        ('{"question": "x", "answer": "y", "question_id": 1}', "the id 1 is there a second time"),
        ('{"question": "x", "answer": "y"}', "make them equal"),
        ('{"question": "x", "answer": "y", "image": "gone.png"}', "there is no image 'gone.png'"),
    ],
)
def test_a_fault_in_a_jsonl_line_is_named(line, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "x", "answer": "y", "question_id": 1}\n' + line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}"):
        load_jsonl(file)
