"""`Questions`: prompts that begin alike, as questions about one image do, have that beginning run once.

Shape suffixes: B = rows, L = tokens of a row, P = tokens of a prefix, V = vocabulary.

Each row's prefix ends with its last image token (for rows without images: where their prompts part). Rows with the same
pictures, the same tokens and the same edits there share a prefix. The distinct prefixes run in one forward per length.
Where all rows are of one length, `generate` goes on from there. Where they are not, the rests, padded on the right, run
in one forward; then keys and values are moved until all rows end together, as in a left-padded batch, and `generate`
goes on with each row's last token. So it is given the very tokens, mask and positions of a plain call.

Whether a model allows it is not looked up but tried, as in `prefix.py`.
"""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

from vlreft.data.collator import Collator
from vlreft.layout import TokenLayout
from vlreft.reft import CHILD_NAME, Adapters
from vlreft.reuse.caches import Layers, clone_row, empty_cache, filled, layers_of, moved, stack, windows_of
from vlreft.reuse.prefix import TOLERANCE, WORTHWHILE
from vlreft.reuse.rows import Rows, Side, digest_of, to_device
from vlreft.running.endings import ending_when_full
from vlreft.running.hooks import Runtime
from vlreft.running.streams import cache_name

logger = logging.getLogger("vlreft")

