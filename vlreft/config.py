"""`Intervention` and `ReftConfig`: what to learn where, as frozen, validated data, JSON both ways."""

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

from vlreft.edit import ACTIVATIONS, Edit
from vlreft.interventions import INTERVENTIONS
from vlreft.models.components import COMPONENTS
from vlreft.positions import Positions, parse_positions

INITS = ("identity", "reference")
MAX_LISTED = 100_000  # layers, heads, names or interventions; a list may come from a stranger, or never end
# 2 added `component`, `heads` and `modules_to_save`, 3 `groups`; older files are read, what they lack has its default.
FORMAT_VERSION = 3
SINCE_VERSION = {2: frozenset({"component", "heads"}), 3: frozenset({"groups"})}


@dataclass(frozen=True)
class Intervention:
    """One kind of edit, at one site, on some layers and positions.

    method: a row of `vlreft.interventions.INTERVENTIONS`: "loreft", "direft", "noreft", "nodireft", "consreft",
        "lobireft", "red"; "vector" and "vti", which `vlreft.steer` can find without training; and "interchange", "das"
        and "boundless_das", which act inside `reft.sources(...)`.
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
    groups: names of equal shares of the rank, that `reft.groups(...)` lets act, and train, apart; their subspaces are
        orthogonal. Low-rank methods only.

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
    groups: Sequence[str] = ()

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
            width,
            self.rank,
            init=self.init,
            activation=self.activation,
            dropout=self.dropout,
            scale=self.scale,
            groups=tuple(self.groups),
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
        object.__setattr__(self, "groups", _names("groups", self.groups))
        if self.groups and (self.rank is None or self.rank % len(self.groups)):
            raise ValueError(
                f"`groups` (={list(self.groups)}) share `rank` (={self.rank}) equally: give a low-rank method a rank "
                f"that is a multiple of {len(self.groups)}"
            )
        if self.activation is not None and not method.uses_activation:
            raise ValueError(f"method '{self.method}' has no source to put `activation` (='{self.activation}') on")
        if self.dropout and not method.uses_dropout:
            raise ValueError(f"method '{self.method}' has nothing to train, so leave `dropout` (={self.dropout}) out")
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
        several = (
            (interventions,) if isinstance(interventions, Intervention) else _listed("interventions", interventions)
        )
        for number, item in enumerate(several):
            if not isinstance(item, Intervention):
                raise TypeError(f"item {number} of ReftConfig must be a vlreft.Intervention, got {item!r}")
        if not several:
            raise ValueError("ReftConfig needs at least one vlreft.Intervention")
        object.__setattr__(self, "interventions", several)
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", modules_to_save))

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
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"`format_version` (={version!r}) is none of 1 to {FORMAT_VERSION}; it was made by another vlreft"
            )
        keys = {"format_version", "interventions"} | ({"modules_to_save"} if version > 1 else set())
        if surplus := sorted(set(data) - keys):
            raise ValueError(f"a ReftConfig has no keys {surplus}")
        if not isinstance(modules := data.get("modules_to_save", [] if version == 1 else None), list):
            raise ValueError("a ReftConfig needs a list under 'modules_to_save'")
        later = {name for since, names in SINCE_VERSION.items() if since > version for name in names}
        known = {field.name for field in fields(Intervention)} - later
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


def _names(field: str, given: object) -> tuple[str, ...]:
    several = (given,) if isinstance(given, str) else given
    names = _listed(field, several) if isinstance(several, Iterable) else ()
    if not isinstance(several, Iterable) or any(not isinstance(name, str) or not name for name in names):
        example = {"modules_to_save": "names or paths of modules, e.g. ['classifier']"}.get(field, "names")
        raise TypeError(f"`{field}` must be {example}, got {given!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"`{field}` (={list(names)}) names one twice")
    return names


def _numbers(field: str, what: str, given: object) -> str | tuple[int, ...]:
    """Return "all" or a tuple of numbers without repetition."""
    if isinstance(given, str) and given == "all":
        return "all"
    several = (given,) if isinstance(given, int) else given
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise TypeError(f"`{field}` must be 'all', a number or a list of numbers, got {given!r}")
    numbers = _listed(field, several)
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"`{field}` must be 'all', a number or a list of numbers, got {given!r}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"`{field}` (={list(numbers)}) names a {what} twice")
    return numbers


def _listed(field: str, several: Iterable[Any]) -> tuple[Any, ...]:
    """Return what something yields. Raises ValueError for more than anybody can mean."""
    items = tuple(islice(several, MAX_LISTED + 1))
    if len(items) > MAX_LISTED:
        raise ValueError(f"`{field}` lists more than {MAX_LISTED:,}; give fewer, or 'all' where that is one of them")
    return items


def _one_of(field: str, value: object, known: Collection[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"`{field}` (={value!r}) must be one of {', '.join(map(repr, known))}")


def _number(field: str, value: object) -> None:
    # A whole number may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise TypeError(f"`{field}` must be a finite number, got {value!r}")
