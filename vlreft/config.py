"""`Intervention` and `ReftConfig`: what to learn where, as frozen, validated data, JSON both ways."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vlreft.components import COMPONENTS
from vlreft.interventions import ACTIVATIONS, INTERVENTIONS, Edit
from vlreft.positions import Positions, parse_positions

INITS = ("identity", "reference")
# 2 added `component`, `heads` and `modules_to_save`; files of version 1 are read, what they lack has its default.
FORMAT_VERSION = 2
SINCE_VERSION_2 = frozenset({"component", "heads"})


@dataclass(frozen=True)
class Intervention:
    """One kind of edit, at one site, on some layers and positions.

    method: a row of `vlreft.interventions.INTERVENTIONS`: "loreft", "direft", "noreft", "nodireft", "consreft",
        "lobireft", "red" or "vector".
    site: "text" (the language model's blocks, the decoder's where there are two stacks), "text_encoder", "vision" (the
        tower's), "connector" (the projected image features as they enter the language model), or a module's path.
    layers: "all", a number, or several (a list, a range); counted from 0, negative ones from the end. "all" leaves out
        vision blocks whose output the model never reads.
    component: what of the block is edited: its "output" or "input"; what its "attention" or "mlp" gives, before that is
        added to the residual stream; or single attention "heads", before they are mixed.
    heads: "all" or head numbers, with component="heads"; each head has an intervention of its own.
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
    component: str = "output"
    heads: str | int | Sequence[int] | None = None
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
        object.__setattr__(self, "layers", _numbers("layers", "layer", self.layers))
        _one_of("component", self.component, COMPONENTS)
        if (self.heads is None) == (self.component == "heads"):
            need = "needs `heads`, e.g. heads='all'" if self.heads is None else f"takes no `heads` (={self.heads!r})"
            raise ValueError(f"component '{self.component}' {need}")
        if self.heads is not None:
            object.__setattr__(self, "heads", _numbers("heads", "head", self.heads))
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

    modules_to_save: modules of the base to train whole and save beside them, such as a new "classifier" or "score" head
        or a connector: each by its path, or by the end of one that is the end of no other's. The base's own stay as
        they are; trained copies stand in for them.

    Equal to itself after `from_dict(to_dict())`. Raises ValueError or TypeError with the intervention's number.
    """

    interventions: tuple[Intervention, ...]
    modules_to_save: tuple[str, ...]

    def __init__(
        self, interventions: Intervention | Iterable[Intervention], modules_to_save: str | Iterable[str] = ()
    ) -> None:
        """Take one intervention or several, and no module, one or several."""
        several = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
        for number, item in enumerate(several):
            if not isinstance(item, Intervention):
                raise TypeError(f"item {number} of ReftConfig must be a vlreft.Intervention, got {item!r}")
        if not several:
            raise ValueError("ReftConfig needs at least one vlreft.Intervention")
        object.__setattr__(self, "interventions", several)
        object.__setattr__(self, "modules_to_save", _module_names(modules_to_save))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "format_version": FORMAT_VERSION,
            "interventions": [asdict(item) for item in self.interventions],
            "modules_to_save": list(self.modules_to_save),
        }

    def to_json(self) -> str:
        """Return the JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ReftConfig":
        """Build from `to_dict`'s data; unknown or missing keys are errors."""
        if not isinstance(data, Mapping) or not isinstance(data.get("interventions"), list):
            raise ValueError("a ReftConfig needs a list under 'interventions'")
        version = data.get("format_version")
        if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
            raise ValueError(f"`format_version` (={version!r}) is not {FORMAT_VERSION}; it was made by another vlreft")
        keys = {"format_version", "interventions"} | ({"modules_to_save"} if version == FORMAT_VERSION else set())
        if surplus := sorted(set(data) - keys):
            raise ValueError(f"a ReftConfig has no keys {surplus}")
        if not isinstance(modules := data.get("modules_to_save", [] if version == 1 else None), list):
            raise ValueError("a ReftConfig needs a list under 'modules_to_save'")
        known = {field.name for field in fields(Intervention)} - (SINCE_VERSION_2 if version == 1 else set())
        items = []
        for number, item in enumerate(data["interventions"]):
            if not isinstance(item, Mapping) or set(item) != known:
                got = sorted(set(item) ^ known) if isinstance(item, Mapping) else item
                raise ValueError(f"intervention {number} must have the keys {sorted(known)}; it differs in {got}")
            try:
                items.append(Intervention(**item))
            except (TypeError, ValueError) as error:
                raise ValueError(f"intervention {number}: {error}") from error
        return cls(items, modules)


def _module_names(given: object) -> tuple[str, ...]:
    several = (given,) if isinstance(given, str) else given
    names = tuple(several) if isinstance(several, Iterable) else ()
    if not isinstance(several, Iterable) or any(not isinstance(name, str) or not name for name in names):
        raise TypeError(f"`modules_to_save` must be names or paths of modules, e.g. ['classifier'], got {given!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"`modules_to_save` (={list(names)}) names a module twice")
    return names


def _numbers(field: str, what: str, given: object) -> str | tuple[int, ...]:
    """Return "all" or a tuple of numbers without repetition."""
    if isinstance(given, str) and given == "all":
        return "all"
    several = (given,) if isinstance(given, int) else given
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise TypeError(f"`{field}` must be 'all', a number or a list of numbers, got {given!r}")
    numbers = tuple(several)
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"`{field}` must be 'all', a number or a list of numbers, got {given!r}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"`{field}` (={list(numbers)}) names a {what} twice")
    return numbers


def _one_of(field: str, value: object, known: Collection[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"`{field}` (={value!r}) must be one of {', '.join(map(repr, known))}")


def _number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise TypeError(f"`{field}` must be a finite number, got {value!r}")
