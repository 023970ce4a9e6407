"""`Edit`: what an intervention is, a pure module `h -> h` over hidden states, and what the kinds of them share.

Shape suffixes: N = any leading dimensions (batch and positions), D = hidden width, R = rank.

Every intervention is `h + strength * scale * dropout(delta(h))` (or adds that in a way of its own, see `combine`),
computed in float32 (float64 for a float64 base) whatever the base's dtype or an enclosing autocast says, and handed
back in the base's dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

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
    Row i depends on the rows up to i alone.
    """
    return _CholeskyQR.apply(a_RD)[0]


class _CholeskyQR(torch.autograd.Function):
    """A = LR, L lower triangular, with the gradient of the LQ decomposition: torch's own goes back through both passes.

    Of R alone it is L^-T (dR - sym(dR R^T) R), where sym mirrors the lower triangle. Source: Seeger et al.,
    Auto-Differentiating Linear Algebra (arXiv 1710.08717), on LQ.
    """

    @staticmethod
    def forward(ctx: Any, a_RD: Tensor) -> tuple[Tensor, Tensor]:
        lower_RR, r_RD = _orthogonalised(a_RD)
        again_RR, r_RD = _orthogonalised(r_RD)
        lower_RR = lower_RR @ again_RR
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r_RD, lower_RR)
        return r_RD, lower_RR

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Tensor | None:
        (grad_RD, grad_RR), (r_RD, lower_RR) = grad_outputs, ctx.saved_tensors
        grad_RD = torch.zeros_like(r_RD) if grad_RD is None else grad_RD
        inner_RR = -grad_RD @ r_RD.mT
        if grad_RR is not None:  # in a second derivative alone
            inner_RR = inner_RR + lower_RR.mT @ grad_RR
        sym_RR = inner_RR.tril() + inner_RR.tril(-1).mT
        return torch.linalg.solve_triangular(lower_RR.mT, grad_RD + sym_RR @ r_RD, upper=True)


def _orthogonalised(a_RD: Tensor) -> tuple[Tensor, Tensor]:
    lower_RR = torch.linalg.cholesky_ex(a_RD @ a_RD.mT).L  # _ex: no device synchronisation for the error code
    return lower_RR, torch.linalg.solve_triangular(lower_RR, a_RD, upper=False)


