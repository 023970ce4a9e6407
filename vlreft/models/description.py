"""`describe`: what can be edited in a model, and what a config would train there, before anything is attached.

`main` is the command, which describes models that are not in memory: `models.empty` makes them from their configs.
"""

import argparse
import inspect
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from vlreft.attaching import make_parts
from vlreft.config import ReftConfig
from vlreft.models.components import COMPONENTS, Target
from vlreft.models.empty import build_empty, first_line
from vlreft.models.sites import Site, Sites, find_sites
from vlreft.plan import Entry
from vlreft.reft import CHILD_NAME, Parts, find_reft

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PLAIN_WIDTH = 120  # columns, where no terminal says how wide it is
# Arguments by which a vision tower is told the sizes of pictures that it runs as one row.
SIZE_ARGUMENTS = ("grid_thw", "image_grid_thw", "target_sizes", "image_sizes")
PATCH_ORDERS = {
    "raster": "line by line",
    "grouped": "grouped by merge window",
    "windows": "grouped by merge window, these sorted by attention window",
}


@dataclass(frozen=True)
class SiteDescription:
    """A site. `components` counts the live blocks that have each component, `no_component` says why one lacks.

    num_heads, head_width: of each kind of attention there is, () if unknown. states: how they are laid out, as far as
    structure says it. image_tokens: how image tokens are told, "" where none stand. no_region: why none can be taken.
    """

    name: str
    path: str
    num_blocks: int
    num_live: int
    dead_because: str
    width: int
    num_heads: tuple[int, ...]
    head_width: tuple[int, ...]
    states: str
    tokens: str
    segments: tuple[str, ...]
    components: dict[str, int]
    no_component: dict[str, str]
    image_tokens: str
    no_region: str


@dataclass(frozen=True)
class StackDescription:
    """A list of blocks that is no site by name and is reached by its path. width: None if it cannot be read."""

    path: str
    num_blocks: int
    width: int | None
    why: str


@dataclass(frozen=True)
class PlannedIntervention:
    """What one intervention of a config would train: `num_edits` modules of `num_parameters` numbers together."""

    method: str
    site: str
    layers: tuple[int, ...]
    component: str
    positions: str
    rank: int | None
    num_edits: int
    num_parameters: int


@dataclass(frozen=True, repr=False)
class Description:
    """What `describe` found, as plain data; printed, it is a table.

    model_type: "" for models without a transformers config. num_parameters: the base's. refused: why a site is not
    there, by name. planned, modules_to_save (numbers by module): of the config that was given, empty without one.
    """

    model_class: str
    model_type: str
    num_parameters: int
    sites: tuple[SiteDescription, ...]
    other_stacks: tuple[StackDescription, ...]
    refused: dict[str, str]
    planned: tuple[PlannedIntervention, ...] = ()
    modules_to_save: dict[str, int] = field(default_factory=dict)

    @property
    def num_trainable(self) -> int:
        """Numbers that the config's interventions would train in all, without those of `modules_to_save`."""
        return sum(item.num_parameters for item in self.planned)

    def __str__(self) -> str:
        from rich.console import Console

        plain = {"color_system": None, "force_terminal": False, "force_jupyter": False}
        console = Console(file=io.StringIO(), width=PLAIN_WIDTH, **plain)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    __repr__ = __str__

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        model_type = f" ({self.model_type})" if self.model_type else ""
        parts: list[RenderableType] = [
            Text(f"{self.model_class}{model_type}, {self.num_parameters:,} parameters", style="bold")
        ]
        if self.sites:
            parts += [_site_table(self.sites), _edit_table(self.sites)]
            parts += [Text(note) for site in self.sites for note in _notes(site)]
        if self.other_stacks:
            parts.append(_stack_table(self.other_stacks))
        if self.refused:
            parts += [Text(""), *(Text(f"no site '{name}': {why}") for name, why in self.refused.items())]
        if self.planned:
            parts += [_plan_table(self.planned, self.num_parameters), Text(self._total())]
        return Group(*parts)

    def _total(self) -> str:
        share = _share(self.num_trainable, self.num_parameters)
        saved = [f"; {count:,} in {name}" for name, count in self.modules_to_save.items()]
        return (
            f"trainable: {self.num_trainable:,} numbers, {share} of the base's {self.num_parameters:,}{''.join(saved)}"
        )


