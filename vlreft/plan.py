"""The plan of an adapter: one entry for each module that a config asks of a model, checked before anything is made."""

from dataclasses import dataclass

import torch
from torch import nn

from vlreft.config import Intervention, ReftConfig
from vlreft.edit import Edit
from vlreft.models.components import Target
from vlreft.models.sites import Site, Sites


@dataclass(frozen=True, eq=False)
class Entry:
    """One module to make: the intervention it comes from, its number in the config, and where it goes."""

    key: str
    number: int
    item: Intervention
    site: Site
    layer: int
    target: Target
    part: int | None
    span: tuple[int, int] | None

    def build(self) -> Edit:
        """Make the module, on the device of its block."""
        width = self.target.width if self.span is None else self.span[1] - self.span[0]
        device = _device_of(self.site.blocks[self.layer])
        if device.type == "meta":
            with torch.device("meta"):
                return self.item.build(width)
        return self.item.build(width).to(device)  # drawn on the CPU: the same start on every device


def plan_edits(config: ReftConfig, sites: Sites) -> list[Entry]:
    """Resolve a config on a model. Raises ValueError for what it asks and the model has not."""
    plan = []
    for number, item in enumerate(config.interventions):
        site = sites[item.site]
        segment = item.parsed_positions.segment
        _check_segment(item, site, sites)
        for layer in site.resolve_layers(item.layers, segment):  # pyright: ignore[reportArgumentType] - normalised in __post_init__
            target = site.target(layer, item.component)
            place = f"{number}:{site.name.replace('.', '/')}:{layer}"
            place += "" if item.component == "output" else f":{item.component}"
            for head, span in _spans(item, target, site, layer):
                width = target.width if span is None else span[1] - span[0]
                if item.rank is not None and item.rank > width:
                    raise ValueError(
                        f"`rank` (={item.rank}) must be at most the hidden size (={width}) of site '{site.name}' "
                        f"layer {layer}{head and ' head ' + head}; lower `rank`"
                    )
                for part, spelling in enumerate(item.parts):
                    key = f"{place}{head}:{spelling}"
                    plan.append(Entry(key, number, item, site, layer, target, None if item.tied else part, span))
    return plan


def _check_segment(item: Intervention, site: Site, sites: Sites) -> None:
    segment = item.parsed_positions.segment
    if segment not in site.segments:
        have = ", ".join(f"'{name}'" for name in site.segments)
        is_text_only = site.stream and sites.vocabularies[site.stream].image_ids == ()
        why = " (its tokens are words alone)" if is_text_only else ""
        if site.tower is not None and site.tower.no_patches:
            why = f" ({site.tower.no_patches})"
        raise ValueError(
            f"positions '{item.positions}': site '{site.name}' of {sites.model_name} has no segment '{segment}'{why}; "
            f"it has {have}"
        )
    if item.parsed_positions.has_region and (why := site.no_region):
        raise ValueError(f"positions '{item.positions}': no region can be taken at site '{site.name}': {why}")


def _spans(item: Intervention, target: Target, site: Site, layer: int) -> list[tuple[str, tuple[int, int] | None]]:
    """Return the name and span of each head that an intervention edits; one without a span for all other components."""
    if item.heads is None:
        return [("", None)]
    assert not isinstance(item.heads, int)
    numbers = range(target.num_heads) if item.heads == "all" else item.heads
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < target.num_heads:
            raise ValueError(
                f"head {number} is out of range: site '{site.name}' layer {layer} has {target.num_heads} heads, 0 to "
                f"{target.num_heads - 1}"
            )
    width = target.head_width
    return [(str(number), (int(number) * width, (int(number) + 1) * width)) for number in numbers]


def _device_of(block: nn.Module) -> torch.device:
    """Return where a block runs: where its parameters are, or where accelerate takes them when it offloads them."""
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]  # accelerate's mark on a module
    for several in hooks:
        for hook in several.hooks if isinstance(several, SequentialHook) else (several,):
            if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return device
