"""Interventions: the edits that are learned or found, and the one table of all of them.

Shape suffixes: N = any leading dimensions (batch and positions), D = hidden width, R = rank.

Parameters count 2RD + R for the low-rank input-dependent ones, as the papers count them (Wu et al. 2024, arXiv
2404.03592, tables 1-4).

Names follow pyreft's classes, because checkpoints and papers' ablations are named after them. One name is a trap:
what the ReFT paper's text and AdapterHub call DiReFT, `h + V^T(Wh + b)` with a free V, is `nodireft` here and in
pyreft; `direft` here and in pyreft keeps R orthonormal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlreft.causal import DAS, BoundlessDAS, Interchange
from vlreft.edit import Edit, Rotated, empty, gated, linear_start


class LoReFT(Rotated):
    """`h + R^T(act(Wh + b) - Rh)`, R with orthonormal rows.

    Source: ReFT paper, equation 2; pyreft `LoreftIntervention`. Differs: R by Cholesky QR of a thin matrix (no D x D
    buffer, safe under weight decay); dropout on the edit; `(W - R)h` fused where there is no activation.
    """

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, weight_RD, bias_R."""
        self.rotation, self.weight, self.bias = empty(rank, width), empty(rank, width), empty(rank)

    @torch.no_grad()
    def start(self, *, identity: bool) -> None:
        """Random subspace; identity: W = R, b = 0."""
        nn.init.orthogonal_(self.rotation)
        linear_start(self.weight, self.bias)
        if identity:
            self.weight.copy_(self.orthonormal_rotation(self.weight))
            self.bias.zero_()

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return R^T(act(Wh + b) - Rh)."""
        r_RD, w_RD, b_R = self.orthonormal_rotation(h_ND, gate), self.weight.to(h_ND.dtype), self.bias.to(h_ND.dtype)
        if self.activation is None:
            return gated(F.linear(h_ND, w_RD - r_RD, b_R), gate) @ r_RD
        return gated(self.act(F.linear(h_ND, w_RD, b_R)) - F.linear(h_ND, r_RD), gate) @ r_RD


class DiReFT(Rotated):
    """`h + R^T act(Wh + b)`, R with orthonormal rows: pyreft's `DireftIntervention`.

    The paper's section 3.2 (and AdapterHub) call the free, non-orthogonal form DiReFT: that is `NodiReFT`.
    """

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, weight_RD, bias_R."""
        self.rotation, self.weight, self.bias = empty(rank, width), empty(rank, width), empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random subspace; identity: W = 0, b = 0."""
        nn.init.orthogonal_(self.rotation)
        linear_start(self.weight, self.bias)
        if identity:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return R^T act(Wh + b)."""
        source_NR = self.act(F.linear(h_ND, self.weight.to(h_ND.dtype), self.bias.to(h_ND.dtype)))
        return gated(source_NR, gate) @ self.orthonormal_rotation(h_ND, gate)


class NoReFT(Edit):
    """`h + V^T(act(Wh + b) - Vh)`, V free: pyreft's `NoreftIntervention` without its redundant second bias."""

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create projection_RD (V), weight_RD, bias_R."""
        self.projection, self.weight, self.bias = empty(rank, width), empty(rank, width), empty(rank)

    @torch.no_grad()
    def start(self, *, identity: bool) -> None:
        """Random V; identity: W = V, b = 0."""
        linear_start(self.projection, None)
        linear_start(self.weight, self.bias)
        if identity:
            self.weight.copy_(self.projection)
            self.bias.zero_()

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return V^T(act(Wh + b) - Vh)."""
        v_RD, w_RD, b_R = (p.to(h_ND.dtype) for p in (self.projection, self.weight, self.bias))
        if self.activation is None:
            return gated(F.linear(h_ND, w_RD - v_RD, b_R), gate) @ v_RD
        return gated(self.act(F.linear(h_ND, w_RD, b_R)) - F.linear(h_ND, v_RD), gate) @ v_RD


