"""`Trace`: what one run of a model says of its edits and their tokens, and where these lie in text and pictures.

Shape suffixes: B = rows (of a tower: pictures), L = tokens of a layout, T = tokens of a forward, R, C = rows and
columns of patches of a picture, N = tokens of a picture that are no patches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlreft.acting import Edited, evaluating
from vlreft.layout import Grid, TokenLayout, text_layout
from vlreft.models.sites import Site
from vlreft.positions import parse_positions
from vlreft.reft import Reft
from vlreft.running.hooks import Runtime
from vlreft.running.pictures import image_grid
from vlreft.running.towers import TowerCall

# Of a batch, by text stream: the layout, and ids_BL where they are known.
Layouts = Mapping[str, tuple[TokenLayout, Tensor | None]]


class Place(NamedTuple):
    """One intervention of one layer; `number` tells those apart that have all else in common."""

    site: str
    component: str
    positions: str
    number: int
    layer: int


@dataclass(frozen=True, eq=False)
class Trace:
    """A run: at each place the edits' lengths by the states' (float32, NaN where nothing is edited), one for each call.

    A tower may be called several times in a run, `calls` says with what; all else is called once.
    """

    runtime: Runtime
    values: Mapping[Place, list[Tensor]]
    calls: Sequence[TowerCall]

    def site(self, place: Place) -> Site:
        """Return the site of a place."""
        return self.runtime.hooked[place.site, place.layer, place.component].site


class Patches(NamedTuple):
    """Values in pictures, one of each for each picture. patches_RC is () where `no_grid` says why; see `EditMap`."""

    patches: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    no_grid: str


@dataclass(frozen=True, eq=False)
class Reading:
    """A row of a text stream: which of the layout's tokens are its own, and where its image tokens lie.

    picture_L numbers the pictures of the row; sizes are their rows and columns. Where that is not known `no_grid` says
    why. num_pictures: of each row of the batch, None where not known.
    """

    real_L: Tensor
    is_image_L: Tensor
    picture_L: Tensor
    row_L: Tensor
    col_L: Tensor
    sizes: tuple[tuple[int, int], ...]
    no_grid: str
    num_pictures: tuple[int, ...] | None


def trace(reft: Reft, inputs: Mapping[str, Any]) -> Trace:
    """Run the model once, in evaluation mode, without a graph, and take down what an adapter's edits do."""
    runtime, calls = reft.runtime, []
    vision = runtime.sites.by_name.get("vision")

    def take(_module: nn.Module, _args: object, _output: object) -> None:
        calls.append(runtime.tower_call)

    # In front of the library's own hook, which forgets the call.
    handle = (
        None
        if vision is None or vision.tower is None
        else vision.tower.module.register_forward_hook(take, prepend=True)
    )
    try:
        with evaluating(runtime.model), torch.no_grad(), reft.recording() as edits:
            runtime.model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    by_module: dict[tuple[str, str, str, int], list[Edited]] = {}
    for edit in edits:
        by_module.setdefault((edit.site, edit.component, edit.positions, edit.layer), []).append(edit)
    values: dict[Place, list[Tensor]] = {}
    for (site, component, positions, layer), made in by_module.items():
        in_tower = _is_in_tower(runtime, runtime.hooked[site, layer, component].site)
        num_calls = max(1, len(calls)) if in_tower else 1
        per_call = len(made) // num_calls
        for call in range(num_calls):
            for number, values_BT in enumerate(_merged(made[call * per_call : (call + 1) * per_call])):
                values.setdefault(Place(site, component, positions, number, layer), []).append(values_BT)
    return Trace(runtime, values, calls)


def _is_in_tower(runtime: Runtime, site: Site) -> bool:
    vision = runtime.sites.by_name.get("vision")
    if site.stream or site.tower is None or vision is None or vision.tower is None:
        return False
    return site.tower.module is vision.tower.module


def _merged(edits: Sequence[Edited]) -> list[Tensor]:
    """Return values_BT of each intervention of one call; the parts of an untied one are put together."""
    found: list[Tensor] = []
    parts: set[int | None] = {None}
    for edit in edits:
        values_BT = torch.where(edit.mask_BT, edit.relative_BT.float().nan_to_num(nan=math.inf), math.nan).cpu()
        if edit.part in parts:
            found.append(values_BT)
            parts = {None, edit.part}
        else:
            found[-1:] = [torch.where(found[-1].isnan(), values_BT, found[-1])] if found else [values_BT]
            parts.add(edit.part)
    return found


