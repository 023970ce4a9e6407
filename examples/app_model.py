"""What stands behind the page: one frozen model, several adapters, and one thread that runs them.

Which adapters act, how strongly and in which box are switches on the model itself, the same for all who use it. So one
thread alone ever touches the model; it sets the switches for one answer, gives the answer, and sets them back. Two
visitors wait for each other rather than see each other's adapters.

Shape suffixes: L = tokens of the prompt, R, C = rows and columns of patches.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import vlreft
from vlreft.drawing.maps import edit_norms
from vlreft.drawing.shown import pictures_in

Box = tuple[int, int, int, int]
MAX_QUESTION = 500  # characters
MAX_STRENGTH = 3.0
PICTURE = "[picture]"  # what stands for all tokens of one


@dataclass(frozen=True)
class Seen:
    """A picture as the model is given it: its pixels, in `rows` x `cols` patches.

    `why_not` is why no box can be drawn on it, "" where one can; rows and cols are then known.
    """

    picture: Image.Image
    rows: int = 0
    cols: int = 0
    why_not: str = ""


@dataclass
class Edits:
    """Where an answer was edited: the size of the edit, as a share of the hidden state's, at patches and words.

    Sizes are the largest over layers and adapters; 0 is no edit. `patches` goes row by row, [] where it is unknown
    which patch is where. `words` are the prompt's tokens, all of a picture's folded into one.
    """

    patches: list[float] = field(default_factory=list)
    words: list[tuple[str, float]] = field(default_factory=list)


def read_box(box: Any, seen: Seen) -> Box | None:
    """Return the box that a browser sent, None for none. Raises ValueError unless it lies in the picture."""
    if not box:
        return None
    width, height = seen.picture.size
    if seen.why_not:
        raise ValueError(seen.why_not)
    if not isinstance(box, list) or len(box) != 4 or any(type(side) is not int for side in box):
        raise ValueError("The box must be four whole numbers: left, top, right, bottom.")
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"The box {box} does not lie in the picture, which is {width} x {height} pixels.")
    return left, top, right, bottom


def check_question(question: Any) -> None:
    """Raise ValueError for a question that is empty or too long."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError("Ask something first.")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"The question has {len(question)} characters; at most {MAX_QUESTION} are taken.")


def check_strengths(strengths: Mapping[str, float]) -> None:
    """Raise ValueError for a strength that no slider has."""
    for name, strength in strengths.items():
        if not (math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH):
            raise ValueError(f"The strength of {name} (={strength:g}) must be from 0 to {MAX_STRENGTH:g}.")