class Edit(nn.Module, ABC):
    """What an intervention computes; concrete classes are final and differ in `delta` and their parameters.

    `width` is the hidden width D of the site, `rank` the R of low-rank edits (None where the class has no rank),
    `activation` a key of `ACTIVATIONS` or None, `init` is "identity" (the base's outputs do not change at the start)
    or "reference" (pyreft's start), `groups` names equal shares of the rank, which can act apart.
    """

    uses_rank: ClassVar[bool] = True
    uses_activation: ClassVar[bool] = False
    uses_dropout: ClassVar[bool] = True
    has_identity: ClassVar[bool] = True
    # Whether it puts in the states of another run, a source: `delta` is then of the source minus the hidden state.
    uses_source: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        rank: int | None,
        *,
        init: str = "identity",
        activation: str | None = None,
        dropout: float = 0.0,
        scale: float = 1.0,
        groups: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.activation = activation
        self.groups = groups
        self.rank = rank or 0
        self.make_parameters(width, self.rank)
        self.start(identity=init == "identity")

    @abstractmethod
    def make_parameters(self, width: int, rank: int) -> None:
        """Create the parameters, unset."""

    @abstractmethod
    def start(self, *, identity: bool) -> None:
        """Set the parameters to their start values, drawn from torch's generator."""

    @abstractmethod
    def delta(self, h_ND: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return the edit, shape `(N, D)`, of a hidden state in the compute dtype; `gate` scales the R dimensions."""

    def combine(self, h_ND: Tensor, delta_ND: Tensor) -> Tensor:
        """Return the edited state from the state and its edit, strength and all."""
        return h_ND + delta_ND

    def forward(
        self,
        h_ND: Tensor,
        strength: float | Tensor = 1.0,
        source_ND: Tensor | None = None,
        groups: Mapping[str, float | Tensor] | None = None,
    ) -> Tensor:
        """Return the edited hidden state, same shape, dtype and device.

        `strength` and those of `groups` are numbers or tensors that broadcast over h; groups not named are off.
        """
        compute = torch.promote_types(h_ND.dtype, torch.float32)
        with torch.autocast(h_ND.device.type, enabled=False):
            x_ND = h_ND.to(compute)
            seen_ND = x_ND if source_ND is None else source_ND.to(compute) - x_ND
            gate = None if groups is None or not self.groups else self._gate(groups, x_ND)
            delta_ND = F.dropout(self.delta(seen_ND, gate), self.dropout, self.training)
            factor = self.scale * strength
            if isinstance(factor, Tensor) or factor != 1.0:
                delta_ND = factor * delta_ND
            return self.combine(x_ND, delta_ND).to(h_ND.dtype)

    def _gate(self, groups: Mapping[str, float | Tensor], like: Tensor) -> Tensor:
        """Return the strength of each of the R dimensions, shape (..., R)."""
        size = self.rank // len(self.groups)
        strengths = [torch.as_tensor(groups.get(name, 0.0)).to(like) for name in self.groups]
        shares = [(s[..., 0] if s.dim() else s)[..., None] for s in strengths]
        shares = torch.broadcast_tensors(*shares)
        return torch.cat([share.expand(*share.shape[:-1], size) for share in shares], -1)

    def dimensions_of(self, groups: Collection[str]) -> list[int]:
        """Return which of the R dimensions belong to some groups."""
        size = self.rank // len(self.groups)
        return [
            number * size + place for number, name in enumerate(self.groups) if name in groups for place in range(size)
        ]

    def extra_repr(self) -> str:
        """Show shapes and settings when printed."""
        shapes = ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())
        return f"{shapes}, activation={self.activation}, dropout={self.dropout}, scale={self.scale}"

    def act(self, x: Tensor) -> Tensor:
        """Apply the chosen activation, if any."""
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


def gated(source_NR: Tensor, gate: Tensor | None) -> Tensor:
    """Scale the R dimensions of an edit inside its subspace."""
    return source_NR if gate is None else source_NR * gate


def empty(*shape: int) -> nn.Parameter:
    """Make an unset float32 parameter."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def linear_start(weight_RD: Tensor, bias_R: Tensor | None) -> None:
    """Draw like `torch.nn.Linear`, which is pyreft's start: uniform in +-1/sqrt(D)."""
    bound = weight_RD.shape[1] ** -0.5
    nn.init.uniform_(weight_RD, -bound, bound)
    if bias_R is not None:
        nn.init.uniform_(bias_R, -bound, bound)


class Rotated(Edit):
    """An edit inside the subspace of R = `orthonormal_rows(rotation)`; abstract."""

    rotation: nn.Parameter

    def orthonormal_rotation(self, like: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return R in the dtype of `like`; its rows are orthonormal whatever the optimiser did to `rotation`.

        Rows that are gated off get no gradient, also not through the rows behind them, which are orthogonal to them.
        """
        rotation_RD = self.rotation.to(like.dtype)
        if gate is not None and self.rotation.requires_grad:
            is_on_R1 = (gate != 0).reshape(-1, gate.shape[-1]).any(0)[:, None]
            rotation_RD = torch.where(is_on_R1, rotation_RD, rotation_RD.detach())
        return orthonormal_rows(rotation_RD)

    @torch.no_grad()
    def straighten(self) -> None:
        """Write R into `rotation`, unless it is that already within rounding: the same edit, by other numbers."""
        gram_RR = self.rotation @ self.rotation.mT
        if not torch.allclose(gram_RR, torch.eye(len(gram_RR)).to(gram_RR), rtol=0.0, atol=1e-5):
            self.rotation.copy_(orthonormal_rows(self.rotation))
