"""Figures: where interventions act, how much they change, and what that does to the next token.

Each draws what a function of `drawing.maps` returns, on a matplotlib `Figure` of its own: no pyplot, no global state.
Lengths are in inches, fonts in points. Colours are Okabe and Ito's and viridis, told apart by the colour-blind.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlreft.drawing.glyphs import cut, drawable, text_width
from vlreft.drawing.maps import EditMap, EditNorms, Images, NextTokens, Placement, edit_norms, next_tokens, placement
from vlreft.drawing.sheets import ADAPTED, BASE, BODY, MARGIN, SOFT, TITLE, Cell, Page, Sheet
from vlreft.reft import Reft

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LAYERS = 5  # maps of single layers beside their mean; all are in it


def plot_placement(
    reft: Reft, inputs: Mapping[str, Any], processor: object, *, row: int = 0, image: Images | None = None
) -> "Figure":
    """Draw one row of a batch of model inputs: its picture with the edited patches, its text with the edited tokens.

    One panel for each intervention, which names the layers that it acts in. `drawing.maps.placement` returns the same
    as data, and says what raises ValueError; `image` is drawn instead of the picture that `inputs` hold.
    """
    return draw_placement(placement(reft, inputs, processor, row=row, image=image))


def plot_edits(
    reft: Reft, inputs: Mapping[str, Any], processor: object, *, row: int = 0, image: Images | None = None
) -> "Figure":
    """Draw how long each edit of a row is, as a share of its state's length, over the picture and the text, by layer.

    `vlreft.drawing.maps.edit_norms` returns the same as data.
    """
    return draw_edits(edit_norms(reft, inputs, processor, row=row, image=image))


def plot_next_tokens(
    reft: Reft, inputs: Mapping[str, Any], processor: object, *, top: int = 10, row: int = 0
) -> "Figure":
    """Draw the probabilities of the `top` next tokens with the interventions and without, and the divergence.

    `vlreft.drawing.maps.next_tokens` returns the same as data.
    """
    return draw_next_tokens(next_tokens(reft, inputs, processor, top=top, row=row))


# Placement ---------------------------------------------------------------------------------------------------------


def draw_placement(shown: Placement) -> "Figure":
    """Draw where interventions act."""
    sheet = Sheet()
    cells = [
        Cell(_lines("picture", n, shown), picture) for n, picture in enumerate(shown.pictures) if picture is not None
    ]
    strips: list[EditMap] = []
    for found in shown.maps:
        for number, mask_RC in enumerate(found.patches):
            picture = shown.pictures[number] if number < len(shown.pictures) else None
            cells.append(Cell((found.site, found.positions, _where(found, number)), picture, mask_RC=mask_RC))
        if found.no_grid and not found.patches:
            strips.append(found)
    sheet.pictures(cells)
    for found in strips:
        values = found.others if found.text_L is None else (found.text_L[shown.texts[found.stream].is_image_L],)
        sheet.title(f"{found.site} \u00b7 {found.positions}", _layers(found))
        sheet.note(f"image tokens in their order, no picture: {found.no_grid}")
        for mask_N in values:
            sheet.strip(mask_N)
    for stream, text in shown.texts.items():
        maps = [found for found in shown.maps if found.stream == stream and found.text_L is not None]
        for found in maps:
            assert found.text_L is not None
            of_text = found.text_L[~text.is_image_L]
            counts = f"{int(of_text.sum())} of {len(of_text)} text tokens"
            if bool(text.is_image_L.any()):
                of_image = found.text_L[text.is_image_L]
                counts += f", {int(of_image.sum())} of {len(of_image)} image tokens"
            sheet.title(f"{found.site} \u00b7 {found.positions}", f"{_layers(found)} \u00b7 {counts}")
            sheet.tokens(text.tokens, text.is_image_L.tolist(), found.text_L.tolist())
        if not maps:
            sheet.title(stream.replace("_", " "), "not edited")
            sheet.tokens(text.tokens, text.is_image_L.tolist(), [False] * len(text.tokens))
    sheet.note("orange: edited")
    return sheet.figure()


def _lines(name: str, number: int, shown: Placement | EditNorms) -> tuple[str, str, str]:
    many = len(shown.pictures) > 1
    return (f"{name} {number + 1}" if many else name, "as the model is given it", "")


def _where(found: EditMap, number: int) -> str:
    mask_RC = found.patches[number]
    words = f"{_layers(found)} \u00b7 {int(mask_RC.sum())} of {mask_RC.numel()}"
    num_others = int(found.others[number].sum()) if found.others else 0
    return words + (f" + {num_others} other{'s' if num_others > 1 else ''}" if num_others else "")


def _layers(found: EditMap) -> str:
    """Name the layers: those next to each other as a range."""
    if found.site == "connector":
        return "before layer 0"
    spans: list[list[int]] = []
    for layer in sorted(found.layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    words = ", ".join(str(first) if first == last else f"{first}\u2013{last}" for first, last in spans)
    component = "" if found.component == "output" else f" {found.component}"
    return f"layer{'s' if len(found.layers) > 1 else ''} {words}{component}"


# Norms -------------------------------------------------------------------------------------------------------------


def draw_edits(shown: EditNorms) -> "Figure":
    """Draw how much interventions change."""
    sheet = Sheet()
    for group in _groups(shown.maps):
        first = group[0]
        values = torch.cat([torch.zeros(0), *(value.flatten() for found in group for value in found.values)])
        edited = values[~values.isnan()]
        finite = edited[edited.isfinite()]
        most = float(finite.max()) if len(finite) else 0.0
        mean = f"mean {float(finite.mean()):.2g}, max {most:.2g}" if most else "nothing changes in this row"
        sheet.title(f"{first.site} \u00b7 {first.positions}", f"edit's length / state's length \u00b7 {mean}")
        most = most or 1.0
        if not len(edited):
            continue
        for number in range(len(first.patches)):
            picture = shown.pictures[number] if number < len(shown.pictures) else None
            cells = [Cell(("picture",), picture)] if picture is not None else []
            sheet.maps(cells + _cells(group, number), most)
            if others := _others(group, number):
                sheet.note(f"tokens of the tower that are no patches: {others}")
        names = [_layers(found).removeprefix("layer ") for found in group]
        values_KL = torch.stack([found.text_L for found in group if found.text_L is not None] or [torch.zeros(0)])
        is_image_L = shown.texts[first.stream].is_image_L if first.text_L is not None else torch.zeros(0).bool()
        if first.no_grid and not first.patches:
            sheet.note(f"image tokens in their order, no picture: {first.no_grid}")
            strips = [torch.stack([found.others[number] for found in group]) for number in range(len(first.others))]
            for values_KN in strips if first.text_L is None else [values_KL[:, is_image_L]]:
                sheet.heat(values_KN, names, None, most)
        if first.text_L is not None and bool((~values_KL[:, ~is_image_L].isnan()).any()):
            sheet.token_heat(values_KL, names, shown.texts[first.stream].tokens, is_image_L.tolist(), most)
    if not shown.maps:
        sheet.title("nothing is edited in this row", "")
    sheet.note("grey: not edited; a column of image tokens, or of tokens left out, is their mean")
    return sheet.figure()


def _others(group: Sequence[EditMap], number: int) -> str:
    """Tell the means of what is edited beside the patches, by layer."""
    values = [(_layers(found), found.others[number]) for found in group if found.others]
    means = [(layer, float(values_N.nanmean())) for layer, values_N in values if not bool(values_N.isnan().all())]
    return ", ".join(f"{layer} {mean:.2g}" for layer, mean in means)


def _groups(maps: Sequence[EditMap]) -> list[list[EditMap]]:
    """Return the maps of one intervention together, a layer each; where a tower changes its grid another begins."""
    groups: list[list[EditMap]] = []
    for found in maps:
        if groups and _kind(groups[-1][-1]) == _kind(found) and found.layers[0] > groups[-1][-1].layers[0]:
            groups[-1].append(found)
        else:
            groups.append([found])
    return groups


def _kind(found: EditMap) -> tuple[object, ...]:
    shapes = [tuple(values.shape) for values in (*found.patches, *found.others)]
    return found.site, found.component, found.positions, len(found.patches), shapes


def _cells(group: Sequence[EditMap], number: int) -> list[Cell]:
    """Return the mean over the layers, and maps of some of them, spread evenly."""
    values_KRC = [found.patches[number] for found in group]
    chosen = range(len(group))
    cells: list[Cell] = []
    if len(group) > 1:
        mean_RC = torch.stack(values_KRC).nanmean(0)
        cells.append(Cell((f"mean of {len(group)}",), values_RC=mean_RC))
    if len(group) > NUM_LAYERS:
        chosen = torch.linspace(0, len(group) - 1, NUM_LAYERS).round().long().tolist()
    return cells + [Cell((_layers(group[n]),), values_RC=values_KRC[n]) for n in chosen]


# Next tokens -------------------------------------------------------------------------------------------------------


def draw_next_tokens(shown: NextTokens) -> "Figure":
    """Draw what comes next, with and without the interventions."""
    labels = [cut(drawable(token), BODY, 110) for token in shown.tokens]
    left = MARGIN + 0.1 + max(text_width(label, BODY) for label in labels) / 72
    step, head, width = 0.34, 0.62, 6.2
    page = Page(head + step * len(labels) + MARGIN, width)
    page.text(MARGIN, 0.3, "next token after the prompt", TITLE, weight="bold")
    page.text(MARGIN, 0.47, f"KL(with \u2016 without) = {shown.divergence:.3g} nats", BODY, SOFT)
    for place, (name, color) in enumerate((("without", BASE), ("with the interventions", ADAPTED))):
        x = width - 2.55 + 0.75 * place
        page.box(x, 0.21, 0.11, 0.11, color)
        page.text(x + 0.16, 0.3, name, BODY)
    longest = width - left - 0.65
    most = max(*shown.base, *shown.edited)
    for number, label in enumerate(labels):
        y = head + step * number
        page.text(left - 0.08, y + 0.19, label, BODY, ha="right")
        for place, (share, color) in enumerate(((shown.base[number], BASE), (shown.edited[number], ADAPTED))):
            long = longest * share / most
            page.layer.barh(y + 0.085 + 0.135 * place, long, 0.125, left=left, color=color)
            words = f"{share:.3f}" if share >= 0.0005 else "< 0.001"
            page.text(left + long + 0.05, y + 0.115 + 0.135 * place, words, 6.5, SOFT)
    return page.figure