class _Stop(StoppingCriteria):
    """Ends a `generate` that nobody listens to any more."""

    def __init__(self, is_over: threading.Event) -> None:
        self.is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Say for each row whether it ends here."""
        return torch.full((input_ids.shape[0],), self.is_over.is_set(), device=input_ids.device)


class Playground:
    """A model, its processor and its adapters by name; everything that it does, it does in one thread."""

    def __init__(self, model: Any, processor: Any, adapters: Mapping[str, Path], max_new_tokens: int = 64) -> None:
        """Load the adapters. Raises ValueError if there are none, or one does not fit the model."""
        if not adapters:
            raise ValueError("there is no adapter to play with; give one as `--adapter NAME=FOLDER`")
        self.model = model
        self.collator = vlreft.Collator(processor)
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.refts = {name: vlreft.load(model, folder, name=name) for name, folder in adapters.items()}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they act."""
        return list(self.refts)

    def needs_box(self, name: str) -> bool:
        """Whether an adapter edits inside the box of the call, so that it cannot act without one."""
        positions = (item.positions for item in self.refts[name].config.interventions)
        return any(part.split(":")[-1] == "box" for text in positions for part in text.split("+"))

    def describe(self, name: str) -> str:
        """Say in a few words what an adapter edits."""
        reft = self.refts[name]
        places = dict.fromkeys(f"{item.method} at {item.site}, {item.positions}" for item in reft.config.interventions)
        return f"{'; '.join(places)} · {reft.num_parameters():,} numbers"

    def see(self, picture: Image.Image) -> Seen:
        """Return a picture as the model gets it."""
        return self._worker.submit(self._see, picture).result()

    def answer(
        self,
        picture: Image.Image,
        question: str,
        strengths: Mapping[str, float],
        box: Box | None = None,
        edits: Edits | None = None,
    ) -> Iterator[str]:
        """Yield an answer as it grows, given with the adapters named in `strengths` and no others; {} is the base.

        `box` is in pixels of `see(picture)`. `edits` is filled in at the end. Closing the iterator ends the answer.
        Raises ValueError, as the model and its adapters do.
        """
        streamer = TextIteratorStreamer(self.collator.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_over = threading.Event()

        def work() -> None:
            try:
                if not is_over.is_set():
                    self._generate(picture, question, strengths, box, edits, streamer, _Stop(is_over))
            finally:
                streamer.end()  # also after an error: the reader would wait for ever

        done = self._worker.submit(work)
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text.strip()
            done.result()
        finally:
            is_over.set()

    # In the model's thread ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _generate(
        self,
        picture: Image.Image,
        question: str,
        strengths: Mapping[str, float],
        box: Box | None,
        edits: Edits | None,
        streamer: TextIteratorStreamer,
        stop: _Stop,
    ) -> None:
        row = {"image": picture, "question": question}
        batch = {key: value.to(self.model.device) for key, value in self.collator.prompts([row]).items()}
        with ExitStack() as scopes:
            for name, reft in self.refts.items():
                scopes.enter_context(reft.scaled(strengths[name]) if name in strengths else reft.disabled())
            if box is not None:
                scopes.enter_context(next(iter(self.refts.values())).boxes([box]))
            self.model.generate(
                **batch,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
            if edits is not None:
                self._fill(edits, batch, picture, [self.refts[name] for name in strengths])

    def _see(self, picture: Image.Image) -> Seen:
        return self._seen(self.collator.prompts([{"image": picture, "question": "?"}]), picture)

    def _seen(self, batch: Mapping[str, Tensor], picture: Image.Image) -> Seen:
        sites = next(iter(self.refts.values())).runtime.sites
        tower = sites.by_name["vision"].tower if "vision" in sites.by_name else None
        seen = pictures_in(batch, self.processor, sites)
        if len(seen) > 1:
            return Seen(picture, why_not="This model cuts a picture into tiles: no box can be drawn.")
        if not seen or seen[0] is None or tower is None or tower.patch_size is None or tower.no_grid:
            return Seen(picture, why_not="Where this model's patches lie is not known: no box can be drawn.")
        height, width = tower.patch_size
        return Seen(Image.fromarray(seen[0]), seen[0].shape[0] // height, seen[0].shape[1] // width)

    def _fill(
        self, edits: Edits, batch: Mapping[str, Tensor], picture: Image.Image, refts: Sequence[vlreft.Reft]
    ) -> None:
        """Find the largest edit at each patch and at each token of the prompt."""
        found = [edit_norms(reft, batch, self.processor) for reft in refts]
        seen = self._seen(batch, picture)
        of_patch_RC = torch.zeros(seen.rows, seen.cols)
        for made in [one for norms in found for one in norms.maps]:
            if made.patches:
                of_patch_RC = of_patch_RC.maximum(_enlarged(made.patches[0], (seen.rows, seen.cols)))
        edits.patches = of_patch_RC.flatten().tolist()
        if not found:
            return
        text = found[0].texts["text"]
        of_token_L = torch.zeros(len(text.tokens))
        for made in [one for norms in found for one in norms.maps]:
            if made.stream == "text" and made.text_L is not None:
                of_token_L = of_token_L.maximum(made.text_L.nan_to_num())
        edits.words = _folded(text.tokens, of_token_L.tolist(), text.is_image_L.tolist())


def _enlarged(shares_RC: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a share for each patch; where several patches became one token, all have its share. No edit is 0."""
    rows, cols = size[0] // max(1, shares_RC.shape[0]), size[1] // max(1, shares_RC.shape[1])
    grown_RC = shares_RC.nan_to_num().repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return grown_RC if grown_RC.shape == size else torch.zeros(size)


def _folded(words: Sequence[str], shares: Sequence[float], are_image: Sequence[bool]) -> list[tuple[str, float]]:
    """Return words and shares, with all of a picture's tokens as one."""
    folded: list[tuple[str, float]] = []
    for word, share, is_image in zip(words, shares, are_image, strict=True):
        if is_image and folded and folded[-1][0] == PICTURE:
            folded[-1] = (PICTURE, max(share, folded[-1][1]))
        else:
            folded.append((PICTURE if is_image else word.strip() or "␣", share))
    return folded
