"""`TowerCall`: what one run of a vision tower was given, and where the tokens of its pictures are in its states.

Shape suffixes: B = pictures (or tiles, as the tower sees them), L = most tokens of a picture, T = tokens of a packed
row, D = width, H and W = rows and columns of a spatial state.

Towers hand on (B, L, D), (B, H, W, D), or all pictures packed in one row, (T, D) or (1, T, D). All become one layout of
a row per picture, on which positions mean the same; `Selection.index` leads back to the states.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlreft.layout import Grid, TokenLayout, tower_layout
from vlreft.models.sites import Site, Tower
from vlreft.placed import Placed
from vlreft.positions import Selection, select
from vlreft.selects import All


@dataclass(frozen=True, eq=False)
class _Pictures:
    """The layout of a row per picture; at_T leads from a packed state's tokens to it, None where states are rows."""

    layout: TokenLayout
    at_T: Tensor | None = None


@dataclass(eq=False)
class TowerCall:
    """The arguments of one call of a tower by name, the boxes given for it, and what was found out from them."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    boxes_B4: Tensor | None = None
    pictures: dict[tuple[int, ...], _Pictures] = field(default_factory=dict)
    selections: dict[tuple[object, ...], Selection] = field(default_factory=dict)

    @property
    def _pixels(self) -> Tensor | None:
        """The pictures, by the names that transformers and open_clip give them."""
        pixels = self.arguments.get("pixel_values", self.arguments.get("x"))
        return pixels if isinstance(pixels, Tensor) else None

    def select(self, site: Site, placed: Placed, shape: tuple[int, ...], device: torch.device) -> Selection:
        """Return the selected ones of states of a shape without its last dimension."""
        key = (placed.positions.text, placed.part, shape)
        if key not in self.selections:
            self.selections[key] = self._select(site, placed, shape, device)
        return self.selections[key]

    def _select(self, site: Site, placed: Placed, shape: tuple[int, ...], device: torch.device) -> Selection:
        assert site.tower is not None
        selects = placed.positions.selects
        is_packed = len(shape) == 1 or (len(shape) == 2 and shape[0] == 1 and bool(self._sizes(site.tower)))
        if (
            is_packed
            and placed.positions.text in ("all", "prompt", "patches")
            and all(isinstance(s, All) for s in selects)
        ):
            return select(torch.ones(1, shape[-1], dtype=torch.bool, device=device), None)
        if shape not in self.pictures:
            self.pictures[shape] = self._lay_out(site.tower, shape, device, is_packed=is_packed)
        pictures = self.pictures[shape]
        num_boxes = 1 if self.boxes_B4 is None else len(self.boxes_B4)
        if num_boxes not in (1, pictures.layout.num_rows):
            raise ValueError(
                f"{num_boxes} boxes were given for {pictures.layout.num_rows} pictures; give one, or one for each"
            )
        mask_BL = placed.join(placed.positions.masks(pictures.layout))
        if pictures.at_T is not None:
            return select(mask_BL.flatten()[pictures.at_T][None], None)
        return select(mask_BL, placed.num_slots)

    def _lay_out(self, tower: Tower, shape: tuple[int, ...], device: torch.device, *, is_packed: bool) -> _Pictures:
        if is_packed:
            return self._packed(tower, shape[-1], device)
        if len(shape) == 3:
            num_rows, num_cols = shape[1:]
            place_L = torch.arange(num_rows * num_cols, device=device)
            grid = self._grid(tower, place_L[None] // num_cols, place_L[None] % num_cols, num_rows, num_cols)
            return _Pictures(self._layout(tower, (shape[0], len(place_L)), device, grid))
        return self._rows(tower, (shape[0], shape[1]), device)

    def _layout(
        self,
        tower: Tower,
        shape: tuple[int, int],
        device: torch.device,
        grid: Grid | None,
        real_BL: Tensor | None = None,
    ) -> TokenLayout:
        others = tower.num_cls, tower.num_registers
        return tower_layout(shape, device, *others, cls_last=tower.cls_last, grid=grid, real_BL=real_BL)

    # A row a picture -------------------------------------------------------------------------------------------

    def _rows(self, tower: Tower, shape: tuple[int, int], device: torch.device) -> _Pictures:
        real_BL = self._real(tower, shape, device)
        num_others = tower.num_cls + tower.num_registers
        grid, size = self._given_places(tower, shape, device), self._size_in_patches(tower)
        if why := self._not_the_patches(shape, num_others, size if grid is None else None):
            everything_BL = torch.ones(shape, dtype=torch.bool, device=device) if real_BL is None else real_BL
            return _Pictures(TokenLayout({"prompt": everything_BL}, missing=f" ({why})"))
        if grid is None and size is not None:
            place_L = torch.arange(shape[1], device=device) - (0 if tower.cls_last else num_others)
            is_patch_L = (place_L >= 0) & (place_L < size[0] * size[1])
            row_1L = torch.where(is_patch_L, place_L // size[1], -1)[None]
            col_1L = torch.where(is_patch_L, place_L % size[1], -1)[None]
            grid = self._grid(tower, row_1L, col_1L, *size)
        return _Pictures(self._layout(tower, shape, device, grid, real_BL))

    def _not_the_patches(self, shape: tuple[int, int], num_others: int, size: tuple[int, int] | None) -> str:
        """Return why states of this shape cannot be a row of patches for each picture, "" if they can."""
        pixels = self._pixels
        if pixels is not None and pixels.dim() == 4 and pixels.shape[0] != shape[0]:
            return f"its states have {shape[0]} rows for {pixels.shape[0]} pictures"
        if size is not None and shape[1] != size[0] * size[1] + num_others:
            return f"it runs {shape[1]} tokens, which are not {size[0]} x {size[1]} patches and {num_others} others"
        return ""

    def _real(self, tower: Tower, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return which tokens are no padding, from the masks and places that towers of padded pictures are given."""
        for name in ("patch_attention_mask", "pixel_attention_mask", "attention_mask"):
            mask = self.arguments.get(name)
            if isinstance(mask, Tensor) and mask.numel() == shape[0] * shape[1]:
                return mask.reshape(shape).to(device) > 0
        places = self.arguments.get("pixel_position_ids")
        return (places >= 0).all(-1).to(device) if isinstance(places, Tensor) else None

    def _given_places(self, tower: Tower, shape: tuple[int, int], device: torch.device) -> Grid | None:
        """Return the grid of towers that are told where each patch lies, None for others."""
        arguments = self.arguments
        if isinstance(patches := arguments.get("flattened_patches"), Tensor):  # Pix2Struct: row and column, from 1
            row_BL, col_BL = patches[..., 0].to(device).long() - 1, patches[..., 1].to(device).long() - 1
        elif isinstance(places := arguments.get("pixel_position_ids"), Tensor):
            col_BL, row_BL = places.to(device).unbind(-1)
        elif isinstance(sizes := arguments.get("spatial_shapes"), Tensor):
            cols_B1 = sizes[:, 1:].to(device)
            place_1L = torch.arange(shape[1], device=device)[None]
            is_patch_BL = place_1L < sizes[:, :1].to(device) * cols_B1
            row_BL = torch.where(is_patch_BL, place_1L // cols_B1, -1)
            col_BL = torch.where(is_patch_BL, place_1L % cols_B1, -1)
        else:
            return None
        if row_BL.shape != shape:
            return None
        rows_B1, cols_B1 = row_BL.amax(1, keepdim=True) + 1, col_BL.amax(1, keepdim=True) + 1
        return self._grid(tower, row_BL, col_BL, rows_B1, cols_B1)

    def _size_in_patches(self, tower: Tower) -> tuple[int, int] | None:
        pixels = self._pixels
        if tower.patch_size is None or pixels is None or pixels.dim() < 4:
            return None
        return pixels.shape[-2] // tower.patch_size[0], pixels.shape[-1] // tower.patch_size[1]

    def _grid(self, tower: Tower, row_BL: Tensor, col_BL: Tensor, rows: int | Tensor, cols: int | Tensor) -> Grid:
        device = row_BL.device
        # `torch.full` fills on the device; `torch.tensor` copies there, and waits for it.
        rows_B1, cols_B1 = (n if isinstance(n, Tensor) else torch.full((1, 1), n, device=device) for n in (rows, cols))
        pixels = self._pixels
        size = tower.patch_size or (1, 1)
        width_B1, height_B1 = cols_B1 * size[1], rows_B1 * size[0]
        if pixels is not None and pixels.dim() == 4 and pixels.shape[1] == 3 and isinstance(cols, int):
            width_B1, height_B1 = (torch.full((1, 1), pixels.shape[side], device=device) for side in (-1, -2))
        boxes_B14 = None if self.boxes_B4 is None else self.boxes_B4.to(device)[:, None]
        return Grid(row_BL, col_BL, rows_B1, cols_B1, width_B1, height_B1, boxes_B14)

    # All pictures in one row -----------------------------------------------------------------------------------

    def _sizes(self, tower: Tower) -> list[tuple[int, int, int]]:
        """Return (frames, rows, columns) in patches of each picture of a packed row; [] if nothing says them."""
        for name in ("grid_thw", "image_grid_thw"):
            if isinstance(sizes := self.arguments.get(name), Tensor):
                return [(int(t), int(h), int(w)) for t, h, w in sizes.tolist()]
        sizes = self.arguments.get("target_sizes")
        if isinstance(sizes, Tensor):
            return [(1, int(h), int(w)) for h, w in sizes.tolist()]
        sizes = self.arguments.get("image_sizes")
        if sizes is not None and tower.patch_size is not None:
            pairs = sizes.tolist() if isinstance(sizes, Tensor) else sizes
            return [(1, int(h) // tower.patch_size[0], int(w) // tower.patch_size[1]) for h, w in pairs]
        return []

    def _packed(self, tower: Tower, num_tokens: int, device: torch.device) -> _Pictures:
        sizes = self._sizes(tower)
        if sum(t * h * w for t, h, w in sizes) != num_tokens:
            raise ValueError(
                "this vision tower packs all pictures into one row, and how many of its tokens belong to each was not "
                "to be read from its arguments; use positions 'patches', which are all of them"
            )
        order = tower.patch_order if "image_sizes" not in self.arguments else "raster"
        order = "raster" if "target_sizes" in self.arguments else order
        longest = max(t * h * w for t, h, w in sizes)
        at, rows, cols = [], [], []
        for picture, (t, h, w) in enumerate(sizes):
            place_N = self._raster_places(tower, order, (t, h, w))
            at.append(picture * longest + place_N)
            place_L = torch.arange(longest)
            is_patch_L = place_L < t * h * w
            rows.append(torch.where(is_patch_L, place_L % (h * w) // w, -1))
            cols.append(torch.where(is_patch_L, place_L % w, -1))
        row_BL, col_BL = torch.stack(rows).to(device), torch.stack(cols).to(device)
        rows_B1, cols_B1 = row_BL.amax(1, keepdim=True) + 1, col_BL.amax(1, keepdim=True) + 1
        grid = self._grid(tower, row_BL, col_BL, rows_B1, cols_B1) if order else None
        layout = self._layout(tower, (len(sizes), longest), device, grid, row_BL >= 0)
        return _Pictures(layout, torch.cat(at).to(device))

    def _raster_places(self, tower: Tower, order: str, size: tuple[int, int, int]) -> Tensor:
        """Return, for each patch of a picture as the tower orders them, its place in raster order (of all frames)."""
        t, h, w = size
        raster_N = torch.arange(t * h * w)
        if order in ("", "raster"):
            return raster_N
        config: Any = tower.module.config  # only transformers' towers pack
        merges = self.arguments.get("merge_sizes")
        merge = int(merges[0]) if isinstance(merges, Tensor) else getattr(config, "spatial_merge_size", 2)
        grouped = raster_N.reshape(t, h // merge, merge, w // merge, merge).transpose(2, 3).reshape(-1, merge * merge)
        if order == "windows":
            from transformers.vision_utils import get_vision_window_index

            index, _ = get_vision_window_index(torch.tensor([size]), merge, config.window_size, config.patch_size)
            grouped = grouped[index]
        return grouped.flatten()
