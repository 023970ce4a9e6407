"""`Intervention` and `ReftConfig`: what to learn where, as frozen, validated data, JSON both ways."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vlreft.interventions import ACTIVATIONS, INTERVENTIONS, Edit
from vlreft.positions import Positions, parse_positions

INITS = ("identity", "reference")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Intervention:
    """One kind of edit, at one site, on some layers and positions.

    method: a row of `vlreft.interventions.INTERVENTIONS`: "loreft", "direft", "noreft", "nodireft", "consreft",
        "lobireft", "red" or "vector".
    site: "text" (the language model's blocks), "vision" (the tower's) or "connector" (the projected image features
        as they enter the language model).
    layers: "all", a number, or several (a list, a range); counted from 0, negative ones from the end. The edit acts on
        the output of the block. "all" leaves out vision blocks whose output the model never reads.
    positions: a string in the small language of `vlreft.positions`, e.g. "question:f4+l4" or "patches".
    rank: the subspace's dimension, for low-rank methods only.
    tied: one intervention for all `+` parts of `positions`. By default each part has its own, as in the ReFT paper's
        untied prefix and suffix.
    init: "identity" (the base's outputs are unchanged at the start) or "reference" (pyreft's start).
    activation: "relu", "gelu", "silu" or "tanh" on `Wh + b`; methods with a source `Wh + b` only.
    dropout: probability, on the edit (never on the residual stream), in training only.
    scale: strength of the edit; 1 is the formula as written.

    Raises ValueError or TypeError, naming the field, the value and the remedy.
    """

    method: str
    site: str = "text"
    layers: str | int | Sequence[int] = "all"
    positions: str = "prompt:l1"
    rank: int | None = None
    tied: bool = False
    init: str = "identity"
    activation: str | None = None
    dropout: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Validate each field and normalise `layers` to "all" or a tuple."""
        _one_of("method", self.method, INTERVENTIONS)
        _one_of("init", self.init, INITS)
        if self.activation is not None:
            _one_of("activation", self.activation, ACTIVATIONS)
        if not isinstance(self.site, str):
            raise TypeError(f"`site` must be a string, got {self.site!r}")
        if not isinstance(self.tied, bool):
            raise TypeError(f"`tied` must be True or False, got {self.tied!r}")
        _number("dropout", self.dropout)
        _number("scale", self.scale)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` (={self.dropout}) must be at least 0 and below 1")
        object.__setattr__(self, "layers", _layers(self.layers))
        parse_positions(self.positions)
        self._check_method()

    @property
    def parsed_positions(self) -> Positions:
        """The positions, parsed."""
        return parse_positions(self.positions)

    @property
    def parts(self) -> tuple[str, ...]:
        """The spellings of the position groups that have an intervention each."""
        parts = self.parsed_positions.parts
        return ("+".join(parts),) if self.tied else parts

    def build(self, width: int) -> Edit:
        """Make one fresh intervention module for a site of hidden width `width`."""
        return INTERVENTIONS[self.method](
            width, self.rank, init=self.init, activation=self.activation, dropout=self.dropout, scale=self.scale
        )

    def _check_method(self) -> None:
        method = INTERVENTIONS[self.method]
        if not method.uses_rank and self.rank is not None:
            raise ValueError(f"method '{self.method}' has no rank; leave `rank` (={self.rank}) out")
        if method.uses_rank and self.rank is None:
            raise ValueError(f"method '{self.method}' needs a `rank`, e.g. rank=4")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int)):
            raise TypeError(f"`rank` must be a whole number, got {self.rank!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"`rank` (={self.rank}) must be at least 1")
        if self.activation is not None and not method.uses_activation:
            raise ValueError(f"method '{self.method}' has no source to put `activation` (='{self.activation}') on")
        if self.init == "identity" and not method.has_identity:
            raise ValueError(f"method '{self.method}' has no identity start; write init='reference'")
        if self.init == "identity" and self.activation is not None and self.method in ("loreft", "noreft"):
            raise ValueError(
                f"method '{self.method}' with activation '{self.activation}' has no identity start; "
                "write init='reference' or leave `activation` out"
            )


@dataclass(frozen=True)
class ReftConfig:
    """A set of interventions, in the order in which they act where they share a block.

    Equal to itself after `from_dict(to_dict())`. Raises ValueError or TypeError with the intervention's number.
    """

    interventions: tuple[Intervention, ...]

    def __init__(self, interventions: Intervention | Iterable[Intervention]) -> None:
        """Take one intervention or several."""
        several = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
        for number, item in enumerate(several):
            if not isinstance(item, Intervention):
                raise TypeError(f"item {number} of ReftConfig must be a vlreft.Intervention, got {item!r}")
        if not several:
            raise ValueError("ReftConfig needs at least one vlreft.Intervention")
        object.__setattr__(self, "interventions", several)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"format_version": FORMAT_VERSION, "interventions": [asdict(item) for item in self.interventions]}

    def to_json(self) -> str:
        """Return the JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ReftConfig":
        """Build from `to_dict`'s data; unknown or missing keys are errors."""
        if not isinstance(data, Mapping) or not isinstance(data.get("interventions"), list):
            raise ValueError("a ReftConfig needs a list under 'interventions'")
        if data.get("format_version") != FORMAT_VERSION:
            version = data.get("format_version")
            raise ValueError(f"`format_version` (={version!r}) is not {FORMAT_VERSION}; it was made by another vlreft")
        if surplus := sorted(set(data) - {"format_version", "interventions"}):
            raise ValueError(f"a ReftConfig has no keys {surplus}")
        known = {field.name for field in fields(Intervention)}
        items = []
        for number, item in enumerate(data["interventions"]):
            if not isinstance(item, Mapping) or set(item) != known:
                got = sorted(set(item) ^ known) if isinstance(item, Mapping) else item
                raise ValueError(f"intervention {number} must have the keys {sorted(known)}; it differs in {got}")
            try:
                items.append(Intervention(**item))
            except (TypeError, ValueError) as error:
                raise ValueError(f"intervention {number}: {error}") from error
        return cls(items)


def _layers(layers: object) -> str | tuple[int, ...]:
    if isinstance(layers, str) and layers == "all":
        return "all"
    several = (layers,) if isinstance(layers, int) else layers
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise TypeError(f"`layers` must be 'all', a number or a list of numbers, got {layers!r}")
    numbers = tuple(several)
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"`layers` must be 'all', a number or a list of numbers, got {layers!r}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"`layers` (={list(numbers)}) names a layer twice")
    return numbers


def _one_of(field: str, value: object, known: Collection[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"`{field}` (={value!r}) must be one of {', '.join(map(repr, known))}")


def _number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise TypeError(f"`{field}` must be a finite number, got {value!r}")
