"""`Placed`: one intervention at one block, and how it edits the positions selected for it.

Shape suffixes: B = rows, T = tokens of a forward, P = selected slots, D = width, H and W = rows and columns, K = most
selected tokens of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlreft.edit import Edit
from vlreft.positions import Positions, Selection

Strength = float | Tensor  # a number for all rows, or a tensor_B of one for each


@dataclass(eq=False)
class Switch:
    """Whether and how one adapter acts in the forwards of now.

    order: the adapters of a module act by it, those of equal order as they were attached. groups: the strengths of
    those that act, None for all at 1. sources: what interchange interventions put in.
    reads: while not None, nothing is edited and the selected states are put there; of other positions if there are
    `read_positions`. records: while not None, each edit is put there.
    """

    on: bool = True
    is_frozen: bool = False
    order: int = 0
    strength: Strength = 1.0
    groups: Mapping[str, Strength] | None = None
    sources: "dict[Placed, States] | None" = None
    reads: "dict[Placed, States] | None" = None
    read_positions: Positions | None = None
    records: "list[tuple[Placed, Change]] | None" = None


class States(NamedTuple):
    """The selected states of each row, first ones first: states_BKD, and valid_BK, False behind a row's last one."""

    states_BKD: Tensor
    valid_BK: Tensor


class Change(NamedTuple):
    """What an edit did: which tokens it edited, by how much, and how long their states had been."""

    mask_BT: Tensor
    norm_BT: Tensor
    length_BT: Tensor