# Text --------------------------------------------------------------------------------------------------------------


def layouts_of(runtime: Runtime, inputs: Mapping[str, Any]) -> Layouts:
    """Return the layout of a batch of each text stream, and its ids."""
    found: dict[str, tuple[TokenLayout, Tensor | None]] = {}
    for name, stream in runtime.streams.items():
        if not isinstance(runtime.model, PreTrainedModel):
            ids_BL = inputs.get("text")
            if not isinstance(ids_BL, Tensor):
                continue
            ids_BL = F.pad(ids_BL, (0, stream.vocabulary.num_behind), value=stream.vocabulary.pad_id)
            shape = (ids_BL.shape[0], ids_BL.shape[1])
            found[name] = text_layout(shape, ids_BL.device, stream.vocabulary, input_ids_BL=ids_BL), ids_BL
            continue
        layout = runtime.batches.lay_out(name, inputs, (), is_prompt_BL=inputs.get("prompt_mask"), training=False)
        if layout is not None:
            found[name] = layout, _ids_of(runtime, name, inputs)
    return found


def _ids_of(runtime: Runtime, stream: str, inputs: Mapping[str, Any]) -> Tensor | None:
    if not (runtime.batches.has_encoder and stream == "text"):
        return inputs.get("input_ids")
    if isinstance(inputs.get("decoder_input_ids"), Tensor):
        return inputs["decoder_input_ids"]
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or runtime.sites.quirk.labels_in_place:
        return labels
    model: Any = runtime.model
    start = getattr(model.config, "decoder_start_token_id", None)
    return F.pad(labels[:, :-1], (1, 0), value=-1 if start is None else start)


def read_row(runtime: Runtime, stream: str, layout: TokenLayout, inputs: Mapping[str, Any], row: int) -> Reading:
    """Return what is to be known of a row of a text stream."""
    real_BL = (layout.mask("prompt") | layout.mask("response")).cpu()
    real_L = real_BL[row]
    image_BL = layout.segments.get("image", torch.zeros_like(real_BL)).cpu()
    is_image_L = image_BL[row][real_L]
    nowhere_L = torch.full_like(is_image_L, -1, dtype=torch.long)
    if not image_BL.any():
        counts = (0,) * layout.num_rows if "image" in layout.segments else None
        return Reading(real_L, is_image_L, nowhere_L, nowhere_L, nowhere_L, (), "", counts)
    try:
        grid = _image_grid(runtime, stream, layout, inputs)
    except ValueError as error:  # this batch's pictures are not as its family's are: told where it is drawn
        return Reading(real_L, is_image_L, nowhere_L, nowhere_L, nowhere_L, (), str(error), None)
    if isinstance(grid, str):
        return Reading(real_L, is_image_L, nowhere_L, nowhere_L, nowhere_L, (), grid, None)
    starts_BL = ((grid.row_BL == 0) & (grid.col_BL == 0)).cpu()
    picture_L = torch.where(is_image_L, starts_BL[row][real_L].cumsum(0) - 1, -1)
    rows, cols = (sizes_BL.cpu()[row][starts_BL[row]].tolist() for sizes_BL in (grid.rows_BL, grid.cols_BL))
    row_L, col_L = (places_BL.cpu()[row][real_L] for places_BL in (grid.row_BL, grid.col_BL))
    sizes, counts = tuple(zip(rows, cols, strict=True)), tuple(starts_BL.sum(1).tolist())
    return Reading(real_L, is_image_L, picture_L, row_L, col_L, sizes, "", counts)


def _image_grid(runtime: Runtime, stream: str, layout: TokenLayout, inputs: Mapping[str, Any]) -> Grid | str:
    """Return the grid of a stream's image tokens, or why there is none. Raises ValueError, see `image_grid`."""
    site = runtime.sites.by_name[stream]
    return site.no_image_region or image_grid(runtime.sites, inputs, None, layout)


