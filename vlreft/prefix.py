"""Exact reuse of the untouched prefix: tokens before the first edited one run once, without a graph.

Shape suffixes: B = rows, L = tokens of the batch, T = tokens behind the prefix, V = vocabulary.

In a causal decoder the states of the tokens before the first edited position depend on no trainable number. So a
training step may run them without a graph, keep their keys and values in the model's own cache, and build the graph for
the question and the answer alone. The gradients are those of the plain step; memory and backward no longer follow the
image. Whether a model allows it is not looked up but tried: the first batch with images, and the first without, runs
both ways and the logits are compared.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from vlreft.layout import TokenLayout
from vlreft.reft import Reft
from vlreft.selects import All, First, Slice, Uniform
from vlreft.streams import cache_in, cache_name

logger = logging.getLogger("vlreft")

# Inputs whose last dimension runs along the tokens, and which are cut with them.
ALONG_THE_TOKENS = ("input_ids", "labels", "prompt_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
NEEDED = frozenset({"input_ids", "attention_mask", "labels"})
# Below this many tokens a second call of the model costs more than the graph of the prefix.
WORTHWHILE = 16
# What one call and two may differ by, relative to the largest logit: rounding of another order of summation.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class PrefixReuse:
    """Cuts training batches at the first token that matters to the gradient.

    `required`: where the prefix cannot be reused, raise ValueError with the reason, instead of logging it once and
    taking the plain step.
    """

    def __init__(self, reft: Reft, *, required: bool) -> None:
        self.reft = reft
        self.required = required
        self.refusal = ""
        self.tried: set[frozenset[str]] = set()
        self._refuse(_forbidden_by(reft))

    @contextmanager
    def cut(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Run the prefix of a batch; yield the model's inputs for the rest, which has to run inside.

        Yields the batch as it is where there is nothing to reuse.
        """
        length = 0 if self.refusal else self._prefix_length(inputs)
        kind = frozenset(inputs)  # a batch with images takes another way through the model than one without
        if length and kind not in self.tried:
            self.tried.add(kind)
            self._refuse(self._difference(inputs, length))
        if self.refusal or not length:
            yield dict(inputs)
            return
        with self._behind(inputs, length) as rest:
            yield rest

    @contextmanager
    def _behind(self, inputs: Mapping[str, Any], length: int) -> Iterator[dict[str, Any]]:
        """Run the first `length` tokens without a graph; yield the rest's inputs inside the whole batch's layout."""
        model, inputs = self.reft.model, _with_positions(self.reft.model, inputs)
        prefix = {name: value for name, value in inputs.items() if name not in ("labels", "prompt_mask")}
        prefix |= {name: prefix[name][..., :length] for name in (*ALONG_THE_TOKENS, "attention_mask") if name in prefix}
        if "logits_to_keep" in _forward_names(model):
            prefix["logits_to_keep"] = 1
        layout = self._layout(inputs)
        with torch.no_grad(), self.reft.runtime.muted():
            cache = cache_in(model(**prefix, use_cache=True).values())
        rest = {name: inputs[name][..., length:] for name in ALONG_THE_TOKENS if name in inputs}
        rest |= {"attention_mask": inputs["attention_mask"], cache_name(model): cache, "use_cache": True}
        with self.reft.runtime.scope(layout):
            yield rest

    def _layout(self, inputs: Mapping[str, Any]) -> TokenLayout:
        runtime, mask_BL = self.reft.runtime, inputs.get("prompt_mask")
        acting = runtime.acting("text")
        layout = runtime.batches.lay_out("text", inputs, acting, is_prompt_BL=mask_BL, training=True)
        assert layout is not None  # there is no encoder
        return layout

    def _prefix_length(self, inputs: Mapping[str, Any]) -> int:
        """Return how many columns come before every edit and every prediction, and hold all images; 0 if too few."""
        if _is_checkpointing(self.reft.model):
            self._refuse("gradient checkpointing switches the cache off")
        if not NEEDED <= inputs.keys() or inputs["labels"].shape != inputs["input_ids"].shape:
            self._refuse(f"a batch must have {', '.join(sorted(NEEDED))}, one label for each token")
        if self.refusal:
            return 0
        layout, labels_BL = self._layout(inputs), inputs["labels"]
        predicts_BL = F.pad(labels_BL[:, 1:] != -100, (0, 1))
        needed_L = (self.reft.runtime.edited(layout) | predicts_BL).any(0)
        length = int(needed_L.to(torch.uint8).argmax())
        images_BL = layout.segments.get("image")
        late_image = images_BL is not None and bool(images_BL[:, length:].any())
        if self.required and (length == 0 or late_image):
            why = f"an image stands behind column {length}" if late_image else "its first token is edited"
            raise ValueError(f"`reuse_prefix=True` is not possible for this batch: {why}; use 'auto'")
        return 0 if late_image or length < (1 if self.required else WORTHWHILE) else length

    @torch.no_grad()
    def _difference(self, inputs: Mapping[str, Any], length: int) -> str:
        """Run a batch both ways; return what is wrong with the shorter one, "" if nothing is."""
        model = self.reft.model
        was_training = model.training
        model.eval()
        try:
            whole_BTV = model(**inputs).logits[:, length:]
            with self._behind(inputs, length) as rest:
                behind_BTV = model(**rest).logits
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(model).__name__} does not run from a cache as training would need ({error})"
        finally:
            model.train(was_training)
        is_real_BT1 = inputs["attention_mask"][:, length:, None] != 0
        error = float(((whole_BTV - behind_BTV) * is_real_BT1).abs().max() / whole_BTV.abs().max())
        if error > TOLERANCE[whole_BTV.dtype]:
            return f"{type(model).__name__} gives other logits from a cache (relative difference {error:.1e})"
        logger.info("reusing the prefix: %d of %d tokens run without a graph", length, inputs["input_ids"].shape[1])
        return ""

    def _refuse(self, reason: str) -> None:
        if reason and self.required:
            raise ValueError(f"`reuse_prefix=True` is not possible: {reason}")
        if reason and not self.refusal:
            logger.info("the prefix is not reused: %s", reason)
            self.refusal = reason


