"""Where interventions act in a row of a batch, by how much, and what comes next: the data that `drawing.plots` draws.

Shape suffixes: B = rows of the batch, or pictures of a tower, L = tokens of a row's text without padding, T = tokens of
a forward, R, C = rows and columns of patches of a picture, N = tokens of a tower, V = words of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlreft.acting import evaluating
from vlreft.drawing.shown import given_pictures, pictures_in, token_texts
from vlreft.drawing.traces import Layouts, Place, Reading, Trace, layouts_of, place_text, place_tower, read_row, trace
from vlreft.layout import TokenLayout
from vlreft.reft import Reft
from vlreft.running.hooks import Runtime

Images = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of a row as one text stack reads them: their spelling, and which stand for a picture."""

    tokens: tuple[str, ...]
    is_image_L: Tensor


@dataclass(frozen=True, eq=False)
class EditMap:
    """What one intervention does at each place of a row, the same in all of `layers`.

    Values are bool (`Placement`) or float32, NaN where nothing is edited (`EditNorms`). text_L: at the row's tokens of
    `stream`, None for edits in a tower. patches: by rows and columns of each picture; of a text's image tokens only
    where any is edited. others: for edits in a tower, by picture, the tokens that are no patches, or all of them where
    `patches` is empty; then, as for image tokens without `patches`, `no_grid` says why.
    """

    site: str
    component: str
    positions: str
    layers: tuple[int, ...]
    stream: str
    text_L: Tensor | None
    patches: tuple[Tensor, ...] = ()
    others: tuple[Tensor, ...] = ()
    no_grid: str = ""

    @property
    def values(self) -> tuple[Tensor, ...]:
        """All values once: those of the text, or those of the pictures."""
        return (*self.patches, *self.others) if self.text_L is None else (self.text_L,)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the interventions act in a row. texts: by stream; pictures: (H, W, 3) uint8, None where not to be shown."""

    texts: Mapping[str, Text]
    pictures: tuple[np.ndarray | None, ...]
    maps: tuple[EditMap, ...]


@dataclass(frozen=True, eq=False)
class EditNorms:
    """How much the interventions change in a row: the edit's length by the state's, one map for each layer."""

    texts: Mapping[str, Text]
    pictures: tuple[np.ndarray | None, ...]
    maps: tuple[EditMap, ...]


@dataclass(frozen=True)
class NextTokens:
    """The likeliest next tokens with or without an adapter, likeliest first by the larger of both probabilities.

    base, edited: probabilities without and with it. divergence: Kullback and Leibler's, of the distribution with the
    adapter from that without, over the whole vocabulary, in nats.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    base: tuple[float, ...]
    edited: tuple[float, ...]
    divergence: float


def placement(
    reft: Reft, inputs: Mapping[str, Any], processor: object, *, row: int = 0, image: Images | None = None
) -> Placement:
    """Return where the interventions act in a row of a batch of model inputs, layers that act alike in one map.

    The model runs once on `inputs`, in evaluation mode, without a graph. image: the row's picture (or pictures), as it
    was cut for the model, instead of what `inputs` hold. Raises ValueError where they are switched off, and for a
    row that is not there.
    """
    norms = edit_norms(reft, inputs, processor, row=row, image=image)
    maps: list[EditMap] = []
    for found in norms.maps:
        made = _mapped(found, lambda values: ~values.isnan())
        twin = next((n for n, other in enumerate(maps) if _act_alike(other, made)), None)
        if twin is None:
            maps.append(made)
        else:
            maps[twin] = replace(maps[twin], layers=tuple(sorted({*maps[twin].layers, *made.layers})))
    return Placement(norms.texts, norms.pictures, tuple(maps))


def edit_norms(
    reft: Reft, inputs: Mapping[str, Any], processor: object, *, row: int = 0, image: Images | None = None
) -> EditNorms:
    """Return how much the interventions change in a row of a batch of model inputs; see `placement`."""
    layouts, run = layouts_of(reft.runtime, inputs), trace(reft, inputs)
    if not run.values and not _is_on(reft):
        raise ValueError(f"the interventions '{reft.name}' are switched off here; look at them outside of `disabled()`")
    return _norms(run, layouts, inputs, processor, row, image)


def next_tokens(reft: Reft, inputs: Mapping[str, Any], processor: object, *, top: int = 10, row: int = 0) -> NextTokens:
    """Return what comes behind a row's prompt, with the interventions and without them.

    The model runs twice, in evaluation mode, without a graph. Raises ValueError for a model that writes no text.
    """
    runtime = reft.runtime
    if top < 1:
        raise ValueError(f"`top` (={top}) must be at least 1")
    if not runtime.batches.is_generative:
        raise ValueError(f"{runtime.sites.model_name} has no next token: it writes no text")
    layout, _ = layouts_of(runtime, inputs)["text"]
    _check_row(row, layout.num_rows)
    last = int(layout.mask("prompt")[row].nonzero()[-1])
    with evaluating(runtime.model), torch.no_grad():
        edited_V = _logits(runtime, inputs, layout)[row, last].double().log_softmax(-1).cpu()
        with reft.disabled():
            base_V = _logits(runtime, inputs, layout)[row, last].double().log_softmax(-1).cpu()
    share_V = edited_V.exp()
    divergence = float(torch.where(share_V > 0, share_V * (edited_V - base_V), 0.0).sum())
    ids = torch.maximum(edited_V, base_V).topk(min(top, len(base_V))).indices.tolist()
    base, edited = (tuple(values_V.exp()[ids].tolist()) for values_V in (base_V, edited_V))
    return NextTokens(token_texts(processor, ids), tuple(ids), base, edited, max(0.0, divergence))


