"""`TokenLayout`: what each token of a batch is (pad, text, image, prompt, response), as one mask per segment.

Shape suffixes: B = rows of the batch (in a vision tower: pictures), L = tokens of the layout, T = tokens of a forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT_SEGMENTS = ("prompt", "text", "image", "question", "response", "eos")
TOWER_SEGMENTS = ("prompt", "cls", "patches")  # those of states that no token ids belong to
# Where the prompt ends does not matter for these: images never stand in an answer.
ENDLESS_SEGMENTS = frozenset({"image", "cls", "patches"})


@dataclass(frozen=True, eq=False)
class Grid:
    """Where tokens lie in their picture: row_BL and col_BL (-1 for tokens of no picture), of rows_BL x cols_BL.

    width_BL and height_BL are the picture's size in pixels, as the model is given it. boxes_BL4 are the regions (left,
    top, right, bottom, in these pixels) given for this call, None if none were. All may have size 1 for B or L.
    """

    row_BL: Tensor
    col_BL: Tensor
    rows_BL: Tensor
    cols_BL: Tensor
    width_BL: Tensor
    height_BL: Tensor
    boxes_BL4: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """For each position of a batch: which segments it belongs to.

    `segments` maps a segment's name to mask_BL (bool). `grows` says that tokens after position L are answer tokens
    still being generated, all of them in segment `response`; `repeats` that a forward may hold each row several times
    in a row, as beams do. `missing` says why an absent segment is absent. `grid` places the tokens in their picture,
    None where no such thing is known; `no_grid` says why.
    """

    segments: Mapping[str, Tensor]
    grows: bool = False
    repeats: bool = False
    missing: str = ""
    grid: Grid | None = None
    no_grid: str = "text has no rows and columns"

    @property
    def num_rows(self) -> int:
        """Rows B."""
        return self.segments["prompt"].shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens L."""
        return self.segments["prompt"].shape[1]

    def mask(self, segment: str) -> Tensor:
        """Return mask_BL of a segment. Raises ValueError if this stream has no such segment."""
        if segment not in self.segments:
            have = ", ".join(f"'{name}'" for name in self.segments)
            raise ValueError(f"there is no segment '{segment}' here{self.missing}; the segments are {have}")
        return self.segments[segment]


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean to a stream of tokens.

    image_ids: those that stand for features of a picture; () where words are all there is, None where the model has
    pictures but does not say which tokens they are (then only `prompt` and `response` exist). marks: ids that hold the
    place of something else (a picture that comes in elsewhere, sound), which is neither text nor image. pools: where a
    dual encoder reads its text embedding ("first", "last", "end", "largest"; "" where nowhere), `end_id` the end token,
    `pad_id` what is padded with. num_behind: tokens without an id that the tower puts behind the text.
    """

    image_ids: tuple[int, ...] | None = ()
    marks: tuple[int, ...] = ()
    pools: str = ""
    end_id: int = -1
    pad_id: int = -1
    num_behind: int = 0

    @property
    def segments(self) -> tuple[str, ...]:
        """The position segments that such a stream has."""
        if self.image_ids is None:
            return ("prompt", "response")
        more = (("image",) if self.image_ids else ()) + (("eos",) if self.pools else ())
        return ("prompt", "text", "question", "response", *more)


WORDS = Vocabulary()


def text_layout(
    shape: tuple[int, int],
    device: torch.device,
    vocabulary: Vocabulary = WORDS,
    *,
    input_ids_BL: Tensor | None = None,
    attention_mask_BL: Tensor | None = None,
    is_prompt_BL: Tensor | None = None,
    is_image_BL: Tensor | None = None,
    grows: bool = False,
    repeats: bool = False,
) -> TokenLayout:
    """Lay out a batch of token sequences.

    `shape` is (B, L). A missing attention mask means no padding (but see `_pooled`); a missing `is_prompt_BL` means
    that all of it is the prompt; `is_image_BL` marks image tokens where the ids do not.
    """
    real_BL = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask_BL is not None:
        real_BL = attention_mask_BL.to(device) != 0
    pooled: dict[str, Tensor] = {}
    if vocabulary.pools and input_ids_BL is not None:
        pooled["eos"], behind_BL = _pooled(input_ids_BL, vocabulary)
        real_BL = real_BL if attention_mask_BL is not None else ~behind_BL
    prompt_BL = real_BL if is_prompt_BL is None else real_BL & is_prompt_BL.to(device)
    segments = {"prompt": prompt_BL, "response": real_BL & ~prompt_BL}
    needs_ids = bool(vocabulary.image_ids or vocabulary.marks or vocabulary.pools)
    if is_image_BL is None and (vocabulary.image_ids is None or (needs_ids and input_ids_BL is None)):
        why = " (the model does not mark its image tokens in `input_ids`)"
        why = why if vocabulary.image_ids is None else " (tokens are told by `input_ids`, which were not given)"
        return TokenLayout(segments, grows, repeats, why)
    segments |= pooled
    if not needs_ids and is_image_BL is None:
        segments |= {"text": prompt_BL, "question": prompt_BL}
        return TokenLayout(segments, grows, repeats, " (the model is text-only)")
    if is_image_BL is None:
        assert input_ids_BL is not None
        is_image_BL = _is_one_of(input_ids_BL.to(device), vocabulary.image_ids or ())
    is_text_BL = ~is_image_BL
    if vocabulary.marks and input_ids_BL is not None:
        is_text_BL = is_text_BL & ~_is_one_of(input_ids_BL.to(device), vocabulary.marks)
    image_BL, text_BL = prompt_BL & is_image_BL, prompt_BL & is_text_BL
    if vocabulary.image_ids:
        segments["image"] = image_BL
    images_from_here_BL = image_BL.flip(1).cumsum(1).flip(1)
    segments |= {"text": text_BL, "question": text_BL & (images_from_here_BL == 0)}
    return TokenLayout(segments, grows, repeats)


def _is_one_of(ids_BL: Tensor, token_ids: Sequence[int]) -> Tensor:
    is_one_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    for token_id in token_ids:
        is_one_BL = is_one_BL | (ids_BL == token_id)
    return is_one_BL


def _pooled(ids_BL: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return the mask of the pooled token, and of what counts as padding where no attention mask says it.

    Behind the token that a causal tower pools nothing is ever read; a tower that pools a fixed place is padded at the
    end with its pad id.
    """
    place_1L = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
    if vocabulary.pools in ("end", "largest"):
        found_BL = ids_BL == vocabulary.end_id if vocabulary.pools == "end" else ids_BL
        at_B1 = found_BL.to(torch.int64).argmax(1, keepdim=True)
        return place_1L == at_B1, place_1L > at_B1
    at = 0 if vocabulary.pools == "first" else ids_BL.shape[1] - 1
    words_from_here_BL = (ids_BL != vocabulary.pad_id).flip(1).cumsum(1).flip(1)
    return (place_1L == at).expand(ids_BL.shape), words_from_here_BL == 0


