"""`Batches`: lays out the arguments of one model, so that every token of a batch has a meaning, or refuses them.

Shape suffixes: B = rows, L = tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from vlreft.layout import TokenLayout, decoder_layout, prompt_from_labels, refuse_bad_labels, text_layout
from vlreft.models.sites import Sites
from vlreft.placed import Placed
from vlreft.running.streams import cache_in, length_of


class Batches:
    """What the calls of one model mean, by the names of its forward's arguments."""

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.sites = sites
        self.is_generative = isinstance(model, GenerationMixin)
        by_config = isinstance(model, PreTrainedModel) and bool(model.config.is_encoder_decoder)
        self.has_encoder = by_config or {"text", "text_encoder"} <= set(sites.by_name)
        self.looked_at_one = False

    def lay_out(
        self,
        stream: str,
        call: Mapping[str, Any],
        acting: Sequence[Placed],
        *,
        is_prompt_BL: Tensor | None = None,
        training: bool,
    ) -> TokenLayout | None:
        """Lay out a stream of a batch, None if its stack will not run. Raises ValueError where it means nothing.

        `acting` are the edits that the layout is for.
        """
        if not self.has_encoder:
            return self._decoder_alone(call, acting, is_prompt_BL, training)
        if stream == "text_encoder":
            if tokens_in(call) is None and call.get("encoder_outputs") is not None:
                raise ValueError(
                    "the model was called with `encoder_outputs`, so the edits in its encoder would do nothing: pass "
                    "`input_ids`, or run it inside `with reft.disabled()`"
                )
            return self._tokens(stream, call) if tokens_in(call) is not None else None
        return self._decoder_behind_encoder(call)

    def image_mask(self, call: Mapping[str, Any]) -> Tensor | None:
        """Return the mask_BL of image tokens that some families are given as an argument."""
        mask_BL = call.get(self.sites.quirk.image_mask) if self.sites.quirk.image_mask else None
        return mask_BL > 0 if isinstance(mask_BL, Tensor) else None

    def _decoder_alone(
        self, call: Mapping[str, Any], acting: Sequence[Placed], is_prompt_BL: Tensor | None, training: bool
    ) -> TokenLayout:
        tokens = tokens_in(call)
        if tokens is None:
            raise ValueError("the model was called without `input_ids` and `inputs_embeds`: positions need tokens")
        _refuse_continuing(call, self.sites.model_name)
        labels = call.get("labels")
        is_labelled = isinstance(labels, Tensor) and labels.shape == tokens.shape[:2] and self.is_generative
        labels_BL = labels if is_labelled else None
        given = is_prompt_BL is not None
        if not given and labels_BL is not None:
            is_prompt_BL = prompt_from_labels(labels_BL)
        if is_prompt_BL is None and training and self.is_generative:
            _refuse_unknown_prompt(acting)
        layout = self._tokens("text", call, is_prompt_BL)
        self._look_at(layout, None if given else labels_BL, acting)
        return layout

    def _decoder_behind_encoder(self, call: Mapping[str, Any]) -> TokenLayout:
        _refuse_continuing(call, self.sites.model_name)
        labels = call.get("labels")
        labels_BL = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None
        mask_BL = call.get("decoder_attention_mask")
        tokens = call.get("decoder_input_ids")
        tokens = call.get("decoder_inputs_embeds") if tokens is None else tokens
        tokens = labels_BL if tokens is None else tokens
        if (
            tokens is None
            and (tokens := tokens_in(call)) is not None
            and isinstance(call.get("attention_mask"), Tensor)
        ):
            # BART reads its own input, a start token in front, where it is given no more.
            mask_BL = F.pad(call["attention_mask"][:, :-1], (1, 0), value=1) if mask_BL is None else mask_BL
        if tokens is None:
            raise ValueError("the model was called without `labels` and `decoder_input_ids`: positions need tokens")
        return decoder_layout(
            labels_BL,
            (tokens.shape[0], tokens.shape[1]),
            tokens.device,
            in_place=self.sites.quirk.labels_in_place,
            attention_mask_BL=mask_BL,
        )

    def _tokens(self, stream: str, call: Mapping[str, Any], is_prompt_BL: Tensor | None = None) -> TokenLayout:
        tokens = tokens_in(call)
        assert tokens is not None
        shape, mask_BL = (tokens.shape[0], tokens.shape[1]), call.get("attention_mask")
        if mask_BL is not None and (not isinstance(mask_BL, Tensor) or mask_BL.shape != shape):
            got = tuple(mask_BL.shape) if isinstance(mask_BL, Tensor) else type(mask_BL).__name__
            raise ValueError(f"`attention_mask` must have the shape of the tokens, {shape}, got {got}")
        return text_layout(
            shape,
            tokens.device,
            self.sites.vocabularies[stream],
            input_ids_BL=call.get("input_ids"),
            attention_mask_BL=mask_BL,
            is_prompt_BL=is_prompt_BL,
            is_image_BL=self.image_mask(call),
        )

    def _look_at(self, layout: TokenLayout, labels_BL: Tensor | None, acting: Sequence[Placed]) -> None:
        """Refuse batches that mean nothing. On an accelerator looking means waiting for it: there, only the first."""
        on_cpu = layout.mask("prompt").device.type == "cpu"
        if torch.compiler.is_compiling() or (self.looked_at_one and not on_cpu):
            return
        self.looked_at_one = True
        if labels_BL is not None:
            refuse_bad_labels(labels_BL)
        needs_prompt = any(placed.positions.segment != "response" for placed in acting)
        empty_B = ~layout.mask("prompt").any(1)
        if needs_prompt and bool(empty_B.any()):
            row = int(empty_B.nonzero()[0])
            raise ValueError(
                f"row {row} of the batch has no prompt token, so there is nothing to edit: its labels start at the "
                "first token (label the answer only, -100 elsewhere), or its attention mask is all zero"
            )


def tokens_in(call: Mapping[str, Any]) -> Tensor | None:
    """Return the ids_BL of a call, else its embeddings of shape (B, L, D), else None."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(tokens := call.get(name), Tensor):
            return tokens
    return None


def _refuse_continuing(call: Mapping[str, Any], model_name: str) -> None:
    cache = cache_in(call.values())
    if cache is not None and _is_filled(cache, model_name):
        raise ValueError(
            "a forward that continues a cache outside of `generate`: nothing says which tokens are the prompt; "
            "run it inside `with reft.prompt(input_ids, attention_mask):`"
        )


def _is_filled(cache: Cache, model_name: str) -> bool:
    """Return whether a cache holds tokens; a static one counts them on the device, which costs a synchronisation."""
    length = length_of(cache, model_name)
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return False
    return bool(length > 0)


def _refuse_unknown_prompt(acting: Sequence[Placed]) -> None:
    for placed in acting:
        if placed.positions.needs_prompt_end:
            raise ValueError(
                f"positions '{placed.positions.text}' need to know where the prompt ends, but this training step has "
                "neither `labels` nor a `prompt_mask`; pass one of them to the model (vlreft.ReftTrainer and "
                "vlreft.ReftMixin pass the mask on even when the trainer takes the labels away)"
            )