# Arguments of `generate` that bring a cache or a prompt of their own.
OWN_CACHE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "cache_implementation")
OWN_PROMPT = ("inputs", "inputs_embeds", "input_ids", "attention_mask", "cache", "past_key_values", "custom_generate")


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the beginning of a prompt left in the cache, of one row."""

    layers: Layers
    num_tokens: int


class SharedPrefixes:
    """Generate from prompts of which some begin alike; each beginning runs once.

    num_kept: how many prefixes to keep for later calls, the last used ones. Only those that no edit touches are kept,
        so they serve all adapters; none are while a `modules_to_save` is attached. Call `forget` after changing the
        base. One takes the memory of its tokens' keys and values.
    required: where a prefix cannot be shared, raise ValueError with the reason; else log it once and return None.
    """

    def __init__(self, model: PreTrainedModel, *, num_kept: int = 1, required: bool = True) -> None:
        if num_kept < 0:
            raise ValueError(f"`num_kept` (={num_kept}) must be at least 0 prefixes")
        self.model, self.num_kept, self.required = model, num_kept, required
        self._class: Any = type(model)
        self.num_run = 0  # prefixes that were run so far
        self.refusal = ""
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._tried: set[tuple[tuple[str, ...], bool]] = set()
        self._refuse(_forbidden_by(model, self._runtime()))

    def forget(self) -> None:
        """Drop the kept prefixes."""
        self._kept.clear()

    @torch.no_grad()
    def generate(self, rows: Sequence[Mapping[str, Any]], **generation: Any) -> Any:
        """Return what `model.generate` returns for these rows as one left-padded batch.

        rows: the model's arguments for one prompt each, without padding, as `collator.prompts([example])` makes them.
        generation: arguments of `generate`; it has a cache. Returns None where nothing is shared and `required` is off.
        Raises: ValueError for rows of another form, for arguments that bring a cache or a prompt of their own, and,
        with `required`, where sharing would not be exact.
        """
        if wrong := [name for name in OWN_PROMPT if name in generation]:
            raise ValueError(
                f"`{wrong[0]}` cannot be given here: prompts come from `rows`, the cache from their prefix"
            )
        if self.model.training:
            raise ValueError("the model is in training mode, whose dropout differs from call to call; use model.eval()")
        if self.refusal or not self._allows(generation):
            return None
        runtime, batch = self._runtime(), Rows.of(self.model, rows, self._pad_id(generation))
        with _scope(runtime, batch, "left"):
            pass  # refuses what decoding cannot know
        if has_modules := _has_modules(self.model):
            self.forget()
        keys, lengths, untouched = self._plan(runtime, batch)
        if self.refusal or not keys or not self._pays(keys, lengths):
            return None
        keeps = [is_untouched and not has_modules for is_untouched in untouched]
        prefixes = self._prefixes(runtime, batch, keys, lengths, keeps)
        if prefixes is None:
            return None
        return self._go_on(runtime, batch, prefixes, generation)

    # What is shared --------------------------------------------------------------------------------------------

    def _plan(self, runtime: Runtime, batch: Rows) -> tuple[list[bytes], list[int], list[bool]]:
        """Return for each row what its prefix is known by, how long it is, and whether no edit touches it."""
        acting, boxes_B4 = runtime.acting("text"), runtime.boxes_B4
        call = {**batch.tokens("right"), **batch.media()}
        layout = runtime.batches.lay_out("text", call, acting, training=False)
        assert layout is not None  # there is no encoder
        lengths = self._prefix_lengths(batch, layout)
        if boxes_B4 is not None and len(boxes_B4) > 1:
            self._refuse("several boxes are given, one a picture, and a shared picture has one: give one for all")
        if min(lengths) < 1:
            self._refuse("a prompt has a single token")
        if self.refusal:
            return [], lengths, []
        # Which tokens an edit selects may depend on the whole prompt; rows differ where it does so in their prefix.
        masks = [placed.join(placed.positions.masks(layout)) for placed in acting if not placed.positions.has_region]
        regions, in_tower = any(placed.positions.has_region for placed in acting), bool(runtime.acting(""))
        keys, untouched = [], []
        for row, (prompt, num) in enumerate(zip(batch.prompts, lengths, strict=True)):
            edits = [mask_BL[row, :num] for mask_BL in masks]
            is_edited = any(bool(edit_P.any()) for edit_P in edits)
            untouched.append(not is_edited and not (prompt.media and (regions or in_tower)))
            tokens = {name: value[..., :num] for name, value in prompt.tokens.items()}
            place = f"{self.model.device} {self.model.dtype} {_precision(self.model)}"
            keys.append(digest_of([tokens, prompt.key, place, None if untouched[-1] else edits]))
        return keys, lengths, untouched

    def _prefix_lengths(self, batch: Rows, layout: TokenLayout) -> list[int]:
        """Return how many tokens to share of each row, 0 where there is nothing; at least one is left over."""
        images_BL, lengths = layout.segments.get("image"), []
        common = _num_common([prompt.tokens["input_ids"] for prompt in batch.prompts if not prompt.media])
        for row, prompt in enumerate(batch.prompts):
            room = prompt.num_tokens - 1
            if not prompt.media:
                lengths.append(min(common, room) or room)
                continue
            places = [] if images_BL is None else images_BL[row].nonzero()[:, 0].tolist()
            if not places or places[-1] >= room:
                what = "says nowhere which tokens are its image's" if not places else "ends with its image"
                self._refuse(f"the prompt of row {row} {what}, so no prefix can be told from a question")
                return [0] * len(batch.prompts)
            lengths.append(places[-1] + 1)
        return lengths

    def _pays(self, keys: Sequence[bytes], lengths: Sequence[int]) -> bool:
        distinct = {key: length for key, length in zip(keys, lengths, strict=True) if key not in self._kept}
        return self.required or sum(lengths) - sum(distinct.values()) >= WORTHWHILE

    # Running ---------------------------------------------------------------------------------------------------

    def _prefixes(
        self, runtime: Runtime, batch: Rows, keys: list[bytes], lengths: list[int], keeps: list[bool]
    ) -> list[Prefix] | None:
        """Return the rows' prefixes, run or kept, once it has been tried that this is exact; else None."""
        untried = self._trials(batch)
        found, reason = dict(self._kept), ""
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in found}
        try:
            for length in sorted({lengths[row] for row in first.values()}):
                new = {key: row for key, row in first.items() if lengths[row] == length}
                found |= zip(new, self._run(runtime, batch.take(list(new.values())), length), strict=True)
            for row in untried.values():
                reason = reason or self._difference(runtime, batch, row, [found[key] for key in keys])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if not untried:
                raise
            reason = f"{type(self.model).__name__} does not run from a cache as it would need to ({error})"
        self._refuse(reason)
        if reason:
            return None
        self._tried |= untried.keys()
        self.num_run += len(first)
        prefixes = [found[key] for key in keys]
        for key, prefix, is_kept in zip(keys, prefixes, keeps, strict=True):
            if is_kept:
                self._kept[key] = prefix
                self._kept.move_to_end(key)
        while len(self._kept) > self.num_kept:
            self._kept.popitem(last=False)
        return prefixes

    def _run(self, runtime: Runtime, batch: Rows, length: int) -> list[Prefix]:
        """Run the first `length` tokens of rows, their edits acting; return each row's prefix."""
        if not batch.is_one_call and len(batch.prompts) > 1:
            return [self._run(runtime, batch.take([row]), length)[0] for row in range(len(batch.prompts))]
        inputs = {name: value[..., :length] for name, value in batch.tokens("right").items()}
        cache = empty_cache(self.model)
        with _scope(runtime, batch, "right"):
            self._forward(cache, **inputs, **batch.media())
        layers = layers_of(cache)
        return [
            Prefix([None if kv is None else clone_row(kv, row) for kv in layers], length)
            for row in range(len(batch.prompts))
        ]

    def _go_on(self, runtime: Runtime, batch: Rows, prefixes: Sequence[Prefix], generation: Mapping[str, Any]) -> Any:
        """Call `generate` with a cache that holds the prefixes."""
        cache = self._cache(runtime, batch, prefixes)
        num_beams, num_returned = (self._setting(generation, name) for name in ("num_beams", "num_return_sequences"))
        if (num_copies := max(num_beams or 1, num_returned or 1)) > 1:
            cache.batch_repeat_interleave(num_copies)
        with _scope(runtime, batch, "left", repeats=True):
            inputs = {**batch.tokens("left"), cache_name(self.model): cache}
            return self._class.generate(self.model, **inputs, **generation)

    def _cache(self, runtime: Runtime, batch: Rows, prefixes: Sequence[Prefix]) -> DynamicCache:
        """Return a cache of the prefixes, one a row, where rows are of one length; else of all but the last tokens."""
        lengths, nums = batch.num_tokens, [prefix.num_tokens for prefix in prefixes]
        if len(set(zip(nums, lengths, strict=True))) == 1:
            return filled(self.model, stack([prefix.layers for prefix in prefixes]), nums[0])
        width = max(lengths) - 1
        # A sliding window that forgets would forget, beside pads on the right, what a short row still needs.
        windows = windows_of(empty_cache(self.model))
        is_tight = bool(windows) and width >= min(windows)
        parts: dict[tuple[int, int], list[int]] = {}
        for row, (num, length) in enumerate(zip(nums, lengths, strict=True)):
            parts.setdefault((num, length if is_tight else 0), []).append(row)
        held = [self._behind(runtime, batch.take(rows), [prefixes[row] for row in rows]) for rows in parts.values()]
        places = [row for rows in parts.values() for row in rows]
        order = sorted(range(len(places)), key=places.__getitem__)
        return filled(self.model, stack(held, order), width)

    def _behind(self, runtime: Runtime, batch: Rows, prefixes: Sequence[Prefix]) -> Layers:
        """Run all but the last token of rows with prefixes of one length; return their caches, ending together."""
        num, width = prefixes[0].num_tokens, max(batch.num_tokens) - 1
        cache = filled(self.model, stack([prefix.layers for prefix in prefixes]), num)
        if width > num:
            inputs = {name: value[..., num:width] for name, value in batch.tokens("right").items()}
            inputs["attention_mask"] = batch.tokens("right")["attention_mask"][:, :width]
            with _scope(runtime, batch, "right"):
                self._forward(cache, **inputs)
        too_far_B = width + 1 - torch.tensor(batch.num_tokens)
        return [kv and moved(kv, too_far_B) for kv in layers_of(cache)]

    def _forward(self, cache: Cache, **inputs: Any) -> None:
        """Run the model until a cache is full."""
        if "logits_to_keep" in inspect.signature(self._class.forward).parameters:
            inputs["logits_to_keep"] = 1
        with ending_when_full(self.model, cache):
            self.model(**inputs, **{cache_name(self.model): cache}, use_cache=True)

    def _trials(self, batch: Rows) -> dict[tuple[tuple[str, ...], bool], int]:
        """Return the kinds of rows that were not tried yet, with and without pads before them, and a row of each."""
        shortest: dict[tuple[str, ...], int] = {}
        for row in sorted(range(len(batch.prompts)), key=batch.num_tokens.__getitem__, reverse=True):
            shortest[batch.prompts[row].kind] = row
        kinds = {(kind, batch.num_tokens[row] < batch.shape[1]): row for kind, row in shortest.items()}
        return {kind: row for kind, row in kinds.items() if kind not in self._tried}

    def _difference(self, runtime: Runtime, batch: Rows, row: int, prefixes: list[Prefix]) -> str:
        """Generate two tokens both ways, beside the longest row; return what is wrong with ours, "" if nothing is."""
        rows = sorted({row, batch.num_tokens.index(batch.shape[1])})
        pair, alone = batch.take(rows), batch.take([row])
        plain: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1}
        plain |= {"num_return_sequences": 1, "return_dict_in_generate": True, "output_logits": True}
        with _scope(runtime, alone, "left"):
            wanted = self._class.generate(self.model, **alone.tokens("left"), **alone.media(), **plain)
        got = self._go_on(runtime, pair, [prefixes[row] for row in rows], plain)
        error, which = 0.0, rows.index(row)
        for step, (wanted_BV, got_BV) in enumerate(zip(wanted.logits, got.logits, strict=True)):
            if wanted.sequences[0, alone.shape[1] :][:step].equal(got.sequences[which, pair.shape[1] :][:step]):
                difference_V = (wanted_BV[0] - got_BV[which])[wanted_BV[0].isfinite()]
                error = max(error, float(difference_V.abs().max() / wanted_BV[0][wanted_BV[0].isfinite()].abs().max()))
        if not error <= TOLERANCE[_precision(self.model)]:
            return f"{type(self.model).__name__} gives other logits from a cache (relative difference {error:.1e})"
        logger.info("sharing prefixes: %d of the %d tokens of row %d", prefixes[row].num_tokens, *alone.num_tokens, row)
        return ""

    # Refusing --------------------------------------------------------------------------------------------------

    def _setting(self, generation: Mapping[str, Any], name: str) -> Any:
        """Return a setting as `generate` reads it: the call's, else that of the call's config, else the model's."""
        configs = generation.get("generation_config"), self.model.generation_config
        said = (generation.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in said if value is not None), None)

    def _pad_id(self, generation: Mapping[str, Any]) -> int:
        """Return what pads prompts; penalties of repeated tokens see it, as they do in a plain batch."""
        pad = self._setting(generation, "pad_token_id")
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def _allows(self, generation: Mapping[str, Any]) -> bool:
        wrong = [name for name in OWN_CACHE if self._setting(generation, name) is not None]
        wrong += ["use_cache"] if self._setting(generation, "use_cache") is False else []
        if wrong and self.required:
            raise ValueError(f"prefixes cannot be shared with the setting `{wrong[0]}`: they live in the plain cache")
        return not wrong

    def _refuse(self, reason: str) -> None:
        if reason and self.required:
            raise ValueError(f"prefixes cannot be shared: {reason}; use `model.generate`")
        if reason and not self.refusal:
            logger.info("prefixes are not shared: %s", reason)
            self.refusal = reason

    def _runtime(self) -> Runtime:
        adapters = dict(self.model.named_children()).get(CHILD_NAME)
        if not isinstance(adapters, Adapters):
            raise ValueError(f"{type(self.model).__name__} has no interventions attached; use `vlreft.attach`")
        return adapters.runtime


