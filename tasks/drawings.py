"""Draws, for a run's report, where the adapter's edits act in a test row and how much they change."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import vlreft
from tasks.cards import RIGHT
from tasks.page import MAX_DRAWING
from tasks.report import Drawing
from tasks.setups import GenerateSetup, SequenceSetup, Setup
from vlreft.drawing.plots import plot_edits, plot_placement

RESOLUTIONS = (100, 70, 50, 35)  # dots per inch, the first that a report has room for


def place_to_draw(before: Sequence[float], after: Sequence[float]) -> int:
    """Return the first row that the adapter fixed, by the scores before and after, else the first of all."""
    pairs = enumerate(zip(before, after, strict=True))
    return next((place for place, (old, new) in pairs if old < RIGHT <= new), 0)


def draw_adapter(setup: Setup, adapter: str | Path, rows: Any, place: int) -> list[Drawing]:
    """Draw what an adapter does in the prompt of one row: where, and how much; nothing for a dual encoder.

    The base must have no adapter of the default name on it; it has none afterwards either.
    """
    found = _inputs(setup, rows, place)
    if found is None:
        return []
    inputs, processor = found
    reft = vlreft.load(setup.model, adapter)
    try:
        figures = (
            ("Where the adapter edits the prompt of one test row.", plot_placement(reft, inputs, processor)),
            ("How long each edit is, as a share of the state's length.", plot_edits(reft, inputs, processor)),
        )
    finally:
        reft.detach()
    return [Drawing(caption, _png(figure)) for caption, figure in figures]


def _inputs(setup: Setup, rows: Any, place: int) -> tuple[Mapping[str, Any], object] | None:
    """Return a row as the model is given it, and what spells its tokens; None for a dual encoder."""
    device = next(setup.model.parameters()).device
    example = setup.examples(rows, training=False)[place]
    if isinstance(setup, GenerateSetup):
        assert isinstance(setup.collator, vlreft.Collator)
        batch, processor = setup.collator.prompts([example]), setup.collator.processor
    elif isinstance(setup, SequenceSetup):
        batch, processor = setup.collator([example]), setup.tokenizer
    else:
        return None
    return {key: value.to(device) for key, value in batch.items()}, processor


def _png(figure: Any) -> bytes:
    png = b""
    for resolution in RESOLUTIONS:
        out = BytesIO()
        figure.savefig(out, format="png", dpi=resolution, metadata={"Software": None})
        png = out.getvalue()
        if len(png) <= MAX_DRAWING:
            break
    return png
