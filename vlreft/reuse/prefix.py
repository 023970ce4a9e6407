"""Exact reuse of the untouched prefix: tokens before the first edited one run once, without a graph.

Shape suffixes: B = rows, L = tokens of the batch, W = columns of the prefix, S = columns of the batch laid anew,
T = tokens behind the prefix, V = vocabulary.

In a causal decoder the states of the tokens before the first edited position depend on no trainable number. So a
training step may run them without a graph, keep their keys and values in the model's own cache, and build the graph for
the question and the answer alone. The gradients are those of the plain step; memory and backward no longer follow the
image.

Each row has a prefix of its own. Where they end in different columns, the batch is laid anew: prefixes padded on the
left, so that they end together, and what is behind them on the right; every token keeps its position. Rows whose
prefixes have the same content share one, and a prefix may be kept from step to step; then it ends with the row's last
image token, so that all questions about a picture find it, and the text tokens between it and the first edited one run
without a graph too, if they are enough.

Whether a model allows it is not looked up but tried: the first batch of each kind runs both ways and the logits are
compared.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlreft.layout import TokenLayout
from vlreft.reft import Reft
from vlreft.reuse.caches import empty_cache
from vlreft.reuse.cuts import (
    ALONG_THE_TOKENS,
    BEHIND,
    Cut,
    columns_of,
    laid_anew,
    media_in,
    rope_index_of,
    some_rows,
    strange_inputs,
    with_positions,
)
from vlreft.reuse.kept import (
    KeptPrefixes,
    Row,
    TooSmall,
    cache_of,
    filled_layers,
    is_plain,
    media_of_rows,
    rows_of,
    select_rows,
    shell_of,
)
from vlreft.reuse.pieces import content_key, is_close
from vlreft.running.endings import ending_when_full
from vlreft.running.streams import cache_in, cache_name
from vlreft.selects import All, First, Slice, Uniform

logger = logging.getLogger("vlreft")

NEEDED = frozenset({"input_ids", "attention_mask", "labels"})
# Below this many tokens a second call of the model costs more than the graph of the prefix.
WORTHWHILE = 16
# What one call and two may differ by, relative to the largest logit: rounding of another order of summation.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class PrefixReuse:
    """Cuts training batches at the first token that matters to the gradient.

    required: where the prefix cannot be reused, raise ValueError with the reason, instead of logging it once and taking
    the plain step. kept: keeps prefixes from step to step; where the model or the config forbids it, that is a
    ValueError too, if it is `required`. What is kept is not found again once a number of the base has changed.
    """

    def __init__(self, reft: Reft, *, required: bool, kept: KeptPrefixes | None = None) -> None:
        self.reft = reft
        self.required = required
        self.kept = kept
        self.refusal = ""
        self.tried: set[tuple[object, ...]] = set()
        self._said: set[str] = set()
        self.num_run = 0  # prefixes that were run so far
        # Found once: looking through all modules takes as long as some steps do.
        self._names = frozenset(inspect.signature(type(reft.model).forward).parameters)
        self._cache_name = cache_name(reft.model)
        self._rope_index = rope_index_of(reft.model)
        self._blocks = [layer for layer in reft.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self._can_move = "position_ids" in self._names
        self._can_share = True
        self._can_spare = True  # what is lost anyway: the end of a prefix's run, logits from which nothing is predicted
        self._shell: Cache | None = None
        self._own = {id(parameter) for parameter in reft.parameters()}
        self._refuse(_forbidden_by(reft))

    @contextmanager
    def cut(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Run the prefix of a batch; yield the model's inputs for the rest, which has to run inside.

        Yields the batch as it is where there is nothing to reuse.
        """
        placed = self._with_positions(inputs)
        cut = self._find(placed)
        while cut is not None and cut.kind not in self.tried:
            # What is moved and shared is moved alone first, to know which of the two is to blame.
            alone = replace(cut, keys_B=None)
            next_one = alone if cut.is_moved and alone.kind not in self.tried else cut
            if wrong := self._difference(inputs, placed, next_one):
                self._give_up(next_one, wrong)
                cut = self._find(placed)
            else:
                self.tried.add(next_one.kind)
        if cut is None:
            yield dict(inputs)
            return
        with self._behind(placed, cut) as rest:
            yield rest

    def _with_positions(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.refusal or self._rope_index is None:
            return inputs
        try:
            return with_positions(self._rope_index, inputs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            self._refuse(f"{type(self.reft.model).__name__} does not say where its tokens stand ({error})")
            return inputs

    # Where to cut ------------------------------------------------------------------------------------------------

    def _find(self, inputs: Mapping[str, Any]) -> Cut | None:
        """Return where to cut a batch: before every edit and every prediction, behind all images; None if nowhere."""
        if self.refusal:
            return None
        if any(block.gradient_checkpointing for block in self._blocks):
            self._refuse("gradient checkpointing switches the cache off")
        if not NEEDED <= inputs.keys() or inputs["labels"].shape != inputs["input_ids"].shape:
            self._refuse(f"a batch must have {', '.join(sorted(NEEDED))}, one label for each token")
        if self.refusal:
            return None
        starts_B, ends_B, firsts_B, predicts_B, images_B, num_images_B, has_gaps = self._columns(inputs)
        plain = Cut(frozenset(inputs), starts_B, firsts_B, ends_B, predicts_B)
        can_lay = not has_gaps and not strange_inputs(inputs)
        why = f"an image stands behind column {min(firsts_B)}"
        cut = None
        if all(image <= first for image, first in zip(images_B, firsts_B, strict=True)):
            cut = self._shared(inputs, plain, images_B, num_images_B) if can_lay and self._can_share else None
            cut = cut if cut is not None else plain
            cut = replace(cut, is_moved=len(set(cut.stops_B)) > 1)
            if cut.is_moved and not (can_lay and self._can_move):
                cut = replace(plain, stops_B=[min(firsts_B)] * len(firsts_B))
                cut = cut if max(images_B) <= cut.stops_B[0] else None
            if self.kept is not None and (cut is None or cut.keys_B is None):
                self._say_once("prefixes of some batches are not kept: the model does not let rows end where they do")
        if cut is not None:
            why = "its first token is edited" if not cut.width else ""
        if self.required and why:
            raise ValueError(f"`reuse_prefix=True` is not possible for this batch: {why}; use 'auto'")
        return cut if cut is not None and cut.width >= (1 if self.required else WORTHWHILE) else None

    def _columns(self, inputs: Mapping[str, Any]) -> tuple[*tuple[list[int], ...], bool]:
        """Return of each row: its first token, one behind its last one, the first that needs a graph, the first that
        predicts a label (the last one without), one behind its last image token (0 without), and the number of these;
        and whether there are pads inside of a row.
        """
        layout, labels_BL = self._layout(inputs), inputs["labels"]
        real_BL = inputs["attention_mask"] != 0
        predicts_BL = F.pad(labels_BL[:, 1:] != -100, (0, 1))
        needed_BL = self.reft.runtime.edited(layout) | predicts_BL
        image_BL = layout.segments.get("image", torch.zeros_like(real_BL))
        num_columns = real_BL.shape[1]
        lasts_2B = num_columns - torch.stack([real_BL, image_BL]).flip(2).to(torch.uint8).argmax(2)
        found = [
            real_BL.to(torch.uint8).argmax(1),
            lasts_2B[0],
            torch.where(needed_BL.any(1), needed_BL.to(torch.uint8).argmax(1), num_columns),
            torch.where(predicts_BL.any(1), predicts_BL.to(torch.uint8).argmax(1), lasts_2B[0] - 1),
            torch.where(image_BL.any(1), lasts_2B[1], 0),
            image_BL.sum(1),
            real_BL.sum(1),
        ]
        starts_B, ends_B, firsts_B, predicts_B, images_B, num_images_B, nums_B = torch.stack(found).tolist()
        firsts_B = [min(first, end) for first, end in zip(firsts_B, ends_B, strict=True)]
        has_gaps = any(end - start != num for start, end, num in zip(starts_B, ends_B, nums_B, strict=True))
        return starts_B, ends_B, firsts_B, predicts_B, images_B, num_images_B, has_gaps

    def _shared(
        self, inputs: Mapping[str, Any], plain: Cut, images_B: Sequence[int], num_images_B: Sequence[int]
    ) -> Cut | None:
        """Return where to cut so that rows share prefixes or find kept ones; None if none of them would."""
        stops_B = [image or first for image, first in zip(images_B, plain.stops_B, strict=True)]
        media_B = media_of_rows(media_in(inputs), num_images_B)
        if media_B is None:
            self._say_once("prefixes of some batches are neither shared nor kept: which pictures are whose is not told")
            return None
        cut = replace(plain, stops_B=stops_B, media_B=media_B)
        keys_B = self._keys(inputs, cut)
        if self.kept is None and len(set(keys_B)) == len(keys_B):
            return None
        num_between = min(first - stop for first, stop in zip(plain.stops_B, stops_B, strict=True))
        return replace(cut, keys_B=keys_B, num_between=num_between if num_between >= WORTHWHILE else 0)

    def _keys(self, inputs: Mapping[str, Any], cut: Cut) -> list[str]:
        """Return a hash of all that each row's prefix depends on."""
        assert cut.media_B is not None
        base = ""
        if self.kept is not None:
            others = (parameter for parameter in self.reft.model.parameters() if id(parameter) not in self._own)
            base = repr(self.kept.changes.versions(others))
        device = inputs["input_ids"].device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        common = content_key(base, device, precision)
        tokens = {n: inputs[n].cpu() for n in ALONG_THE_TOKENS if n in inputs and n not in BEHIND}
        shape = inputs["input_ids"].shape
        tokens.setdefault("position_ids", torch.arange(shape[1]).expand(shape))
        tokens = {name: value.expand(*value.shape[:-2], *shape) for name, value in tokens.items()}
        keys = []
        for row, (start, stop) in enumerate(zip(cut.starts_B, cut.stops_B, strict=True)):
            own = {name: value[..., row, start:stop] for name, value in tokens.items()}
            keys.append(content_key(common, own, cut.media_B[row]))
        return keys

    # Running in parts --------------------------------------------------------------------------------------------

    @contextmanager
    def _behind(self, inputs: Mapping[str, Any], cut: Cut) -> Iterator[dict[str, Any]]:
        """Run the prefix without a graph; yield the rest's inputs inside the whole batch's layout."""
        inputs = laid_anew(inputs, cut) if cut.is_moved else inputs
        layout, cache, width = self._layout(inputs), self._prefix(inputs, cut, self.kept), cut.width
        if cut.num_between:
            between = columns_of(inputs, width, width + cut.num_between)
            between["attention_mask"] = inputs["attention_mask"][:, : width + cut.num_between]
            cache, width = self._run({**between, self._cache_name: cache}), width + cut.num_between
        rest = {name: inputs[name][..., width:] for name in ALONG_THE_TOKENS if name in inputs}
        rest |= {"attention_mask": inputs["attention_mask"], self._cache_name: cache, "use_cache": True}
        if self._can_spare and "logits_to_keep" in self._names:
            num_tokens = rest["labels"].shape[1]
            rest["labels"] = rest["labels"][:, cut.num_silent :]
            # As numbers of columns: of a slice, a head without a gradient is multiplied row by row, three times slower.
            rest["logits_to_keep"] = torch.arange(cut.num_silent, num_tokens, device=rest["labels"].device)
        with self.reft.runtime.scope(layout):
            yield rest

    def _prefix(self, inputs: Mapping[str, Any], cut: Cut, kept: KeptPrefixes | None) -> Cache:
        """Return a cache with each row's prefix. Those of the same content run once, kept ones not at all."""
        if cut.keys_B is None:
            self.num_run += len(cut.starts_B)
            return self._run({**columns_of(inputs, 0, cut.width), **media_in(inputs)})
        num_tokens, keys_B = cut.num_tokens, cut.keys_B
        rows: dict[str, int] = {}
        for row, key in enumerate(keys_B):
            if num_tokens[row]:
                rows.setdefault(key, row)
        found = {key: None if kept is None else kept.get(key) for key in rows}
        missing = [key for key in rows if found[key] is None]
        if not missing and self._shell is None:  # another training has kept them all; how a cache is built is not known
            missing = list(rows)[:1]
        if missing:
            cache = self._run(some_rows(inputs, cut, [rows[key] for key in missing]))
            self.num_run += len(missing)
            self._shell = shell_of(cache)
            new = dict(zip(missing, rows_of(cache, [num_tokens[rows[key]] for key in missing]), strict=True))
            for key, row in new.items():
                if kept is not None:
                    kept.put(key, row)
            if len(missing) == len(rows):
                if missing != keys_B:  # a row without a prefix reads nothing of what it is given
                    places = [missing.index(key) if key in new else 0 for key in keys_B]
                    select_rows(cache, torch.tensor(places, device=inputs["input_ids"].device))
                return cache
            found |= new
        assert self._shell is not None
        held: list[Row | None] = [found.get(key) for key in keys_B]
        return cache_of(self._shell, held, cut.width)

    def _run(self, inputs: dict[str, Any]) -> Cache:
        """Run some columns of a batch that nothing edits; return the cache."""
        model, name = self.reft.model, self._cache_name
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = 1
        assert isinstance(model, PreTrainedModel)
        own: Cache = inputs[name] if name in inputs else empty_cache(model)
        with torch.no_grad(), self.reft.runtime.muted():
            if self._can_spare and is_plain(own):
                with ending_when_full(model, own):
                    model(**{**inputs, name: own}, use_cache=True)
                return own
            cache = cache_in(model(**inputs, use_cache=True).values())
        if cache is None:
            raise ValueError("it gives no cache back")
        return cache

    def _layout(self, inputs: Mapping[str, Any]) -> TokenLayout:
        runtime, mask_BL = self.reft.runtime, inputs.get("prompt_mask")
        acting = runtime.acting("text")
        layout = runtime.batches.lay_out("text", inputs, acting, is_prompt_BL=mask_BL, training=True)
        assert layout is not None  # there is no encoder
        return layout

    # Trying and refusing -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _difference(self, inputs: Mapping[str, Any], placed: Mapping[str, Any], cut: Cut) -> str:
        """Run a batch both ways; return what is wrong with the shorter one, "" if nothing is."""
        model = self.reft.model
        was_training = model.training
        model.eval()
        try:
            whole = model(**inputs)
            with self._behind(placed, cut) as rest:
                behind, num_rest = model(**rest), rest["labels"].shape[1]
            if cut.keys_B is not None and (reason := self._changes(placed, cut, was_training)):
                return reason
            model.train(was_training)
            self._go_back(placed, cut)
        except TooSmall:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(model).__name__} does not run from a cache as training would need ({error})"
        finally:
            model.train(was_training)
        from_BS, is_real_BS = cut.sources()
        whole_BLV, behind_BTV = whole.logits, behind.logits
        if behind_BTV.shape[1] != num_rest:
            return f"{type(model).__name__} gives {behind_BTV.shape[1]} logits where {num_rest} are asked for"
        if not cut.is_moved:
            from_BS = torch.arange(inputs["input_ids"].shape[1]).expand(inputs["input_ids"].shape)
            is_real_BS = inputs["attention_mask"] != 0
        from_BT, is_real_BT = (x[:, -num_rest:].to(whole_BLV.device) for x in (from_BS, is_real_BS))
        whole_BTV = whole_BLV[torch.arange(len(from_BT), device=from_BT.device)[:, None], from_BT]
        whole_BTV, behind_BTV = (x_BTV.where(is_real_BT[..., None], 0) for x_BTV in (whole_BTV, behind_BTV))
        error = float((whole_BTV - behind_BTV).abs().max() / whole_BTV.abs().max())
        if not error <= TOLERANCE[whole_BTV.dtype]:
            return f"{type(model).__name__} gives other logits from a cache (relative difference {error:.1e})"
        losses = behind.loss, whole.loss  # of a model that knows of none, the trainer takes it from the logits
        if None not in losses and not torch.isclose(*losses, rtol=TOLERANCE[whole_BTV.dtype], equal_nan=True):
            return f"{type(model).__name__} has another loss without its prefix ({losses[0]:.6g}, not {losses[1]:.6g})"
        num_tokens = sum(end - start for start, end in zip(cut.starts_B, cut.ends_B, strict=True))
        num_prefix = sum(cut.num_tokens) + cut.num_between * len(cut.starts_B)
        logger.info("reusing the prefix: %d of %d tokens run without a graph", num_prefix, num_tokens)
        return ""

    def _changes(self, inputs: Mapping[str, Any], cut: Cut, training: bool) -> str:
        """Return why a prefix is not the same each time in training, "" if it is."""
        inputs = laid_anew(inputs, cut) if cut.is_moved else inputs
        runs = []
        for mode in (False, training):
            self.reft.model.train(mode)
            layers = filled_layers(self._prefix(inputs, cut, None))
            runs.append([states for layer in layers for states in (layer.keys, layer.values)])
        return "" if is_close(*runs) else "a prefix is another one each time it is run in training, as dropout makes it"

    def _go_back(self, inputs: Mapping[str, Any], cut: Cut) -> None:
        """Run the parts as a training step does, and backwards if the cache holds other things than keys and values.

        Raises ValueError where a model gives no cache in training or reads none, and RuntimeError where it writes into
        what the backward pass needs.
        """
        with torch.enable_grad(), self._behind(inputs, cut) as rest:
            logits_BTV = self.reft.model(**rest).logits
            if not is_plain(cache_in(rest.values())):
                torch.autograd.grad(logits_BTV.float().sum(), list(self.reft.parameters()), allow_unused=True)

    def _give_up(self, cut: Cut, reason: str) -> None:
        """Take back what was tried and did not work: what is spared, sharing, moving, then the reuse itself."""
        if self._can_spare:
            self._can_spare = False
            if self.kept is not None:
                self.kept.drop()
            logger.info("prefixes run to their end, with logits for all tokens behind: %s", reason)
        elif cut.keys_B is not None:
            if self.kept is not None:
                self.kept.drop()
                self._refuse(reason)
            self._can_share = False
            logger.info("rows share no prefix: %s", reason)
        elif cut.is_moved:
            self._can_move = False
            logger.info("prefixes of different rows end in one column: %s", reason)
        else:
            self._refuse(reason)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.log(logging.INFO if self.kept is None else logging.WARNING, text)

    def _refuse(self, reason: str) -> None:
        if reason and self.kept is not None and self.kept.required:
            raise ValueError(f"`keep_prefixes` is not possible: {reason}; leave it out")
        if reason and self.required:
            raise ValueError(f"`reuse_prefix=True` is not possible: {reason}")
        if reason and not self.refusal:
            logger.info("the prefix is not reused: %s", reason)
            self.refusal = reason


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