def describe(model: nn.Module, config: ReftConfig | str | os.PathLike[str] | None = None) -> Description:
    """Say what can be edited in a model, and how many numbers a config would train there; nothing is attached.

    config: a `ReftConfig`, or a saved adapter (its folder, or its `reft_config.json`). The model may be on the meta
    device. Raises the ValueError that `attach` would raise for a model without sites, or a config that does not fit.
    """
    if config is not None and not isinstance(config, ReftConfig):
        config = _read_reft_config(config)
    reft = find_reft(model)
    sites = find_sites(model) if reft is None else reft.runtime.sites
    made = None
    if config is not None:
        with torch.random.fork_rng(devices=[]):  # made as `attach` makes it, and thrown away
            made = make_parts(config, sites)
    own = {id(p) for name, p in model.named_parameters() if reft is not None and name.startswith(f"{CHILD_NAME}.")}
    return Description(
        model_class=sites.model_name,
        model_type=model.config.model_type if isinstance(model, PreTrainedModel) else "",
        num_parameters=sum(p.numel() for p in model.parameters() if id(p) not in own),
        sites=tuple(_describe_site(site, sites) for site in sites.by_name.values()),
        other_stacks=_other_stacks(sites),
        refused=dict(sites.refused),
        planned=_planned(config, made) if config is not None and made is not None else (),
        modules_to_save={head.name: sum(p.numel() for p in head.copy.parameters()) for head in made.heads}
        if made
        else {},
    )


# What there is -------------------------------------------------------------------------------------------------------


def _describe_site(site: Site, sites: Sites) -> SiteDescription:
    targets, no_component = _targets(site)
    heads = list(dict.fromkeys((target.num_heads, target.head_width) for target in targets.get("heads", [])))
    return SiteDescription(
        name=site.name,
        path=site.path,
        num_blocks=len(site.blocks),
        num_live=site.num_live,
        dead_because=site.dead_because if site.num_live < len(site.blocks) else "",
        width=site.width,
        num_heads=tuple(num for num, _ in heads),
        head_width=tuple(width for _, width in heads),
        states=_states(site),
        tokens=_tower_tokens(site),
        segments=site.segments,
        components={component: len(found) for component, found in targets.items()},
        no_component=no_component,
        image_tokens=_image_tokens(site, sites),
        no_region=site.no_region,
    )


def _targets(site: Site) -> tuple[dict[str, list[Target]], dict[str, str]]:
    """Return what can be hooked in the live blocks, by component, and why the first block that lacks one does."""
    targets: dict[str, list[Target]] = {}
    missing: dict[str, str] = {}
    for component in COMPONENTS if site.name != "connector" else ("output",):
        for layer in range(site.num_live):
            try:
                targets.setdefault(component, []).append(site.target(layer, component))
            except ValueError as error:
                missing.setdefault(component, str(error))
    return {component: found for component, found in targets.items() if found}, missing


def _states(site: Site) -> str:
    if site.tower is None or site.sequence_first:
        return "(tokens, batch, width)" if site.sequence_first else "(batch, tokens, width)"
    sizes = _size_argument(site)
    return f"packed, by `{sizes}`" if sizes else "told in the forward"


def _size_argument(site: Site) -> str:
    """Return the argument by which a tower is told the sizes of the pictures that it packs, "" if it packs none."""
    assert site.tower is not None
    told = inspect.signature(site.tower.module.forward).parameters
    return next((name for name in SIZE_ARGUMENTS if name in told), "")


def _tower_tokens(site: Site) -> str:
    """Say what a tower's tokens are beside patches, and how large a patch is."""
    tower = site.tower
    if tower is None:
        return ""
    if tower.no_patches:
        return f"cls and patches cannot be told: {tower.no_patches}"
    where = "behind" if tower.cls_last else "before"
    others = [f"{tower.num_cls} class token{'s' if tower.num_cls > 1 else ''}"] * bool(tower.num_cls)
    others += [f"{tower.num_registers} register tokens"] * bool(tower.num_registers)
    size = f" of {tower.patch_size[0]} x {tower.patch_size[1]} pixels" if tower.patch_size else ""
    dropped = "; the model drops the class token behind the last live block" if site.drops_cls else ""
    order = tower.patch_order or ("raster" if _size_argument(site) in ("target_sizes", "image_sizes") else "")
    ordered = f", {PATCH_ORDERS[order]}" if order else ""
    others_of_it = f"{' and '.join(others)} {where} the " if others else "no class token; "
    return f"{others_of_it}patches{size}{ordered}{dropped}"


def _image_tokens(site: Site, sites: Sites) -> str:
    if site.stream != sites.image_stream:
        return ""
    vocabulary = sites.vocabularies[site.stream]
    if sites.quirk.image_mask:
        return f"by `{sites.quirk.image_mask}`"
    if vocabulary.image_ids is None:
        return "not told from text"
    if vocabulary.image_ids:
        return _ids(vocabulary.image_ids)
    return f"none ({_ids(vocabulary.marks)} only marks a place)" if vocabulary.marks else ""