def _logits(runtime: Runtime, inputs: Mapping[str, Any], layout: TokenLayout) -> Tensor:
    logits_BTV = runtime.model(**inputs).logits
    if logits_BTV.shape[:2] != (layout.num_rows, layout.num_tokens):
        raise ValueError(
            f"{runtime.sites.model_name} gives logits of shape {tuple(logits_BTV.shape)} for {layout.num_rows} rows of "
            f"{layout.num_tokens} tokens: which are the last one's is not to be told"
        )
    return logits_BTV


def _is_on(reft: Reft) -> bool:
    mine = {id(edit) for edit in reft.edits.values()}
    placed = [item for hooked in reft.runtime.hooked.values() for item in hooked.items]
    return any(item.switch.on for item in placed if id(item.edit) in mine)


# Looking -----------------------------------------------------------------------------------------------------------


def _norms(
    run: Trace, layouts: Layouts, inputs: Mapping[str, Any], processor: object, row: int, image: Images | None
) -> EditNorms:
    runtime = run.runtime
    readings = {
        name: read_row(runtime, name, layout, inputs, row)
        for name, (layout, _) in layouts.items()
        if row < layout.num_rows
    }
    towers = {place: place_tower(run, place) for place in run.values if not run.site(place).stream}
    pixels = pictures_in(inputs, processor, runtime.sites)
    num_pictures = max([len(found.patches or found.others) for found in towers.values()], default=len(pixels))
    mine = _pictures_of(row, num_pictures, layouts, readings, is_dual=not runtime.batches.is_generative)
    if mine is None and towers:
        raise ValueError(
            f"the batch has {num_pictures} pictures (or tiles), and which of them are those of row {row} is not known "
            f"for {runtime.sites.model_name}: give a batch of one row"
        )
    mine = mine or ()
    maps: list[tuple[Place, EditMap]] = []
    for place in run.values:
        stream = run.site(place).stream
        common = place.site, place.component, place.positions, (place.layer,), stream
        if not stream:
            patches, others, no_grid = towers[place]
            patches, others = (tuple(values[n] for n in mine if n < len(values)) for values in (patches, others))
            maps.append((place, EditMap(*common, None, patches, others, no_grid)))
        elif stream in readings:
            text_L, found = place_text(run.values[place][0], layouts[stream][0], readings[stream], row)
            maps.append((place, EditMap(*common, text_L, *found)))
    order = list(dict.fromkeys(place[:4] for place, _ in maps))
    maps.sort(key=lambda pair: (order.index(pair[0][:4]), pair[0].layer))
    texts = {name: _text(reading, layouts[name][1], processor, row) for name, reading in readings.items()}
    num_mine = max(len(mine), *(len(reading.sizes) for reading in readings.values()), 0)
    pictures = [pixels[n] if len(pixels) == num_pictures else None for n in mine] + [None] * (num_mine - len(mine))
    shown = pictures if image is None else given_pictures(image, num_mine)
    return EditNorms(texts, tuple(shown), tuple(made for _, made in maps))


def _check_row(row: int, num_rows: int) -> None:
    if not 0 <= row < num_rows:
        raise ValueError(f"`row` (={row}) must be one of the batch's {num_rows} rows, counted from 0")


def _pictures_of(
    row: int, num_pictures: int, layouts: Layouts, readings: Mapping[str, Reading], *, is_dual: bool
) -> Sequence[int] | None:
    """Return which of a batch's pictures are a row's, None if not known. In a dual encoder a row is one, and a text."""
    num_rows = max([num_pictures if is_dual else 0, *(layout.num_rows for layout, _ in layouts.values())])
    _check_row(row, num_rows)
    if is_dual:
        return range(row, min(row + 1, num_pictures))
    counts = next((reading.num_pictures for reading in readings.values() if reading.num_pictures is not None), None)
    if counts is not None and sum(counts) == num_pictures:
        return range(sum(counts[:row]), sum(counts[: row + 1]))
    if num_pictures in (0, num_rows):
        return range(row, row + 1) if num_pictures else ()
    return range(num_pictures) if num_rows == 1 else None


def _text(reading: Reading, ids_BL: Tensor | None, processor: object, row: int) -> Text:
    num_tokens = len(reading.real_L)
    if ids_BL is None or ids_BL.shape[1] != num_tokens:  # embeddings, which nothing spells
        return Text(tuple(f"#{place}" for place in reading.real_L.nonzero()[:, 0].tolist()), reading.is_image_L)
    ids = ids_BL[row].cpu()[reading.real_L].tolist()
    return Text(token_texts(processor, ids), reading.is_image_L)


def _mapped(found: EditMap, change: Callable[[Tensor], Tensor]) -> EditMap:
    text_L = None if found.text_L is None else change(found.text_L)
    return replace(
        found, text_L=text_L, patches=tuple(map(change, found.patches)), others=tuple(map(change, found.others))
    )


def _act_alike(one: EditMap, other: EditMap) -> bool:
    if (one.site, one.component, one.positions) != (other.site, other.component, other.positions):
        return False
    same = len(one.values) == len(other.values) and one.no_grid == other.no_grid
    return same and all(a.equal(b) for a, b in zip(one.values, other.values, strict=True))
