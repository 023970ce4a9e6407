"""Principal angles between the subspaces that adapters, or their groups, edit.

Shape suffixes: D = width, R = dimensions of a subspace, K = those of the smaller of two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlreft.causal import BoundlessDAS
from vlreft.edit import Edit, Rotated
from vlreft.interventions import VTI, NodiReFT, NoReFT, Vector
from vlreft.reft import Reft


@dataclass(frozen=True, eq=False)
class Angles:
    """The principal angles between two subspaces of one module's states, in degrees, smallest first.

    degrees_K: 0 is a direction that both edit, 90 one of either that the other leaves alone. `positions` and `head` say
    which of the interventions at the module it is, `head` None where these are not of single heads.
    """

    site: str
    layer: int
    component: str
    head: int | None
    positions: str
    degrees_K: Tensor

    def __str__(self) -> str:
        """Write one line."""
        component = "" if self.component == "output" else f" {self.component}"
        head = "" if self.head is None else f" {self.head}"
        degrees = " ".join(f"{angle:.1f}" for angle in self.degrees_K.tolist())
        return f"site '{self.site}' layer {self.layer}{component}{head}, {self.positions}: {degrees} degrees"


Part = Reft | tuple[Reft, str]


def principal_angles(first: Part, second: Part) -> list[Angles]:
    """Return the angles between what two adapters edit: one for each module and positions that both have.

    Each is a `Reft`, or one of its groups as `(reft, "name")`; both may be of the same adapter. The subspace is the one
    that an edit moves the state in: that of the rows of R, or of V where that is free, or of the vector; of boundless
    DAS, its learned width. Two random subspaces of a large width are nearly at 90 degrees everywhere. Computed in
    float64, from cosines and sines (as Knyazev and Argentati 2002), so that small angles are exact too.

    Raises ValueError where nothing is shared, a group is unknown, or an edit has no subspace (RED, interchange).
    """
    ours, theirs = _subspaces(first), _subspaces(second)
    shared = [place for place in ours if place in theirs]
    if not shared:
        raise ValueError(
            f"the two adapters share no module and positions: {_listed(ours)} against {_listed(theirs)}; angles are "
            "between edits of one place"
        )
    angles = []
    for place in shared:
        if ours[place].shape[1] != theirs[place].shape[1]:
            widths = (ours[place].shape[1], theirs[place].shape[1])
            raise ValueError(f"{_listed([place])} is of width {widths[0]} in one model and {widths[1]} in the other")
        angles.append(Angles(*place, angles_between(ours[place], theirs[place])))
    return angles


def angles_between(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """Return the principal angles between the spans of the rows, in degrees, ascending: as many as the smaller has.

    Shapes: a_RD and b_RD of any number of rows each -> (K,) float64 on the CPU. Rows that add no direction to others
    are not counted.
    """
    large_RD, small_RD = sorted((_basis(a_RD), _basis(b_RD)), key=len, reverse=True)
    cross_RR = small_RD @ large_RD.mT
    cosines_K = torch.linalg.svdvals(cross_RR)[: len(small_RD)]
    sines_K = torch.linalg.svdvals(small_RD - cross_RR @ large_RD).flip(0)
    return torch.rad2deg(torch.atan2(sines_K, cosines_K))


def _basis(a_RD: Tensor) -> Tensor:
    a_RD = a_RD.detach().to("cpu", torch.float64)
    _, sizes_R, rows_RD = torch.linalg.svd(a_RD, full_matrices=False)
    # Numbers that were learned in float32 span no direction that is this much smaller than another.
    return rows_RD[sizes_R > sizes_R.max() * torch.finfo(torch.float32).eps * max(a_RD.shape)]


_Place = tuple[str, int, str, int | None, str]  # the first fields of `Angles`


def _subspaces(part: Part) -> dict[_Place, Tensor]:
    """Return the rows that span each edit's subspace, by its place, in the config's order."""
    reft, group = part if isinstance(part, tuple) else (part, None)
    found: dict[_Place, Tensor] = {}
    known: set[str] = set()
    for key, edit in reft.edits.items():
        assert isinstance(edit, Edit)
        number, _, layer, rest = key.split(":", 3)
        item = reft.config.interventions[int(number)]
        head, positions = ("", rest) if item.component == "output" else rest.split(":", 1)
        head = head.removeprefix(item.component)
        where = f"{item.parsed_positions.segment}:{positions}"
        place = (item.site, int(layer), item.component, int(head) if head else None, where)
        known |= set(edit.groups)
        if group is not None and group not in edit.groups:
            continue
        rows_RD = _rows_of(edit, place)
        # Several at one place move the state in the sum of their subspaces.
        taken_RD = rows_RD if group is None else rows_RD[edit.dimensions_of((group,))]
        found[place] = torch.cat([found[place], taken_RD]) if place in found else taken_RD
    if group is not None and group not in known:
        raise ValueError(f"the adapter '{reft.name}' has no group '{group}'; its groups are {sorted(known)}")
    return found


@torch.no_grad()
def _rows_of(edit: Edit, place: _Place) -> Tensor:
    match edit:
        case BoundlessDAS():
            rows_RD = edit.orthonormal_rotation(edit.rotation)[: edit.num_dimensions]
        case Rotated():
            rows_RD = edit.orthonormal_rotation(edit.rotation)
        case NoReFT() | NodiReFT():
            rows_RD = edit.projection
        case Vector() | VTI():
            rows_RD = edit.vector[None]
        case _:
            raise ValueError(f"{type(edit).__name__} at {_listed([place])} moves the state in no subspace of its own")
    if not rows_RD.any():
        raise ValueError(f"{type(edit).__name__} at {_listed([place])} has no direction yet: all its numbers are zero")
    return rows_RD


def _listed(places: list[_Place] | dict[_Place, Tensor]) -> str:
    names = [f"site '{place[0]}' layer {place[1]} ({place[4]})" for place in list(places)[:3]]
    return ", ".join(names) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