def prompt_from_labels(labels_BL: Tensor) -> Tensor:
    """Return is_prompt_BL: every position before the row's first labelled one (label other than -100)."""
    return (labels_BL != -100).cumsum(1) == 0


def refuse_bad_labels(labels_BL: Tensor) -> None:
    """Raise ValueError naming the first row with no labelled token, or with more than one run of them."""
    labelled_BL = labels_BL != -100
    starts_B = (labelled_BL[:, 1:] & ~labelled_BL[:, :-1]).sum(1) + labelled_BL[:, 0]
    wrong_B = starts_B != 1
    if not bool(wrong_B.any()):
        return
    row = int(wrong_B.nonzero()[0])
    if int(starts_B[row]) == 0:
        raise ValueError(f"row {row} of the batch has no labelled token: every label is -100, nothing can be learnt")
    raise ValueError(
        f"row {row} of the batch has {int(starts_B[row])} separate answers: the positions edited for a prompt would "
        "not be those edited when it is generated from; give each answer a row of its own, or pass a `prompt_mask`"
    )


def decoder_layout(
    labels_BL: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    *,
    in_place: bool = False,
    attention_mask_BL: Tensor | None = None,
) -> TokenLayout:
    """Lay out the decoder's tokens of an encoder-decoder in training: position 0 starts, position t holds label t - 1.

    With `in_place` position t holds label t. `shape` is (B, L). The prompt is what stands before the first labelled
    token is read; without labels, everything.
    """
    if labels_BL is None:
        return text_layout(shape, device, attention_mask_BL=attention_mask_BL)
    labelled_BL = labels_BL != -100
    read_BL = labelled_BL if in_place else F.pad(labelled_BL[:, :-1], (1, 0))
    is_prompt_BL = read_BL.cumsum(1) == 0
    if attention_mask_BL is None:
        attention_mask_BL = labelled_BL.flip(1).cumsum(1).flip(1) > 0  # no label is still to come behind the answer
    return text_layout(shape, device, attention_mask_BL=attention_mask_BL, is_prompt_BL=is_prompt_BL)


def tower_layout(
    shape: tuple[int, int],
    device: torch.device,
    num_cls: int,
    num_registers: int = 0,
    *,
    cls_last: bool = False,
    grid: Grid | None = None,
    real_BL: Tensor | None = None,
) -> TokenLayout:
    """Lay out the pictures in a vision tower: class tokens, registers, patches; `prompt` is all of them.

    `shape` is (B, L), a row a picture. `cls_last` turns the order round; `real_BL` says which tokens are no padding.
    """
    everything_BL = torch.ones(shape, dtype=torch.bool, device=device) if real_BL is None else real_BL
    place_1L = torch.arange(shape[1], device=device)[None]
    place_1L = place_1L.flip(1) if cls_last else place_1L
    segments = {"prompt": everything_BL, "patches": everything_BL & (place_1L >= num_cls + num_registers)}
    if num_cls:
        segments["cls"] = everything_BL & (place_1L < num_cls)
    why = "how many rows and columns of patches a picture has was not to be read from the tower's arguments"
    return TokenLayout(segments, missing=" (this vision tower has no class token)", grid=grid, no_grid=why)