class Questions:
    """Ask several questions, or several adapters, about one image: what comes before the question runs once.

        questions = vlreft.Questions(model, collator)
        answers = questions.ask(image, ["what color is it ?", "how many are there ?"], max_new_tokens=8)

    Answers are those of separate `model.generate` calls. The last `num_kept` images are kept between calls, as keys and
    values, where no edit touches them; so another adapter, or none, can be asked about them at the question's cost.
    Raises: ValueError where that is not exact; with `required=False` such calls go to `model.generate` as they are.
    """

    def __init__(self, model: PreTrainedModel, collator: Collator, *, num_kept: int = 1, required: bool = True) -> None:
        self.shared = SharedPrefixes(model, num_kept=num_kept, required=required)
        self.model, self.collator = model, collator

    def ask(self, image: Any, questions: Sequence[str], **generation: Any) -> list[str]:
        """Answer questions about one image (as `Collator` takes it), a list of images that each is about, or None."""
        if isinstance(questions, str):
            raise ValueError(f"`questions` must be a list of texts, got the text {questions!r}; put it into a list")
        pictures = {} if image is None else {"images": image} if isinstance(image, list | tuple) else {"image": image}
        return self.answer([{**pictures, "question": question} for question in questions], **generation)

    def answer(self, examples: Sequence[Mapping[str, Any]], **generation: Any) -> list[str]:
        """Answer examples as `Collator` takes them, in one batch; those that begin alike share their beginning.

        generation: arguments of `model.generate`; with `num_return_sequences` each has as many answers in a row.
        """
        if not len(examples):
            return []
        rows = [self.collator.prompts([example]) for example in examples]
        width = max(row["input_ids"].shape[1] for row in rows)
        output = self.shared.generate(rows, **generation)
        if output is None:
            batch = self.collator.prompts(examples)
            on_device = {name: to_device(value, self.model.device) for name, value in batch.items()}
            with torch.no_grad():
                output = self.model.generate(**on_device, **generation)  # pyright: ignore[reportCallIssue]
        return self.collator.decode(output if isinstance(output, Tensor) else output.sequences, width)