def _with_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the position ids of models that count images in two dimensions (M-RoPE) from the whole sequence.

    Twenty families define `get_rope_index` for it, with no type in common.
    """
    if "position_ids" in inputs:
        return inputs
    for module in model.modules():
        if (rope_index := getattr(type(module), "get_rope_index", None)) is not None:
            known = {name: inputs[name] for name in inspect.signature(rope_index).parameters if name in inputs}
            return {**inputs, "position_ids": rope_index(module, **known)[0]}
    return inputs


def _is_checkpointing(model: nn.Module) -> bool:
    return any(
        layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)
    )


def _forward_names(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(type(model).forward).parameters)


def _forbidden_by(reft: Reft) -> str:
    """Return why a config or a kind of model leaves no untouched prefix, "" if it may."""
    model = reft.model
    if not isinstance(model, GenerationMixin) or reft.runtime.batches.has_encoder:
        return f"{type(model).__name__} is no causal decoder"
    if not cache_name(model):
        return f"{type(model).__name__} takes no cache"
    for number, item in enumerate(reft.config.interventions):
        positions = item.parsed_positions
        who = f"intervention {number} (site '{item.site}', positions '{item.positions}')"
        if item.site != "text" or positions.segment == "image":
            return f"{who} edits image features, which all later tokens read"
        at_start = any(
            isinstance(select, All | First | Uniform) or (isinstance(select, Slice) and select.start == 0)
            for select in positions.selects
        )
        if positions.segment in ("prompt", "text") and at_start:
            return f"{who} edits the first tokens of the prompt"
    return ""
