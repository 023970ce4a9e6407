"""A batch as people see it: its tokens as text, its pictures as pixels, read back from what the model is given.

Shape suffixes: B = pictures, H, W = pixels of a picture, L = tokens of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlreft.models.sites import MERGING, Sites, Tower


def token_texts(processor: object, ids_L: Sequence[int]) -> tuple[str, ...]:
    """Return each token's text, blanks in front included. Raises TypeError for what is no processor or tokenizer."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    inner = getattr(processor, "tokenizer", processor)  # a processor's, or that in open_clip's wrapper
    if isinstance(inner, PreTrainedTokenizerBase):
        return tuple(_text_of(inner, token_id) for token_id in ids_L)
    decode = getattr(inner, "decode", None)  # open_clip's own tokenizers
    if decode is None or isinstance(inner, ProcessorMixin):
        raise TypeError(
            f"`processor` (a {type(processor).__name__}) must be a processor with a tokenizer, or a tokenizer, to show "
            "the text; load it with AutoProcessor or AutoTokenizer"
        )
    return tuple(decode([token_id]) for token_id in ids_L)


def _text_of(tokenizer: Any, token_id: int) -> str:
    if not 0 <= token_id < len(tokenizer):
        return f"#{token_id}"  # a model may have more ids than its tokenizer
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return f"#{token_id}"
    text = tokenizer.decode([token_id])
    # Decoding one token alone drops the blank in front of a word, which these marks stand for.
    return f" {text}" if token[:1] in ("\u2581", "\u0120") and not text.startswith(" ") else text


def pictures_in(inputs: Mapping[str, Any], processor: object, sites: Sites) -> list[np.ndarray | None]:
    """Return the pictures of a batch as the tower sees them, (H, W, 3) uint8, in its order.

    None for those that cannot be read back: of a family with a format of its own, or with a processor that does not
    say how it normalises.
    """
    pixels = inputs.get("pixel_values", inputs.get("image"))
    vision = sites.by_name.get("vision")
    tower = None if vision is None else vision.tower
    if not isinstance(pixels, Tensor) or tower is None:
        return []
    scale = _normalisation(processor, sites.model)
    sizes = inputs.get("image_grid_thw")
    are_patches = pixels.dim() == 2 or tuple(pixels.shape[-2:]) == tower.patch_size
    if isinstance(sizes, Tensor) and are_patches:
        found: Sequence[Tensor | None] = _unpacked(pixels.flatten(1), sizes.tolist(), tower)
    elif are_patches:
        return []  # how many make a picture is not said by a name known here
    elif pixels.dim() in (4, 5) and pixels.shape[-3] == 3:
        found = list(pixels.flatten(0, -4))
    else:
        found = [None] * len(pixels)
    return [None if picture is None or scale is None else _as_bytes(picture, *scale) for picture in found]


def _unpacked(pixels: Tensor, sizes: Sequence[Sequence[int]], tower: Tower) -> list[Tensor | None]:
    """Put the patches of packed pictures, by merge window as Qwen-VL's are or line by line, back into (3, H, W)."""
    pictures: list[Tensor | None] = []
    start = 0
    for frames, rows, cols in sizes:
        patches = pixels[start : start + frames * rows * cols]
        start += len(patches)
        assert tower.patch_size is not None
        height, width = tower.patch_size
        num_deep, rest = divmod(pixels.shape[1], 3 * height * width)  # frames in a patch, mostly two of one picture
        if rest or not tower.patch_order or len(patches) != frames * rows * cols:
            pictures.append(None)
            continue
        m = tower.merge if tower.patch_order in MERGING else 1
        blocks = patches.reshape(frames, rows // m, cols // m, m, m, 3, num_deep, height, width)[0, ..., 0, :, :]
        pictures.append(blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * height, cols * width))
    return pictures


def _normalisation(processor: object, model: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Return mean and standard deviation by channel, and what makes the result 0 to 1; None if nothing says them."""
    images = getattr(processor, "image_processor", processor)
    mean, deviation = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    is_normalised, is_rescaled = getattr(images, "do_normalize", True), getattr(images, "do_rescale", True)
    if mean is None or deviation is None:  # open_clip says it at the tower
        visual = getattr(model, "visual", None)
        mean, deviation = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
    if mean is None or deviation is None:
        return None
    mean, deviation = ((0.0,) * 3, (1.0,) * 3) if not is_normalised else (mean, deviation)
    return torch.as_tensor(mean), torch.as_tensor(deviation), 1.0 if is_rescaled else 1 / 255


def _as_bytes(picture_3HW: Tensor, mean: Tensor, deviation: Tensor, factor: float) -> np.ndarray:
    values_HW3 = picture_3HW.detach().float().cpu().permute(1, 2, 0) * deviation.float() + mean.float()
    return (255 * factor * values_HW3).round().clamp(0, 255).to(torch.uint8).numpy()


def given_pictures(image: Image.Image | Sequence[Image.Image], num_pictures: int) -> list[np.ndarray]:
    """Return the caller's pictures as pixels. Raises ValueError or TypeError unless there is one for each."""
    images = [image] if isinstance(image, Image.Image) else list(image)
    if wrong := [type(one).__name__ for one in images if not isinstance(one, Image.Image)]:
        raise TypeError(f"`image` must be a PIL image, or one for each picture of the row, got {wrong[0]}")
    if len(images) != num_pictures:
        raise ValueError(f"{len(images)} images were given and the row has {num_pictures} pictures; give one for each")
    return [np.asarray(one.convert("RGB")) for one in images]
