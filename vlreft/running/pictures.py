"""Where the image tokens of a text stream lie in their pictures, for families whose connector keeps the patches' order.

Shape suffixes: B = rows, L = tokens.

Two kinds are known: one image token per patch of pictures of one size (LLaVA, PaliGemma), and one per merge window
where the call says each picture's size in patches (Qwen-VL). For all others no region of image tokens can be taken.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlreft.layout import Grid, TokenLayout
from vlreft.models.sites import Sites


def image_grid(sites: Sites, call: Mapping[str, Any], boxes_B4: Tensor | None, layout: TokenLayout) -> Grid:
    """Return the grid of a layout's image tokens. Raises ValueError where the pictures' sizes say another number.

    `call` are the model's arguments. This looks at the tokens, which on an accelerator means waiting for it.
    """
    image_BL = layout.mask("image")
    starts_BL = image_BL.clone()
    starts_BL[:, 1:] &= ~image_BL[:, :-1]
    run_BL = (starts_BL.flatten().cumsum(0) - 1).reshape(image_BL.shape)
    lengths = torch.bincount(run_BL[image_BL], minlength=int(starts_BL.sum())).tolist()
    sizes = _sizes(sites, call, lengths)
    places, rows, cols, widths, heights, which = [], [], [], [], [], []
    for number, (num_rows, num_cols, patch_height, patch_width) in enumerate(sizes):
        place_N = torch.arange(num_rows * num_cols)
        places.append(place_N)
        for values, value in (
            *((rows, num_rows), (cols, num_cols), (which, number)),
            *((widths, num_cols * patch_width), (heights, num_rows * patch_height)),
        ):
            values.append(torch.full_like(place_N, value))

    def spread(values: list[Tensor], fill: int) -> Tensor:
        out_BL = torch.full(image_BL.shape, fill, device=image_BL.device)
        flat = torch.cat(values) if values else torch.zeros(0, dtype=torch.long)
        out_BL[image_BL] = flat.to(image_BL.device)
        return out_BL

    place_BL, cols_BL = spread(places, -1), spread(cols, 1)
    is_image_BL = place_BL >= 0
    row_BL = torch.where(is_image_BL, place_BL // cols_BL, -1)
    col_BL = torch.where(is_image_BL, place_BL % cols_BL, -1)
    boxes_BL4 = None
    if boxes_B4 is not None:
        given_B4 = boxes_B4.to(image_BL.device).expand(max(1, len(sizes)) if len(boxes_B4) == 1 else -1, -1)
        if sizes and len(given_B4) != len(sizes):
            raise ValueError(
                f"{len(boxes_B4)} boxes were given for {len(sizes)} pictures; give one for each, or one for all"
            )
        boxes_BL4 = given_B4[spread(which, 0)]
    return Grid(row_BL, col_BL, spread(rows, 1), cols_BL, spread(widths, 1), spread(heights, 1), boxes_BL4)


def _sizes(sites: Sites, call: Mapping[str, Any], lengths: list[int]) -> list[tuple[int, int, int, int]]:
    """Return rows, columns and a token's pixels (height, width) of each picture; `lengths` of runs of image tokens."""
    tower = sites.by_name["vision"].tower
    assert tower is not None
    assert tower.patch_size is not None
    height, width = tower.patch_size
    grids = call.get("image_grid_thw")
    if isinstance(grids, Tensor) and tower.patch_order:
        merge = tower.merge
        frames = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
        if [t * h * w for t, h, w in frames] != lengths or any(t != 1 for t, _, _ in frames):
            raise ValueError(
                f"runs of {lengths} image tokens do not match pictures of {frames} frames, rows and columns"
            )
        return [(h, w, height * merge, width * merge) for _, h, w in frames]
    assert tower.grid is not None
    num_patches = math.prod(tower.grid)
    if any(length % num_patches for length in lengths):
        rows, cols = tower.grid
        raise ValueError(f"runs of {lengths} image tokens are not made of pictures of {rows} x {cols} patches")
    return [(*tower.grid, height, width)] * (sum(lengths) // num_patches)
