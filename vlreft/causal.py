"""Interchange interventions: the states of another run, the source, put in place of the base's own.

Shape suffixes: N = any leading dimensions, D = hidden width, R = rank.

All are linear in the source minus the hidden state, `d = s - h`, which is what their `delta` is given (`uses_source`).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlreft.edit import Edit, Rotated, empty, gated


class Interchange(Edit):
    """`s`: the source's state as a whole, which is activation patching; no numbers, nothing to train."""

    uses_rank = False
    uses_dropout = False
    has_identity = False
    uses_source = True

    def make_parameters(self, width: int, rank: int) -> None:
        """There are none."""

    def start(self, *, identity: bool) -> None:
        """There is nothing to set."""

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return the difference as it is."""
        return h_ND

    def forward(
        self,
        h_ND: Tensor,
        strength: float | Tensor = 1.0,
        source_ND: Tensor | None = None,
        groups: Mapping[str, float | Tensor] | None = None,
    ) -> Tensor:
        """Return h + strength * scale * (s - h): at 1 the very numbers of the source, which adding d would round."""
        if source_ND is None:
            raise ValueError("an interchange needs the states of a source: use `with reft.sources(batch)`")
        compute = torch.promote_types(h_ND.dtype, torch.float32)
        weight = torch.as_tensor(self.scale * strength, dtype=compute, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            return torch.lerp(h_ND.to(compute), source_ND.to(compute), weight).to(h_ND.dtype)


class DAS(Rotated):
    """`h + R^T(Rs - Rh)`, R with orthonormal rows: interchange inside a learned subspace.

    Source: distributed alignment search, Geiger et al. 2023, arXiv 2303.02536; ReFT paper, equation 1. Differs from
    pyvene's `LowRankRotatedSpaceIntervention` as LoReFT does: no D x D buffer, no parametrization.
    """

    has_identity = False
    uses_source = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD."""
        self.rotation = empty(rank, width)

    def start(self, *, identity: bool) -> None:
        """Random subspace."""
        nn.init.orthogonal_(self.rotation)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return R^T R d."""
        r_RD = self.orthonormal_rotation(h_ND, gate)
        return gated(F.linear(h_ND, r_RD), gate) @ r_RD


class BoundlessDAS(Rotated):
    """`h + Q^T(m * (Qs - Qh))`: interchange inside the first dimensions of a learned basis Q; how many is learned too.

    Source: Wu et al. 2023, arXiv 2305.08809. D^2 + 1 numbers. In training m is soft, the sigmoid of a dimension's
    distance to `boundary * D`, counted from its middle, over `temperature`, which `vlreft.BoundlessSchedule` lowers; in
    evaluation it is hard: the first round(boundary * D) dimensions, at least one, which is what the soft m
    becomes. Differs: the paper and pyvene 0.1.8 multiply by the sigmoid of the distance to 0, which keeps the first
    dimensions soft (there the learned width was one too large on a toy model in 3 of 3 runs, here in none), and pyvene
    is soft in evaluation too; the temperature is no parameter, so that an adapter is its numbers alone.
    """

    uses_rank = False
    has_identity = False
    uses_source = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_DD and boundary_1, in shares of the width."""
        self.rotation, self.boundary = empty(width, width), empty(1)
        self.temperature = 50.0

    def start(self, *, identity: bool) -> None:
        """Random basis, half of its dimensions."""
        nn.init.orthogonal_(self.rotation)
        nn.init.constant_(self.boundary, 0.5)

    @property
    def num_dimensions(self) -> int:
        """How many dimensions of the basis are interchanged in evaluation."""
        width = self.rotation.shape[0]
        return min(width, max(1, round(float(self.boundary.detach()) * width)))

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return Q^T(m * Qd)."""
        q_DD = self.orthonormal_rotation(h_ND)
        width = q_DD.shape[0]
        place_D = torch.arange(width, device=h_ND.device, dtype=h_ND.dtype) + 0.5
        end_1 = self.boundary.to(h_ND.dtype).clamp(0.0, 1.0) * width
        if self.training:
            mask_D = torch.sigmoid((end_1 - place_D) / self.temperature)
        else:
            mask_D = (place_D < torch.round(end_1).clamp_min(1.0)).to(h_ND.dtype)
        return (F.linear(h_ND, q_DD) * mask_D) @ q_DD