class NodiReFT(Edit):
    """`h + V^T act(Wh + b)`, V free: the paper's and AdapterHub's DiReFT, pyreft's `NodireftIntervention`."""

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create projection_RD (V), weight_RD, bias_R."""
        self.projection, self.weight, self.bias = empty(rank, width), empty(rank, width), empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random V; identity: W = 0, b = 0."""
        linear_start(self.projection, None)
        linear_start(self.weight, self.bias)
        if identity:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return V^T act(Wh + b)."""
        source_NR = self.act(F.linear(h_ND, self.weight.to(h_ND.dtype), self.bias.to(h_ND.dtype)))
        return gated(source_NR, gate) @ self.projection.to(h_ND.dtype)


class ConsReFT(Rotated):
    """`h + R^T(b - Rh)`: a constant written into the subspace. It has no identity start. Source: paper, table 4."""

    has_identity = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, bias_R."""
        self.rotation, self.bias = empty(rank, width), empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random subspace, b uniform in [0, 1) as in pyreft."""
        nn.init.orthogonal_(self.rotation)
        nn.init.uniform_(self.bias, 0.0, 1.0)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return R^T(b - Rh)."""
        r_RD = self.orthonormal_rotation(h_ND, gate)
        return gated(self.bias.to(h_ND.dtype) - F.linear(h_ND, r_RD), gate) @ r_RD


class LobiReFT(Rotated):
    """`h + R^T b`: a low-rank bias. Source: paper, table 4."""

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, bias_R."""
        self.rotation, self.bias = empty(rank, width), empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random subspace, b uniform in [0, 1) as in pyreft; identity: b = 0."""
        nn.init.orthogonal_(self.rotation)
        nn.init.uniform_(self.bias, 0.0, 1.0)
        if identity:
            nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return R^T b, the same for every position."""
        return (gated(self.bias.to(h_ND.dtype), gate) @ self.orthonormal_rotation(h_ND, gate)).expand_as(h_ND)


class RED(Edit):
    """`s * h + b`, elementwise, 2D numbers. Source: representation editing, arXiv 2402.15179, equation 3."""

    uses_rank = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create gain_D (s) and bias_D."""
        self.gain, self.bias = empty(width), empty(width)

    def start(self, *, identity: bool) -> None:
        """s = 1, b = 0, which is the paper's start as well."""
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return (s - 1) * h + b."""
        return (self.gain.to(h_ND.dtype) - 1.0) * h_ND + self.bias.to(h_ND.dtype)


class Vector(Edit):
    """`h + v`: a plain steering vector, D numbers."""

    uses_rank = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create vector_D."""
        self.vector = empty(width)

    def start(self, *, identity: bool) -> None:
        """v = 0."""
        nn.init.zeros_(self.vector)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return v, the same for every position."""
        return self.vector.to(h_ND.dtype).expand_as(h_ND)


class VTI(Edit):
    """`|h| * unit(unit(h) + v)`: a steering vector that keeps the length of the hidden state, D numbers.

    Source: visual and textual intervention, arXiv 2410.15778, and its code (shengliu66/VTI, `llm_layers.py`), where v
    is 0.1 * alpha times a unit direction: set `scale` to 0.1 * alpha, at `component="mlp"` of both towers. Differs: one
    direction for all patches of a layer, where the paper has one for each; written so that v = 0 is exactly the base.
    """

    uses_rank = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create vector_D."""
        self.vector = empty(width)

    def start(self, *, identity: bool) -> None:
        """v = 0."""
        nn.init.zeros_(self.vector)

    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return v, the same for every position."""
        return self.vector.to(h_ND.dtype).expand_as(h_ND)

    def combine(self, h_ND: Tensor, delta_ND: Tensor) -> Tensor:
        """Return (h + |h| v) / |unit(h) + v|, the length in the denominator by its square: 1 + 2 unit(h)v + vv."""
        length_N1 = h_ND.norm(dim=-1, keepdim=True)
        along_N1 = (h_ND * delta_ND).sum(-1, keepdim=True) / length_N1.clamp_min(torch.finfo(h_ND.dtype).tiny)
        square_N1 = 1.0 + 2.0 * along_N1 + (delta_ND * delta_ND).sum(-1, keepdim=True)
        return (h_ND + length_N1 * delta_ND) / square_N1.clamp_min(torch.finfo(h_ND.dtype).eps).sqrt()


INTERVENTIONS: dict[str, type[Edit]] = {
    "loreft": LoReFT,
    "direft": DiReFT,
    "noreft": NoReFT,
    "nodireft": NodiReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "red": RED,
    "vector": Vector,
    "vti": VTI,
    "interchange": Interchange,
    "das": DAS,
    "boundless_das": BoundlessDAS,
}
