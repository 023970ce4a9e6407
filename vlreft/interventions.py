"""Interventions: pure modules `h -> h` over hidden states, and the one table of them.

Shape suffixes: N = any leading dimensions (batch and positions), D = hidden width, R = rank.

Every intervention is `h + scale * dropout(delta(h))`, computed in float32 (float64 for a float64 base) whatever the
base's dtype or an enclosing autocast says, and handed back in the base's dtype. Parameters count 2RD + R for the
low-rank input-dependent ones, as the papers count them (Wu et al. 2024, arXiv 2404.03592, tables 1-4).

Names follow pyreft's classes, because checkpoints and papers' ablations are named after them. One name is a trap:
what the ReFT paper's text and AdapterHub call DiReFT, `h + V^T(Wh + b)` with a free V, is `nodireft` here and in
pyreft; `direft` here and in pyreft keeps R orthonormal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def orthonormal_rows(a_RD: Tensor) -> Tensor:
    """Return R with orthonormal rows that spans the rows of `a_RD`, differentiably.

    Shapes: a_RD -> R_RD. Cholesky QR, applied twice so that rounding of the first pass is removed by the second;
    everything that costs is R x R. The result does not change when `a_RD` is scaled, so weight decay cannot touch it.
    """
    for _ in range(2):
        gram_RR = a_RD @ a_RD.mT
        lower_RR = torch.linalg.cholesky_ex(gram_RR).L  # _ex: no device synchronisation for the error code
        a_RD = torch.linalg.solve_triangular(lower_RR, a_RD, upper=False)
    return a_RD


class Edit(nn.Module, ABC):
    """What an intervention computes; concrete classes are final and differ in `delta` and their parameters.

    `width` is the hidden width D of the site, `rank` the R of low-rank edits (None where the class has no rank),
    `activation` a key of `ACTIVATIONS` or None, `init` is "identity" (the base's outputs do not change at the start)
    or "reference" (pyreft's start).
    """

    uses_rank: ClassVar[bool] = True
    uses_activation: ClassVar[bool] = False
    has_identity: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        rank: int | None,
        *,
        init: str = "identity",
        activation: str | None = None,
        dropout: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.activation = activation
        self.make_parameters(width, rank or 0)
        self.start(identity=init == "identity")

    @abstractmethod
    def make_parameters(self, width: int, rank: int) -> None:
        """Create the parameters, unset."""

    @abstractmethod
    def start(self, *, identity: bool) -> None:
        """Set the parameters to their start values, drawn from torch's generator."""

    @abstractmethod
    def delta(self, h_ND: Tensor) -> Tensor:
        """Return the edit, shape `(N, D)`, of a hidden state in the compute dtype."""

    def forward(self, h_ND: Tensor) -> Tensor:
        """Return the edited hidden state, same shape, dtype and device."""
        compute = torch.promote_types(h_ND.dtype, torch.float32)
        with torch.autocast(h_ND.device.type, enabled=False):
            x_ND = h_ND.to(compute)
            delta_ND = F.dropout(self.delta(x_ND), self.dropout, self.training)
            return (x_ND + self.scale * delta_ND).to(h_ND.dtype)

    def extra_repr(self) -> str:
        """Show shapes and settings when printed."""
        shapes = ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())
        return f"{shapes}, activation={self.activation}, dropout={self.dropout}, scale={self.scale}"

    def act(self, x: Tensor) -> Tensor:
        """Apply the chosen activation, if any."""
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def _linear_start(weight_RD: Tensor, bias_R: Tensor | None) -> None:
    """Draw like `torch.nn.Linear`, which is pyreft's start: uniform in +-1/sqrt(D)."""
    bound = weight_RD.shape[1] ** -0.5
    nn.init.uniform_(weight_RD, -bound, bound)
    if bias_R is not None:
        nn.init.uniform_(bias_R, -bound, bound)


class _Rotated(Edit):
    """An edit inside the subspace of R = `orthonormal_rows(rotation)`; abstract."""

    rotation: nn.Parameter

    def orthonormal_rotation(self, like: Tensor) -> Tensor:
        """Return R in the dtype of `like`; its rows are orthonormal whatever the optimiser did to `rotation`."""
        return orthonormal_rows(self.rotation.to(like.dtype))


class LoReFT(_Rotated):
    """`h + R^T(act(Wh + b) - Rh)`, R with orthonormal rows.

    Source: ReFT paper, equation 2; pyreft `LoreftIntervention`. Differs: R by Cholesky QR of a thin matrix (no D x D
    buffer, safe under weight decay); dropout on the edit; `(W - R)h` fused where there is no activation.
    """

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, weight_RD, bias_R."""
        self.rotation, self.weight, self.bias = _empty(rank, width), _empty(rank, width), _empty(rank)

    @torch.no_grad()
    def start(self, *, identity: bool) -> None:
        """Random subspace; identity: W = R, b = 0."""
        nn.init.orthogonal_(self.rotation)
        _linear_start(self.weight, self.bias)
        if identity:
            self.weight.copy_(self.orthonormal_rotation(self.weight))
            self.bias.zero_()

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return R^T(act(Wh + b) - Rh)."""
        r_RD, w_RD, b_R = self.orthonormal_rotation(h_ND), self.weight.to(h_ND.dtype), self.bias.to(h_ND.dtype)
        if self.activation is None:
            return F.linear(h_ND, w_RD - r_RD, b_R) @ r_RD
        return (self.act(F.linear(h_ND, w_RD, b_R)) - F.linear(h_ND, r_RD)) @ r_RD


class DiReFT(_Rotated):
    """`h + R^T act(Wh + b)`, R with orthonormal rows: pyreft's `DireftIntervention`.

    The paper's section 3.2 (and AdapterHub) call the free, non-orthogonal form DiReFT: that is `NodiReFT`.
    """

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, weight_RD, bias_R."""
        self.rotation, self.weight, self.bias = _empty(rank, width), _empty(rank, width), _empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random subspace; identity: W = 0, b = 0."""
        nn.init.orthogonal_(self.rotation)
        _linear_start(self.weight, self.bias)
        if identity:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return R^T act(Wh + b)."""
        source_NR = self.act(F.linear(h_ND, self.weight.to(h_ND.dtype), self.bias.to(h_ND.dtype)))
        return source_NR @ self.orthonormal_rotation(h_ND)


class NoReFT(Edit):
    """`h + V^T(act(Wh + b) - Vh)`, V free: pyreft's `NoreftIntervention` without its redundant second bias."""

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create projection_RD (V), weight_RD, bias_R."""
        self.projection, self.weight, self.bias = _empty(rank, width), _empty(rank, width), _empty(rank)

    @torch.no_grad()
    def start(self, *, identity: bool) -> None:
        """Random V; identity: W = V, b = 0."""
        _linear_start(self.projection, None)
        _linear_start(self.weight, self.bias)
        if identity:
            self.weight.copy_(self.projection)
            self.bias.zero_()

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return V^T(act(Wh + b) - Vh)."""
        v_RD, w_RD, b_R = (p.to(h_ND.dtype) for p in (self.projection, self.weight, self.bias))
        if self.activation is None:
            return F.linear(h_ND, w_RD - v_RD, b_R) @ v_RD
        return (self.act(F.linear(h_ND, w_RD, b_R)) - F.linear(h_ND, v_RD)) @ v_RD


class NodiReFT(Edit):
    """`h + V^T act(Wh + b)`, V free: the paper's and AdapterHub's DiReFT, pyreft's `NodireftIntervention`."""

    uses_activation = True

    def make_parameters(self, width: int, rank: int) -> None:
        """Create projection_RD (V), weight_RD, bias_R."""
        self.projection, self.weight, self.bias = _empty(rank, width), _empty(rank, width), _empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random V; identity: W = 0, b = 0."""
        _linear_start(self.projection, None)
        _linear_start(self.weight, self.bias)
        if identity:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return V^T act(Wh + b)."""
        source_NR = self.act(F.linear(h_ND, self.weight.to(h_ND.dtype), self.bias.to(h_ND.dtype)))
        return source_NR @ self.projection.to(h_ND.dtype)


class ConsReFT(_Rotated):
    """`h + R^T(b - Rh)`: a constant written into the subspace. It has no identity start. Source: paper, table 4."""

    has_identity = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, bias_R."""
        self.rotation, self.bias = _empty(rank, width), _empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random subspace, b uniform in [0, 1) as in pyreft."""
        nn.init.orthogonal_(self.rotation)
        nn.init.uniform_(self.bias, 0.0, 1.0)

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return R^T(b - Rh)."""
        r_RD = self.orthonormal_rotation(h_ND)
        return (self.bias.to(h_ND.dtype) - F.linear(h_ND, r_RD)) @ r_RD


class LobiReFT(_Rotated):
    """`h + R^T b`: a low-rank bias. Source: paper, table 4."""

    def make_parameters(self, width: int, rank: int) -> None:
        """Create rotation_RD, bias_R."""
        self.rotation, self.bias = _empty(rank, width), _empty(rank)

    def start(self, *, identity: bool) -> None:
        """Random subspace, b uniform in [0, 1) as in pyreft; identity: b = 0."""
        nn.init.orthogonal_(self.rotation)
        nn.init.uniform_(self.bias, 0.0, 1.0)
        if identity:
            nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return R^T b, the same for every position."""
        return (self.bias.to(h_ND.dtype) @ self.orthonormal_rotation(h_ND)).expand_as(h_ND)


class RED(Edit):
    """`s * h + b`, elementwise, 2D numbers. Source: representation editing, arXiv 2402.15179, equation 3."""

    uses_rank = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create gain_D (s) and bias_D."""
        self.gain, self.bias = _empty(width), _empty(width)

    def start(self, *, identity: bool) -> None:
        """s = 1, b = 0, which is the paper's start as well."""
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.bias)

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return (s - 1) * h + b."""
        return (self.gain.to(h_ND.dtype) - 1.0) * h_ND + self.bias.to(h_ND.dtype)


class Vector(Edit):
    """`h + v`: a plain steering vector, D numbers."""

    uses_rank = False

    def make_parameters(self, width: int, rank: int) -> None:
        """Create vector_D."""
        self.vector = _empty(width)

    def start(self, *, identity: bool) -> None:
        """v = 0."""
        nn.init.zeros_(self.vector)

    def delta(self, h_ND: Tensor) -> Tensor:
        """Return v, the same for every position."""
        return self.vector.to(h_ND.dtype).expand_as(h_ND)


INTERVENTIONS: dict[str, type[Edit]] = {
    "loreft": LoReFT,
    "direft": DiReFT,
    "noreft": NoReFT,
    "nodireft": NodiReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "red": RED,
    "vector": Vector,
}
