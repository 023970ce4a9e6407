"""`Placed`: one intervention at one block, and how it edits the positions selected for it.

Shape suffixes: B = rows, T = tokens of a forward, P = selected slots, D = width, H and W = rows and columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlreft.interventions import Edit
from vlreft.positions import Positions, Selection


@dataclass(eq=False)
class Switch:
    """Whether one adapter acts."""

    on: bool = True


@dataclass(frozen=True, eq=False)
class Placed:
    """One intervention at one module.

    `part` is the position group it edits, None for all of them (tied); `span` the first and last (exclusive) number of
    the states' last dimension that it sees, None for all: a head's share.
    """

    switch: Switch
    edit: Edit
    positions: Positions
    part: int | None
    span: tuple[int, int] | None = None

    @property
    def num_slots(self) -> int | None:
        """The most positions per row, None if unknown before the batch."""
        selects = self.positions.selects if self.part is None else (self.positions.selects[self.part],)
        counts = [select.num_slots for select in selects]
        return None if None in counts else sum(count or 0 for count in counts)

    def join(self, masks: tuple[Tensor, ...]) -> Tensor:
        """Return the mask of this intervention's group from those of all parts."""
        if self.part is not None:
            return masks[self.part]
        joined = masks[0]
        for mask in masks[1:]:
            joined = joined | mask
        return joined

    def apply(self, h: Tensor, selection: Selection) -> Tensor:
        """Return `h` with the selected positions edited; never writes into `h`.

        Shapes: (B, T, D), (B, H, W, D) for a tower that keeps rows and columns, (T, D) for one that packs its images.
        Unselected states are kept from the edit: they may hold anything, even NaN at pads, and a NaN would reach the
        gradients through a product with zero.
        """
        if h.dim() == 2:
            return self.apply(h[None], selection)[0]
        if h.dim() == 4:
            return self.apply(h.flatten(1, 2), selection).reshape(h.shape)
        if self.span is not None:
            start, stop = self.span
            return torch.cat([h[..., :start], self._apply(h[..., start:stop], selection), h[..., stop:]], -1)
        return self._apply(h, selection)

    def _apply(self, h: Tensor, selection: Selection) -> Tensor:
        if selection.index_BP is None or selection.valid_BP is None:
            chosen_BT1 = selection.mask_BT[:, :, None]
            return torch.where(chosen_BT1, self.edit(torch.where(chosen_BT1, h, 0.0)), h)
        index_BPD = selection.index_BP[:, :, None].expand(-1, -1, h.shape[2])
        valid_BP1 = selection.valid_BP[:, :, None]
        h_BPD = h.gather(1, index_BPD)
        edited_BPD = torch.where(valid_BP1, self.edit(torch.where(valid_BP1, h_BPD, 0.0)), h_BPD)
        return h.scatter(1, index_BPD, edited_BPD)