def _ids(ids: Sequence[int]) -> str:
    return f"id{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _other_stacks(sites: Sites) -> tuple[StackDescription, ...]:
    known, others = {site.path for site in sites.by_name.values()}, []
    for stack in sites.stacks:
        if stack.path in known:
            continue
        try:
            width = sites[stack.path].width
        except ValueError:
            width = None
        why = stack.aside or sites.refused.get(stack.kind, "what it reads is not told by its config or its path")
        others.append(StackDescription(stack.path, len(stack.blocks), width, why))
    return tuple(others)


# What a config would train -------------------------------------------------------------------------------------------


def _planned(config: ReftConfig, made: Parts) -> tuple[PlannedIntervention, ...]:
    entries: list[list[Entry]] = [[] for _ in config.interventions]
    for entry in made.plan:
        entries[int(entry.key.partition(":")[0])].append(entry)
    return tuple(
        PlannedIntervention(
            method=item.method,
            site=item.site,
            layers=tuple(sorted({entry.layer for entry in of_item})),
            component=item.component,
            positions=item.positions,
            rank=item.rank,
            num_edits=len(of_item),
            num_parameters=sum(p.numel() for entry in of_item for p in made.edits[entry.key].parameters()),
        )
        for item, of_item in zip(config.interventions, entries, strict=True)
    )


def _read_reft_config(path: str | os.PathLike[str]) -> ReftConfig:
    """Read the config of a saved adapter, whichever base it was made for."""
    file = Path(path) / "reft_config.json" if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it must hold a JSON object")
        data.pop("base", None)
        data.pop("weights", None)
        return ReftConfig.from_dict(data)
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} is not to be read as a vlreft config: {first_line(error)}") from error


# The tables ----------------------------------------------------------------------------------------------------------


def _table(*columns: str, numbers: Sequence[str] = ()) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
    return table


def _add_row(table: "Table", *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))  # as they are: positions hold brackets, which rich would read


def _site_table(sites: Sequence[SiteDescription]) -> "Table":
    columns = ("site", "path", "blocks", "width", "heads", "states")
    table = _table(*columns, numbers=("blocks", "width", "heads"))
    for site in sites:
        blocks = f"{site.num_live} of {site.num_blocks}" if site.dead_because else str(site.num_blocks)
        heads = " or ".join(f"{num} x {width}" for num, width in zip(site.num_heads, site.head_width, strict=True))
        is_connector = site.name == "connector"
        cells = (site.name, site.path, "into 1st" if is_connector else blocks, str(site.width))
        _add_row(table, *cells, heads, site.states)
    return table


def _edit_table(sites: Sequence[SiteDescription]) -> "Table":
    table = _table("site", "components", "positions", "image tokens", "regions")
    for site in sites:
        components = [
            name if count == site.num_live else f"{name} ({count} of {site.num_live})"
            for name, count in site.components.items()
        ]
        text = ", ".join(components) if site.name != "connector" else "image features as they enter"
        _add_row(table, site.name, text, ", ".join(site.segments), site.image_tokens, "no" if site.no_region else "yes")
    return table


def _notes(site: SiteDescription) -> list[str]:
    notes = [f"layers {site.num_live} and up are dead: {site.dead_because}"] * bool(site.dead_because)
    notes += [site.tokens] * bool(site.tokens)
    notes += [f"no regions: {site.no_region}"] * bool(site.no_region)
    notes += [f"{component}: {why}" for component, why in site.no_component.items()]
    return [f"{site.name}: {note}" for note in notes]


def _stack_table(stacks: Sequence[StackDescription]) -> "Table":
    table = _table("other blocks, by path", "blocks", "width", "why they are no site", numbers=("blocks", "width"))
    for stack in stacks:
        _add_row(table, stack.path, str(stack.num_blocks), str(stack.width or "?"), stack.why)
    return table


def _plan_table(planned: Sequence[PlannedIntervention], num_base: int) -> "Table":
    columns = ("method", "site", "layers", "component", "positions", "rank", "edits", "numbers", "of the base")
    table = _table(*columns, numbers=("rank", "edits", "numbers", "of the base"))
    for item in planned:
        place = (item.method, item.site, _ranges(item.layers), item.component, item.positions)
        counts = (str(item.num_edits), f"{item.num_parameters:,}", _share(item.num_parameters, num_base))
        _add_row(table, *place, "" if item.rank is None else str(item.rank), *counts)
    return table


def _share(count: int, num_base: int) -> str:
    return f"{100 * count / num_base:.4f} %"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers with their runs as "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# The command ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m vlreft.describe", description="Say what can be edited in a model, from its config alone."
    )
    parser.add_argument("model", help="a folder, a model of the Hub, or open_clip:NAME")
    parser.add_argument("--config", help="a reft_config.json, to count the numbers it would train")
    parser.add_argument("--class", dest="class_name", help="the model's class, if not the one its config names")
    given = parser.parse_args(arguments)
    try:
        found = describe(build_empty(given.model, given.class_name), given.config)
    except ValueError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    _console().print(found)
    return 0


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)