def place_text(values_BT: Tensor, layout: TokenLayout, reading: Reading, row: int) -> tuple[Tensor, Patches]:
    """Return the values at a row's tokens, and those of its image tokens by rows and columns, if any is edited."""
    if values_BT.shape != (layout.num_rows, layout.num_tokens):
        raise ValueError(
            f"the text blocks ran on {tuple(values_BT.shape)} tokens and the batch has {layout.num_rows} rows of "
            f"{layout.num_tokens}: which are which cannot be shown"
        )
    text_L = values_BT[row][reading.real_L]
    if bool(text_L[reading.is_image_L].isnan().all()):
        return text_L, Patches((), (), "")
    patches = []
    for picture, size in enumerate(reading.sizes):
        here_L = reading.picture_L == picture
        patches.append(_spread(text_L[here_L], reading.row_L[here_L], reading.col_L[here_L], size))
    return text_L, Patches(tuple(patches), (), reading.no_grid)


def _spread(values_N: Tensor, row_N: Tensor, col_N: Tensor, size: tuple[int, int]) -> Tensor:
    values_RC = torch.full(size, math.nan)
    values_RC[row_N, col_N] = values_N
    return values_RC


# Towers ------------------------------------------------------------------------------------------------------------


def place_tower(run: Trace, place: Place) -> Patches:
    """Return the values of all pictures of a batch, by rows and columns where the tower's grid is known."""
    site = run.site(place)
    if not _is_in_tower(run.runtime, site) or not run.calls:
        rows = [row_T for values_BT in run.values[place] for row_T in values_BT]
        return Patches((), tuple(rows), "nothing is known of the states of a module named by its path")
    found = [
        _of_call(run, place, site, call, values_BT)
        for call, values_BT in zip(run.calls, run.values[place], strict=True)
    ]
    patches = tuple(one for of_call in found for one in of_call.patches)
    others = tuple(one for of_call in found for one in of_call.others)
    return Patches(patches, others, next((of_call.no_grid for of_call in found if of_call.no_grid), ""))


def _of_call(run: Trace, place: Place, site: Site, call: TowerCall, values_BT: Tensor) -> Patches:
    placed = next(
        item
        for item in run.runtime.hooked[place.site, place.layer, place.component].items
        if item.positions.text == place.positions
    )
    shape = next(
        shape
        for text, _, shape in call.selections
        if text == place.positions and isinstance(shape, tuple) and _as_rows(shape) == tuple(values_BT.shape)
    )
    # Any select but all of them makes the call lay its tokens out.
    first = replace(placed, positions=parse_positions("f1"), part=None)
    try:
        call.select(site, first, shape, torch.device("cpu"))
    except ValueError as error:
        return Patches((), tuple(values_BT), str(error))
    layout, at_T = call.pictures[shape].layout, call.pictures[shape].at_T
    values_BL = values_BT
    if at_T is not None:
        flat = torch.full((layout.num_rows * layout.num_tokens,), math.nan)
        flat[at_T.cpu()] = values_BT[0]
        values_BL = flat.reshape(layout.num_rows, layout.num_tokens)
    real_BL = layout.mask("prompt").cpu()
    patch_BL = layout.segments.get("patches", torch.zeros_like(real_BL)).cpu()
    grid = layout.grid
    if grid is None or site.no_region:
        rows = [values_L[real_L] for values_L, real_L in zip(values_BL, real_BL, strict=True)]
        return Patches((), tuple(rows), site.no_region or layout.no_grid)
    shape_BL = real_BL.shape
    row_BL, col_BL = (places_BL.cpu().expand(shape_BL) for places_BL in (grid.row_BL, grid.col_BL))
    rows_B, cols_B = (sizes_BL.cpu().expand(shape_BL)[:, 0].tolist() for sizes_BL in (grid.rows_BL, grid.cols_BL))
    patches, others = [], []
    for picture, (values_L, patch_L, real_L) in enumerate(zip(values_BL, patch_BL, real_BL, strict=True)):
        places = row_BL[picture][patch_L], col_BL[picture][patch_L]
        patches.append(_spread(values_L[patch_L], *places, (rows_B[picture], cols_B[picture])))
        others.append(values_L[real_L & ~patch_L])
    return Patches(tuple(patches), tuple(others), "")


def _as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the same states as (B, T)."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