class Where(NamedTuple):
    """The place of an intervention: its number in the config, and its module."""

    number: int
    site: str
    layer: int
    component: str

    def __str__(self) -> str:
        """Name the module."""
        component = "" if self.component == "output" else f" {self.component}"
        return f"site '{self.site}' layer {self.layer}{component}"


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
    where: Where
    span: tuple[int, int] | None = None

    @property
    def selecting(self) -> "Placed":
        """What says which tokens are selected: this one, or while it reads, one with the positions to read."""
        if self.switch.reads is None or self.switch.read_positions is None:
            return self
        return replace(self, positions=self.switch.read_positions)

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

    def act(self, h: Tensor, selection: Selection) -> Tensor:
        """Return `h` edited; or, while its adapter is read, take the selected states down and leave `h` as it is."""
        switch = self.switch
        if switch.reads is None and switch.records is None:
            return self.apply(h, selection)
        seen_BTD = self._seen(h)
        if switch.reads is not None:
            switch.reads[self] = states_at(seen_BTD, selection)
            return h
        edited = self.apply(h, selection)
        if switch.records is not None:
            norm_BT = (self._seen(edited).float() - seen_BTD.float()).norm(dim=-1)
            change = Change(selection.mask_BT, norm_BT, seen_BTD.float().norm(dim=-1))
            switch.records.append((self, Change(*(tensor.detach().clone() for tensor in change))))
        return edited

    def apply(self, h: Tensor, selection: Selection) -> Tensor:
        """Return `h` with the selected positions edited; never writes into `h`.

        Shapes: (B, T, D), (B, H, W, D) for a tower that keeps rows and columns, (T, D) for one that packs its images.
        Unselected states are kept from the edit: they may hold anything, even NaN at pads, and a NaN would reach the
        gradients through a product with zero.
        """
        if h.dim() != 3:
            return self.apply(as_rows(h), selection).reshape(h.shape)
        if self.span is not None:
            start, stop = self.span
            return torch.cat([h[..., :start], self._apply(h[..., start:stop], selection), h[..., stop:]], -1)
        return self._apply(h, selection)

    def _seen(self, h: Tensor) -> Tensor:
        h_BTD = as_rows(h)
        return h_BTD if self.span is None else h_BTD[..., self.span[0] : self.span[1]]

    def _apply(self, h: Tensor, selection: Selection) -> Tensor:
        switch = self.switch
        strength = self._for_rows(switch.strength, h, selection)
        groups = {name: self._for_rows(of_group, h, selection) for name, of_group in (switch.groups or {}).items()}
        source_BTD = self._source(h, selection) if self.edit.uses_source else None
        how = _How(strength, None if switch.groups is None else groups, source_BTD)
        # Rows of strength 0 cost nothing; the strengths lie on the CPU, so looking at them is free. Where there are no
        # others, the edit runs on all of them for its gradients, which are zero: no rank may wait for one in vain.
        if not isinstance(switch.strength, Tensor) or bool(switch.strength.all()) or not bool(switch.strength.any()):
            return self._edit(h, selection, how)
        rows_N = switch.strength.repeat_interleave(selection.copies).nonzero()[:, 0].to(h.device)
        return h.index_copy(0, rows_N, self._edit(h[rows_N], selection.of(rows_N), how.of(rows_N)))

    def _edit(self, h: Tensor, selection: Selection, how: "_How") -> Tensor:
        strength, groups, source_BTD = how
        if selection.index_BP is None:
            chosen_BT1 = selection.mask_BT[:, :, None]
            edited_BTD = self.edit(torch.where(chosen_BT1, h, 0.0), strength, source_BTD, groups)
            return torch.where(chosen_BT1, edited_BTD, h)
        # By rows of D numbers: gather and scatter look up every number, and take twice as long.
        places = (torch.arange(len(h), device=h.device)[:, None], selection.index_BP)
        h_BPD = h[places]
        source_BPD = None if source_BTD is None else source_BTD[places]
        if selection.valid_BP is None:
            return h.index_put(places, self.edit(h_BPD, strength, source_BPD, groups))
        valid_BP1 = selection.valid_BP[:, :, None]
        seen_BPD = torch.where(valid_BP1, h_BPD, 0.0)
        edited_BPD = torch.where(valid_BP1, self.edit(seen_BPD, strength, source_BPD, groups), h_BPD)
        return h.index_put(places, edited_BPD)

    def _for_rows(self, strength: Strength, h_BTD: Tensor, selection: Selection) -> Strength:
        """Return a strength that broadcasts over `h_BTD`. Raises ValueError for another number of rows."""
        if not isinstance(strength, Tensor):
            return strength
        rows_B = strength.repeat_interleave(selection.copies).to(h_BTD.device)
        if len(rows_B) != len(h_BTD):
            raise ValueError(
                f"{len(strength)} strengths were given and {self.where} has {len(h_BTD)} rows; give one number, or one "
                "for each row"
            )
        return rows_B[:, None, None]

    def _source(self, h_BTD: Tensor, selection: Selection) -> Tensor:
        """Return the source's states at the selected places of `h_BTD`, zeros elsewhere."""
        if self.switch.sources is None:
            raise ValueError(
                f"the intervention at {self.where} puts in the states of a source and there is none; run the model "
                "inside `with reft.sources(batch)`, or inside `with reft.disabled()`"
            )
        # A source without any such token never came by here.
        source = self.switch.sources.get(self, States(h_BTD.new_zeros(0, 0, h_BTD.shape[2]), h_BTD.new_zeros(0, 0)))
        # Of a forward on a part of the prompt, the whole prompt's count: a chunk of it, or what comes behind a prefix.
        counts_B = selection.mask_BT.sum(1)
        if selection.total_B is not None:
            counts_B = selection.total_B.repeat_interleave(selection.copies)
        given_B = source.valid_BK.to(h_BTD.device).sum(1).repeat_interleave(selection.copies)
        if len(given_B) != len(counts_B):
            raise ValueError(
                f"the source has {len(source.valid_BK)} rows at {self.where} and the base {len(counts_B)}; every row "
                "of the base needs one row of the source"
            )
        if not torch.equal(given_B, counts_B.to(given_B)):
            row = int((given_B != counts_B).nonzero()[0])
            raise ValueError(
                f"row {row}: positions '{self.positions.text}' at {self.where} are {int(counts_B[row])} tokens of the "
                f"base and {int(given_B[row])} of the source; select as many of both (the source's by "
                "`reft.sources(batch, positions=...)`)"
            )
        states_BKD = source.states_BKD.to(h_BTD.device, h_BTD.dtype).repeat_interleave(selection.copies, 0)
        if not states_BKD.shape[1]:
            return torch.zeros_like(h_BTD)
        rank_BT = selection.mask_BT.cumsum(1) - 1
        if selection.earlier_B is not None:
            rank_BT = rank_BT + selection.earlier_B.repeat_interleave(selection.copies)[:, None]
        place_BTD = rank_BT.clamp(0, states_BKD.shape[1] - 1)[:, :, None].expand_as(h_BTD)
        return torch.where(selection.mask_BT[:, :, None], states_BKD.gather(1, place_BTD), 0.0)


class _How(NamedTuple):
    """What an edit is given beside the states: all of it for the rows that these have."""

    strength: Strength
    groups: Mapping[str, Strength] | None
    source_BTD: Tensor | None

    def of(self, rows_N: Tensor) -> "_How":
        """Return the same for some rows."""

        def pick(given: Strength) -> Strength:
            return given[rows_N] if isinstance(given, Tensor) else given

        groups = None if self.groups is None else {name: pick(strength) for name, strength in self.groups.items()}
        return _How(pick(self.strength), groups, None if self.source_BTD is None else self.source_BTD[rows_N])


def as_rows(h: Tensor) -> Tensor:
    """Return states as (B, T, D): those of a packed tower in one row, those with rows and columns flat."""
    return h[None] if h.dim() == 2 else h.flatten(1, -2)


def states_at(h_BTD: Tensor, selection: Selection) -> States:
    """Return copies of the selected states, detached; looks at the mask, a synchronisation on an accelerator."""
    counts_B = selection.mask_BT.sum(1)
    num_slots = int(counts_B.max()) if counts_B.numel() else 0
    index_BK = selection.mask_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    valid_BK = torch.arange(num_slots, device=h_BTD.device)[None] < counts_B[:, None]
    states_BKD = h_BTD.detach().gather(1, index_BK[:, :, None].expand(-1, -1, h_BTD.shape[2]))
    return States(torch.where(valid_BK[:, :, None], states_BKD, 0.0), valid_BK)
