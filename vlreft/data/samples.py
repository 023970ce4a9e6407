"""`Sample`: one example of a data set as read, whatever its form: columns or chat messages, images or paths to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps


class Sample(NamedTuple):
    """An example as read, then rendered."""

    name: str  # how errors call it
    messages: list[dict[str, Any]]  # the prompt's; every content a list of parts, the images taken out
    images: list[Image.Image]
    question: str | None  # None when the example was given as messages
    answer: str | None  # once rendered: all the text that follows the prompt, end of turn included
    text: str = ""  # once rendered: the prompt, a placeholder for each image


def read_sample(example: Mapping[str, Any], place: int, *, training: bool) -> Sample:
    """Read one example, its images opened. Raises ValueError naming the sample."""
    if not isinstance(example, Mapping):
        raise ValueError(f"row {place} of the batch (a {type(example).__name__}) must be a mapping; see `Collator`.")
    ids = [example[key] for key in ("id", "question_id") if example.get(key) is not None]
    name = f"sample {ids[0]!r} (row {place} of the batch)" if ids else f"row {place} of the batch"
    if example.get("messages") is not None:
        return _read_messages(example, name, training=training)
    if example.get("question") is None or (training and example.get("answer") is None):
        raise ValueError(
            f"{name} has the keys {sorted(map(str, example))}; expected `question` and `answer` (and `image` or "
            "`images`), or `messages`. Under transformers.Trainer set remove_unused_columns=False."
        )
    question, images = _text(example["question"], name, "question"), _images_of(example, name)
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    answer = _answer(example["answer"], name) if training else None
    return Sample(name, [{"role": "user", "content": parts}], images, question, answer)


def _read_messages(example: Mapping[str, Any], name: str, *, training: bool) -> Sample:
    messages = list(example["messages"])
    last = messages[-1].get("role") if messages else None
    if last != "assistant" and (training or last != "user"):
        roles = [message.get("role") for message in messages]
        raise ValueError(
            f"{name} has messages of the roles {roles}; the last must be the assistant's, it is the answer"
            + (": add it." if training else " (or the user's, to be answered): add it.")
        )
    if len(messages) == 1 and last == "assistant":
        raise ValueError(f"{name} has no message before the assistant's; add what it answers to.")
    column, images, prompt = iter(_images_of(example, name)), [], []
    for message in messages[:-1] if last == "assistant" else messages:
        given = {key: value for key, value in message.items() if value is not None}  # datasets fills up with None
        prompt.append({**given, "content": _parts(message, name, column, images)})
    answer = None
    if training:
        parts = _parts(messages[-1], name, iter(()), [])
        if any(part["type"] == "image" for part in parts):
            raise ValueError(f"{name} has an image in its answer; an answer is text: move the image to the prompt.")
        answer = _answer("".join(part["text"] for part in parts), name)
    return Sample(name, prompt, [*images, *column], None, answer)


def _parts(
    message: Mapping[str, Any], name: str, column: Iterator[Image.Image], images: list[Image.Image]
) -> list[dict[str, str]]:
    """A content without its images, which go to `images`: an entry's own, else the column's next, if there is one."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, (list, tuple)):
        return [_part(part, name, column, images) for part in content]
    raise ValueError(f"{name} has a message whose content is {content!r}; it must be a text or a list of entries.")


def _part(part: Any, name: str, column: Iterator[Image.Image], images: list[Image.Image]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), name, "text")}
    own = [part[key] for key in ("image", "path") if part.get(key) is not None] if kind == "image" else []
    if kind != "image" or (not own and part.get("url") is not None):
        raise ValueError(
            f"{name} has a message entry {part!r}; it must be {{'type': 'text', 'text': ...}} or {{'type': 'image'}} "
            "with a PIL image or a path under 'image': download what has a url."
        )
    images.extend([open_image(own[0], name)] if own else islice(column, 1))
    return {"type": "image"}


def _text(text: Any, name: str, key: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} has a `{key}` of type {type(text).__name__}; it must be a text.")
    return text


def _answer(answer: Any, name: str) -> str:
    if not _text(answer, name, "answer").strip():
        raise ValueError(f"{name} has an empty answer, so nothing could be learnt from it; fill it in or drop the row.")
    return answer


def _images_of(example: Mapping[str, Any], name: str) -> list[Image.Image]:
    one, many = example.get("image"), example.get("images")
    if one is not None and many is not None:
        raise ValueError(f"{name} has both `image` and `images`; keep one of them.")
    if many is not None and not isinstance(many, (list, tuple)):
        raise ValueError(f"{name} has `images` of type {type(many).__name__}; it must be a list: one goes to `image`.")
    return [open_image(image, name) for image in ([one] if one is not None else many or [])]


def open_image(image: Any, name: str) -> Image.Image:
    """The image upright and in RGB; a file is read whole and closed.

    Takes a picture, a path, or what data sets that do not decode hold: `{"path": ..., "bytes": ...}`.
    """
    if isinstance(image, Mapping) and image.keys() == {"path", "bytes"}:
        content, image = image["bytes"], image["path"] or "bytes of the data set"
    else:
        content = None
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image if content is None else BytesIO(content)) as opened:
                opened.load()
                return _rgb(opened)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
            raise ValueError(f"{name} has an image that cannot be read: {str(image)!r} ({error}); fix it.") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} has an image of type {type(image).__name__}; it must be a PIL image or a path.")
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    # Pillow warns when transparent palettes go to RGB in one step.
    return (upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB")
