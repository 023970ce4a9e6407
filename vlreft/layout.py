"""`TokenLayout`: what each token of a batch is (pad, text, image, prompt, response), as one mask per segment.

Shape suffixes: B = rows of the batch, L = tokens of the layout, T = tokens of a forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT_SEGMENTS = ("prompt", "text", "image", "question", "response", "eos")
TOWER_SEGMENTS = ("prompt", "cls", "patches")
# Where the prompt ends does not matter for these: images never stand in an answer.
ENDLESS_SEGMENTS = frozenset({"image", "cls", "patches"})


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """For each position of a batch: which segments it belongs to.

    `segments` maps a segment's name to mask_BL (bool). `grows` says that tokens after position L are answer tokens
    still being generated, all of them in segment `response`; `repeats` that a forward may hold each row several times
    in a row, as beams do. `missing` says why an absent segment is absent.
    """

    segments: Mapping[str, Tensor]
    grows: bool = False
    repeats: bool = False
    missing: str = ""

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


def text_layout(
    shape: tuple[int, int],
    device: torch.device,
    *,
    input_ids_BL: Tensor | None = None,
    attention_mask_BL: Tensor | None = None,
    is_prompt_BL: Tensor | None = None,
    image_token_ids: Sequence[int] | None = None,
    grows: bool = False,
    repeats: bool = False,
) -> TokenLayout:
    """Lay out a batch of token sequences.

    `shape` is (B, L). A missing attention mask means no padding; a missing `is_prompt_BL` means that all of it is the
    prompt. `image_token_ids`: the ids that stand for image features; empty for a text-only model; None where the
    model has images but does not say which tokens they are (then only `prompt` and `response` exist).
    """
    real_BL = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask_BL is not None:
        real_BL = attention_mask_BL.to(device) != 0
    prompt_BL = real_BL if is_prompt_BL is None else real_BL & is_prompt_BL.to(device)
    segments = {"prompt": prompt_BL, "response": real_BL & ~prompt_BL}
    if image_token_ids is None or (image_token_ids and input_ids_BL is None):
        why = " (the model does not mark its image tokens in `input_ids`)"
        why = why if image_token_ids is None else " (image tokens are found by `input_ids`, which were not given)"
        return TokenLayout(segments, grows, repeats, why)
    if not image_token_ids:
        segments |= {"text": prompt_BL, "question": prompt_BL}
        return TokenLayout(segments, grows, repeats, " (the model is text-only)")
    assert input_ids_BL is not None
    is_image_BL = torch.zeros_like(real_BL)
    for token_id in image_token_ids:
        is_image_BL = is_image_BL | (input_ids_BL.to(device) == token_id)
    image_BL, text_BL = prompt_BL & is_image_BL, prompt_BL & ~is_image_BL
    images_from_here_BL = image_BL.flip(1).cumsum(1).flip(1)
    segments |= {"text": text_BL, "image": image_BL, "question": text_BL & (images_from_here_BL == 0)}
    return TokenLayout(segments, grows, repeats)


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


def tower_layout(num_tokens: int, num_cls: int, device: torch.device) -> TokenLayout:
    """Lay out one image in a vision tower: `num_cls` class tokens in front, patches behind; `prompt` is all of them.

    Shapes: masks of (1, num_tokens).
    """
    everything_1L = torch.ones(1, num_tokens, dtype=torch.bool, device=device)
    is_patch_1L = (torch.arange(num_tokens, device=device) >= num_cls)[None]
    segments = {"prompt": everything_1L, "patches": is_patch_1L}
    if num_cls:
        segments["cls"] = ~is_patch_1L
    return TokenLayout(segments, missing=" (this vision tower has no class token)")
