"""Interventions as a method: where they sit at which sites, layers and positions, of what rank, is searched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution

import vlreft
from tasks.methods.method import Adapted, Choice, Distributions, Method, Space, rates
from tasks.setups import Setup
from vlreft.models.sites import Site, find_sites

OFF = "off"
RANKS = (1, 2, 4, 8, 16)
FORMULAS = ("loreft", "direft", "nodireft")
# Parts of a stack, in shares of its depth; "every 2" takes every second layer.
LAYERS = ("all", "first half", "last half", "every 2")


@dataclass(frozen=True)
class Slot:
    """One place that can have an edit of its own: a site and the positions to choose from, the widest last."""

    name: str
    site: str
    positions: tuple[str, ...]


def slots_of(setup: Setup) -> tuple[Slot, ...]:
    """Return the places of a model: the end of the text, its image tokens, the answer's tokens, connector, tower."""
    sites = find_sites(setup.model).by_name
    generates = setup.task.kind == "generate"
    found: list[Slot] = []
    if "text" in sites:
        found += _text_slots(sites["text"], generates)
    if "text_encoder" in sites:
        found.append(Slot("encoder", "text_encoder", ("prompt:l4", "prompt:f4+l4", "prompt")))
    if "connector" in sites:
        found.append(Slot("connector", "connector", ("image",)))
    if "vision" in sites:
        # The class token alone, where there is one that is read, the patches, or every token of the tower.
        tower = sites["vision"]
        names = ("patches",) if tower.drops_cls else ("cls", "patches")
        own = tuple(name for name in names if name in tower.segments)
        found.append(Slot("vision", "vision", (*own, "all")))
    return tuple(found)


def _has_parts(slots: Sequence[Slot]) -> bool:
    """Whether any positions have several parts, which interventions could share."""
    return any("+" in positions for slot in slots for positions in slot.positions)


def _text_slots(site: Site, generates: bool) -> list[Slot]:
    if "eos" in site.segments:  # a dual encoder's text
        return [Slot("text", "text", ("eos", "all"))]
    if "image" not in site.segments:
        slots = [Slot("text", "text", ("prompt:l1", "prompt:l4", "prompt:f4+l4", "prompt"))]
    else:
        ends = ("prompt:l1", "prompt:l4", "question:f4+l4", "question")
        slots = [Slot("text", "text", ends), Slot("image", "text", ("image:uniform16", "image"))]
    return [*slots, Slot("response", "text", ("response",))] if generates else slots


@dataclass(frozen=True)
class ReftMethod(Method):
    """Interventions in the frozen base. formulas: the methods to choose from, of `vlreft.interventions`."""

    name: str = "loreft"
    title: str = "LoReFT"
    formulas: tuple[str, ...] = ("loreft",)
    ranks: tuple[int, ...] = RANKS
    learning_rates: tuple[float, float] = (1e-3, 1e-1)
    training: Distributions = field(default_factory=dict)

    def space(self, setup: Setup) -> Space:
        """Every slot is off or at one of its positions, all with one rank and one choice of layers.

        First come all slots together, which a search that is soon over can rely on, then each alone, and each pair.
        """
        slots = slots_of(setup)
        if not slots:
            raise ValueError(f"{type(setup.model).__name__} has no site that an intervention could sit at")
        width = min(find_sites(setup.model).by_name[slot.site].width for slot in slots)
        ranks = tuple(rank for rank in self.ranks if rank <= width)
        placement: Distributions = {
            **{slot.name: CategoricalDistribution((OFF, *slot.positions)) for slot in slots},
            "layers": CategoricalDistribution(LAYERS),
            "rank": CategoricalDistribution(ranks),
            "formula": CategoricalDistribution(self.formulas),
            "tied": CategoricalDistribution((False, True) if _has_parts(slots) else (False,)),
        }
        plain = {"layers": "all", "rank": 4 if 4 in ranks else ranks[-1], "formula": self.formulas[0], "tied": False}
        numbers = dict.fromkeys((len(slots), 1, min(2, len(slots))))
        starts = [
            {**{slot.name: slot.positions[-1] if slot in on else OFF for slot in slots}, **plain}
            for number in numbers
            for on in combinations(slots, number)
        ]
        training = {"learning_rate": rates(*self.learning_rates), "dropout": FloatDistribution(0.0, 0.2, step=0.05)}
        return Space(placement, {**training, **self.training}, tuple(starts))

    def plain(self, setup: Setup, choice: Choice) -> dict[str, Any]:
        """Tie only positions of several parts, choose layers only of stacks."""
        on = [slot for slot in slots_of(setup) if choice[slot.name] != OFF]
        sites = find_sites(setup.model).by_name
        has_parts = any("+" in choice[slot.name] for slot in on)
        has_layers = any(sites[slot.site].num_live > 1 for slot in on)
        return {
            **choice,
            "tied": choice["tied"] and has_parts,
            "layers": choice["layers"] if has_layers else "all",
        }

    def config(self, setup: Setup, choice: Choice) -> vlreft.ReftConfig:
        """Return what a choice trains. Raises ValueError if every slot is off."""
        items = []
        for slot in slots_of(setup):
            if (positions := choice[slot.name]) == OFF:
                continue
            num_layers = find_sites(setup.model).by_name[slot.site].num_live
            items.append(
                vlreft.Intervention(
                    choice["formula"],
                    site=slot.site,
                    layers=layers_of(choice["layers"], num_layers),
                    positions=positions,
                    rank=choice["rank"],
                    tied=choice["tied"] and "+" in positions,
                    dropout=choice.get("dropout", 0.0),
                )
            )
        if not items:
            raise ValueError("every slot is off, so there is nothing to train")
        return vlreft.ReftConfig(items, setup.heads)

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Attach the interventions inside."""
        reft = vlreft.attach(setup.model, self.config(setup, choice))
        named = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
        try:
            yield Adapted(setup.model, named, reft.save_pretrained, reft.load_weights)
        finally:
            reft.detach()


def layers_of(words: str, num_layers: int) -> str | list[int]:
    """Return the layers that one of `LAYERS` means in a stack of this depth; all of a single one."""
    half = num_layers // 2
    parts = {"first half": range(half), "last half": range(half, num_layers), "every 2": range(0, num_layers, 2)}
    return "all" if words == "all" or num_layers == 1 else list(parts[words])