def _scope(runtime: Runtime, batch: Rows, side: Side, *, repeats: bool = False) -> AbstractContextManager[None]:
    """Lay out whole prompts, padded on one side, for forwards that hold a part of them."""
    tokens = batch.tokens(side)
    ids_BL, mask_BL = tokens["input_ids"], tokens["attention_mask"]
    return runtime.prompt(ids_BL, mask_BL, batch.shape, ids_BL.device, call=batch.media(), repeats=repeats)


def _num_common(rows: Sequence[Tensor]) -> int:
    """Return how many leading tokens are the same in all rows, each of shape (1, L)."""
    if not rows:
        return 0
    shortest = min(ids_1L.shape[1] for ids_1L in rows)
    ids_BL = torch.cat([ids_1L[:, :shortest] for ids_1L in rows])
    return int((ids_BL == ids_BL[:1]).all(0).cumprod(0).sum())


def _precision(model: PreTrainedModel) -> torch.dtype:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def _has_modules(model: PreTrainedModel) -> bool:
    """Return whether an adapter trains modules of the model, which a prefix may run through."""
    adapters = dict(model.named_children())[CHILD_NAME]
    assert isinstance(adapters, Adapters)
    return any(reft.config.modules_to_save for reft in adapters.refts.values())


def _forbidden_by(model: PreTrainedModel, runtime: Runtime) -> str:
    """Return why a kind of model shares no prefix, "" if it may."""
    if not isinstance(model, GenerationMixin) or runtime.batches.has_encoder:
        return f"{type(model).__name__} is no causal decoder"
    return "" if cache_name(model) else f"{type(model).__name__} takes no cache"
