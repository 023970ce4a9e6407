"""`Rows`: prompts as batches of a model's arguments, padded on either side, their pictures beside them.

Shape suffixes: B = rows, L = tokens of the longest row.
"""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vlreft.reuse.prefix import ALONG_THE_TOKENS

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """The arguments of one row: those that run along its tokens (last dimension), and all else, which is media.

    key: a hash of the media.
    """

    tokens: dict[str, Tensor]
    media: dict[str, Any]
    key: bytes

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return self.tokens["input_ids"].shape[-1]

    @property
    def kind(self) -> tuple[str, ...]:
        """What it has: rows with images take another way through a model than those without."""
        return tuple(sorted(self.media))


class Rows:
    """Some prompts, and what a model is called with for them."""

    def __init__(self, prompts: Sequence[Prompt], pad_id: int = 0) -> None:
        """Take prompts; `of` reads them."""
        self.prompts, self.pad_id = list(prompts), pad_id
        self.num_tokens = [prompt.num_tokens for prompt in prompts]
        self.shape = (len(prompts), max(self.num_tokens))
        self._padded: dict[Side, dict[str, Tensor]] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> "Rows":
        """Read rows of one prompt each, with the positions that `generate` would give them in one batch.

        Raises ValueError for none, and for one that is padded or holds several.
        """
        if not rows:
            raise ValueError("`rows` must hold at least one prompt, got none")
        prompts = []
        for number, row in enumerate(rows):
            ids, mask = row.get("input_ids"), row.get("attention_mask")
            is_one = isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1
            if not is_one or (isinstance(mask, Tensor) and not bool(mask.all())):
                got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(
                    f"row {number} must hold the `input_ids` of one prompt without padding, of shape (1, L), got {got};"
                    " make it with `collator.prompts([example])`"
                )
            tokens = {name: to_device(row[name], model.device) for name in ALONG_THE_TOKENS if name in row}
            media = {name: value for name, value in row.items() if name not in (*tokens, "attention_mask")}
            prompts.append(Prompt(tokens, to_device(media, model.device), digest_of(media)))
        found = cls(prompts, pad_id)
        takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        return found._placed(model) if takes_positions and "position_ids" not in found.tokens("left") else found

    def _placed(self, model: Any) -> "Rows":
        """Add the positions by the model's own rule: some count images in two dimensions (M-RoPE)."""
        left = self.tokens("left")
        place_BL = model._prepare_position_ids_for_generation(left["input_ids"], {**left, **self.media()})
        return Rows(
            [
                Prompt({**p.tokens, "position_ids": place_BL[..., row : row + 1, -p.num_tokens :]}, p.media, p.key)
                for row, p in enumerate(self.prompts)
            ],
            self.pad_id,
        )

    def take(self, rows: Sequence[int]) -> "Rows":
        """Return some of the rows."""
        return Rows([self.prompts[row] for row in rows], self.pad_id)

    def tokens(self, side: Side) -> dict[str, Tensor]:
        """Return what runs along the tokens, padded to one length (zeros beside the ids), and its `attention_mask`."""
        if side not in self._padded:
            names = dict.fromkeys(name for prompt in self.prompts for name in prompt.tokens)
            masks = [torch.ones_like(prompt.tokens["input_ids"]) for prompt in self.prompts]
            made = {"attention_mask": self._pad(masks, side)}
            for name in names:
                like = next(prompt.tokens[name] for prompt in self.prompts if name in prompt.tokens)
                rows = [p.tokens.get(name, like.new_zeros((*like.shape[:-1], p.num_tokens))) for p in self.prompts]
                made[name] = self._pad(rows, side, self.pad_id if name == "input_ids" else 0)
            self._padded[side] = made
        return dict(self._padded[side])

    def _pad(self, rows: Sequence[Tensor], side: Side, fill: int = 0) -> Tensor:
        pads = [self.shape[1] - row.shape[-1] for row in rows]
        sides = [(num, 0) if side == "left" else (0, num) for num in pads]
        return torch.cat([F.pad(row, pad, value=fill) for row, pad in zip(rows, sides, strict=True)], dim=-2)

    @property
    def is_one_call(self) -> bool:
        """Whether the rows' media can be joined to one call of the model."""
        return all(self._joins(name) for name in self.prompts[0].media) and len({p.kind for p in self.prompts}) == 1

    def media(self) -> dict[str, Any]:
        """Return the media, row after row along the first dimension; without those that cannot be joined so."""
        if len(self.prompts) == 1:
            return dict(self.prompts[0].media)
        names = dict.fromkeys(name for prompt in self.prompts for name in prompt.media if self._joins(name))
        return {name: torch.cat([p.media[name] for p in self.prompts if name in p.media]) for name in names}

    def _joins(self, name: str) -> bool:
        values = [prompt.media[name] for prompt in self.prompts if name in prompt.media]
        if not all(isinstance(value, Tensor) and value.dim() for value in values):
            return False
        return len({value.shape[1:] for value in values}) == 1


def digest_of(value: Any) -> bytes:
    """Return a hash of tensors, and of lists and mappings of them."""
    made = hashlib.blake2b(digest_size=16)
    if isinstance(value, Tensor):
        made.update(f"{tuple(value.shape)} {value.dtype}".encode())
        made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            made.update(name.encode() + digest_of(value[name]))
    elif isinstance(value, list | tuple):
        for item in value:
            made.update(digest_of(item))
    else:
        made.update(f"{type(value).__name__} {value!r}".encode())
    return made.digest()


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors, and those in lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list | tuple) else value
