"""`Runtime`: the hooks of one model, shared by all that is attached to it, and the scope of one forward.

Shape suffixes: B = rows, L = tokens of the prompt's layout, T = tokens of this forward, P = selected slots, D = width.

How a forward flows: the root pre-hook lays out the batch; the pre-hook of the text stack's owner reads how many tokens
the cache already holds; each chosen block's hook selects positions once per position string and edits them, out of
place; the root hook closes the scope. During `generate` the layout is that of the caller's prompt, and tokens are told
apart by absolute position (tokens in the cache + place in this call), never by counting calls: chunked prefill, static
caches, beams, assisted decoding and recomputation without a cache all agree.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from vlreft.layout import TokenLayout, prompt_from_labels, refuse_bad_labels, text_layout, tower_layout
from vlreft.placed import Placed, Switch
from vlreft.positions import All, Positions, Selection, select
from vlreft.sites import Site, Sites


class Runtime:
    """Hooks one model. Made by the first `attach`, gone with the last `detach`."""

    def __init__(self, model: PreTrainedModel, sites: Sites) -> None:
        """Register the hooks that belong to no block; `place` registers the others."""
        self.model = model
        self.sites = sites
        self.placed: dict[tuple[str, int], list[Placed]] = {}
        self.prompt_layout: TokenLayout | None = None
        self.layout: TokenLayout | None = None
        self.offset: int | Tensor = 0
        self.has_cache = False
        self.sites_run: set[str] = set()
        self.masks: dict[str, tuple[Tensor, ...]] = {}
        self.selections: dict[tuple[object, ...], Selection | None] = {}
        self.looked_at_a_batch = False
        self.is_muted = False
        self._forward_names = list(inspect.signature(type(model).forward).parameters)[1:]
        owner = sites["text"].owner
        self._owner_names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self._handles = [
            owner.register_forward_pre_hook(self._text_starts, with_kwargs=True),
            model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        self._block_handles: dict[tuple[str, int], Any] = {}
        self._own_generate = model.__dict__.get("generate")
        if isinstance(model, GenerationMixin):
            model.generate = self.generate  # pyright: ignore[reportAttributeAccessIssue]

    # Attaching -------------------------------------------------------------------------------------------------

    def place(self, site: Site, layer: int, placed: Placed) -> None:
        """Add an intervention at a block; interventions on one block act in the order in which they were placed."""
        key = (site.name, layer)
        self.placed.setdefault(key, []).append(placed)
        if key in self._block_handles:
            return
        # In front of all other hooks: transformers records hidden states by hooks of its own, and LLaVA feeds its
        # projector from what they recorded.
        if site.edits_input:
            hook = partial(self._edit_input, site, layer)
            self._block_handles[key] = site.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
        else:
            hook = partial(self._edit_output, site, layer)
            self._block_handles[key] = site.blocks[layer].register_forward_hook(hook, prepend=True)

    def remove(self, switch: Switch) -> None:
        """Take out everything placed with `switch`, and the hooks nobody needs any more."""
        for key in list(self.placed):
            self.placed[key] = [placed for placed in self.placed[key] if placed.switch is not switch]
            if not self.placed[key]:
                del self.placed[key]
                self._block_handles.pop(key).remove()

    def close(self) -> None:
        """Remove the remaining hooks and give `generate` back."""
        for handle in self._handles:
            handle.remove()
        if self._own_generate is not None:
            self.model.generate = self._own_generate  # pyright: ignore[reportAttributeAccessIssue]
        else:
            self.model.__dict__.pop("generate", None)

    # Scopes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def prompt(
        self,
        input_ids_BL: Tensor | None,
        attention_mask_BL: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        *,
        repeats: bool = False,
    ) -> Iterator[None]:
        """Fix the prompt for all forwards inside; whatever they see beyond position L is an answer being generated."""
        layout = text_layout(
            shape,
            device,
            input_ids_BL=input_ids_BL,
            attention_mask_BL=attention_mask_BL,
            image_token_ids=self.sites.image_token_ids,
            grows=True,
            repeats=repeats,
        )
        for placed in self._acting("text"):
            placed.positions.generated(torch.zeros(0, dtype=torch.long))  # refuses what decoding cannot know
        with self.scope(layout):
            yield

    @contextmanager
    def scope(self, layout: TokenLayout) -> Iterator[None]:
        """Use one layout for all forwards inside, each of which may hold a part of it, told by the cache's length."""
        before = self.prompt_layout
        self.prompt_layout, self.masks, self.selections = layout, {}, {}
        try:
            yield
        finally:
            self.prompt_layout, self.masks, self.selections = before, {}, {}

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Edit nothing inside: for forwards on tokens that no intervention selects."""
        before, self.is_muted = self.is_muted, True
        try:
            yield
        finally:
            self.is_muted = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own `generate` with the caller's prompt as the layout of every forward in it."""
        own = self._own_generate or partial(type(self.model).generate, self.model)  # pyright: ignore[reportAttributeAccessIssue]
        tokens = next(iter(args), None)
        for name in ("inputs", "input_ids", "inputs_embeds"):
            tokens = kwargs.get(name) if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return own(*args, **kwargs)  # generate itself knows what to say about a call without a prompt
        ids_BL = tokens if tokens.dim() == 2 else None
        mask_BL = kwargs.get("attention_mask")
        if mask_BL is None and ids_BL is not None:
            mask_BL = self._guess_attention_mask(ids_BL, args, kwargs)
        with self.prompt(ids_BL, mask_BL, (tokens.shape[0], tokens.shape[1]), tokens.device, repeats=True):
            return own(*args, **kwargs)

    def _guess_attention_mask(
        self, input_ids_BL: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Follow `generate`'s own rule for a call without a mask: pads are masked unless pad is also an end token.

        What counts as pad and end is said by the call, else by the call's config, else by the model's.
        """
        of_call = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        said: dict[str, Any] = {}
        for name in ("pad_token_id", "eos_token_id"):
            configs = (kwargs.get(name), getattr(of_call, name, None), getattr(self.model.generation_config, name))
            said[name] = next((value for value in configs if value is not None), None)
        pad, eos = said["pad_token_id"], said["eos_token_id"]
        ends = eos if isinstance(eos, list) else [eos]
        return None if pad is None or pad in ends else input_ids_BL != pad

    # Hooks of a forward ----------------------------------------------------------------------------------------

    def edited(self, layout: TokenLayout) -> Tensor:
        """Return the mask_BL of tokens that anything acting on the text stream edits."""
        edited_BL = torch.zeros_like(layout.mask("prompt"))
        for placed in self._acting("text") + self._acting("connector"):
            edited_BL = edited_BL | placed.join(placed.positions.masks(layout))
        return edited_BL

    def _acting(self, site: str) -> list[Placed]:
        return [item for key, items in self.placed.items() if key[0] == site for item in items if item.switch.on]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_prompt_BL = kwargs.pop("prompt_mask", None)
        self.sites_run = set()
        acting = self._acting("text") + self._acting("connector")
        if self.prompt_layout is None and acting and not self.is_muted:
            call = dict(zip(self._forward_names, args, strict=False)) | kwargs
            self.masks, self.selections = {}, {}
            self.layout = self.layout_of(call, is_prompt_BL, module.training)
        return args, kwargs

    def layout_of(self, call: Mapping[str, Any], is_prompt_BL: Tensor | None, training: bool) -> TokenLayout:
        """Lay out a batch given as the model's own arguments. Raises ValueError where it means nothing."""
        acting = self._acting("text") + self._acting("connector")
        ids_BL = call.get("input_ids")
        tokens = ids_BL if ids_BL is not None else call.get("inputs_embeds")
        if tokens is None:
            raise ValueError("the model was called without `input_ids` and `inputs_embeds`: positions need tokens")
        shape, labels = (tokens.shape[0], tokens.shape[1]), call.get("labels")
        cache = cache_in(call.values())
        if cache is not None and _is_filled(cache):
            raise ValueError(
                "a forward that continues a cache outside of `generate`: nothing says which tokens are the prompt; "
                "run it inside `with reft.prompt(input_ids, attention_mask):`"
            )
        mask_BL = call.get("attention_mask")
        if mask_BL is not None and (not isinstance(mask_BL, Tensor) or mask_BL.shape != shape):
            got = tuple(mask_BL.shape) if isinstance(mask_BL, Tensor) else type(mask_BL).__name__
            raise ValueError(f"`attention_mask` must have the shape of the tokens, {shape}, got {got}")
        generative = isinstance(self.model, GenerationMixin)
        labels_BL = labels if isinstance(labels, Tensor) and labels.shape == shape and generative else None
        given = is_prompt_BL is not None
        if not given and labels_BL is not None:
            is_prompt_BL = prompt_from_labels(labels_BL)
        if is_prompt_BL is None and training and generative:
            _refuse_unknown_prompt(acting)
        layout = text_layout(
            shape,
            tokens.device,
            input_ids_BL=ids_BL,
            attention_mask_BL=mask_BL,
            is_prompt_BL=is_prompt_BL,
            image_token_ids=self.sites.image_token_ids,
        )
        self._look_at(layout, None if given else labels_BL, acting)
        return layout

    def _look_at(self, layout: TokenLayout, labels_BL: Tensor | None, acting: list[Placed]) -> None:
        """Refuse batches that mean nothing. On an accelerator looking means waiting for it: there, only the first."""
        on_cpu = layout.mask("prompt").device.type == "cpu"
        if torch.compiler.is_compiling() or (self.looked_at_a_batch and not on_cpu):
            return
        self.looked_at_a_batch = True
        if labels_BL is not None:
            refuse_bad_labels(labels_BL)
        needs_prompt = any(placed.positions.segment != "response" for placed in acting)
        empty_B = ~layout.mask("prompt").any(1)
        if needs_prompt and bool(empty_B.any()):
            row = int(empty_B.nonzero()[0])
            raise ValueError(
                f"row {row} of the batch has no prompt token: its labels start at the first token, so there is nothing "
                "before the answer to edit; label the answer only (-100 elsewhere)"
            )

    def _text_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(zip(self._owner_names, args, strict=False)) | kwargs
        cache = cache_in(call.values())
        self.selections, self.offset, self.has_cache = {}, 0, cache is not None
        if cache is not None:
            # A static cache hands out its live counter, which moves while the blocks run: copy it.
            length = cache.get_seq_length()
            self.offset = length + 0
            if isinstance(length, Tensor) and length.device.type == "cpu" and not torch.compiler.is_compiling():
                self.offset = int(length)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Close the scope; give interventions of a tower that did not run a zero gradient.

        A batch without an image does not call the tower; without this, its parameters would have no gradient on this
        rank and data-parallel training would wait for ever.
        """
        self.layout, self.masks, self.selections = None, {}, {}
        if output is None or not (module.training and torch.is_grad_enabled()):
            return None
        idle = [] if "vision" in self.sites_run else self._acting("vision")
        if not idle:
            return None
        zero = sum(param.sum() * 0.0 for placed in idle for param in placed.edit.parameters())
        if isinstance(output, dict):
            first = next(iter(output))  # the loss if there is one, else logits, or states where there is no head
            output[first] = output[first] + zero
            return output
        return (output[0] + zero, *output[1:])

    # Editing ---------------------------------------------------------------------------------------------------

    def _edit_output(self, site: Site, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h_BTD = output[0] if isinstance(output, tuple | list) else output
        edited_BTD = self._edit(site, layer, h_BTD)
        if edited_BTD is h_BTD:
            return None
        if isinstance(output, tuple | list):
            return type(output)((edited_BTD, *output[1:]))
        return edited_BTD

    def _edit_input(
        self, site: Site, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        edited_BTD = self._edit(site, layer, args[0])
        return None if edited_BTD is args[0] else ((edited_BTD, *args[1:]), kwargs)

    def _edit(self, site: Site, layer: int, h: Tensor) -> Tensor:
        self.sites_run.add(site.name)
        if self.is_muted:
            return h
        for placed in self.placed[site.name, layer]:
            if placed.switch.on:
                selection = self._select_in_tower(site, placed, h) if site.name == "vision" else self._select(placed, h)
                h = h if selection is None else placed.apply(h, selection)
        return h

    def _select(self, placed: Placed, h_BTD: Tensor) -> Selection | None:
        key = (placed.positions.text, placed.part, h_BTD.shape[:2], h_BTD.device)
        if key not in self.selections:
            masks = self._masks_of_call(placed.positions, h_BTD)
            mask_BT = None if masks is None else placed.join(masks).to(h_BTD.device)
            self.selections[key] = None if mask_BT is None else select(mask_BT, placed.num_slots)
        return self.selections[key]

    def _masks_of_call(self, positions: Positions, h_BTD: Tensor) -> tuple[Tensor, ...] | None:
        """Return one mask_BT per part for the tokens of this call; None if none of them can be selected."""
        layout = self.prompt_layout if self.prompt_layout is not None else self.layout
        if layout is None:
            raise ValueError(
                "the text blocks ran outside of a call of the model itself, so nothing says which tokens are the "
                "prompt; call the model, or run it inside `with reft.prompt(...)` or `with reft.disabled()`"
            )
        num_rows, num_tokens = h_BTD.shape[0], h_BTD.shape[1]
        if isinstance(self.offset, int):
            self._check_call(layout, num_tokens)
            if self.offset >= layout.num_tokens and positions.segment != "response":
                return None
        if positions.text not in self.masks:
            self.masks[positions.text] = positions.masks(layout)
        masks = self.masks[positions.text]
        if not (isinstance(self.offset, int) and self.offset == 0 and num_tokens == layout.num_tokens):
            masks = positions.window(masks, layout, self.offset, num_tokens)
        if num_rows != layout.num_rows:
            copies, rest = divmod(num_rows, layout.num_rows)
            if rest or not layout.repeats:
                raise ValueError(f"the text blocks run on {num_rows} rows, the prompt has {layout.num_rows}")
            masks = tuple(mask_BT.repeat_interleave(copies, 0) for mask_BT in masks)  # beams, return sequences
        return masks

    def _check_call(self, layout: TokenLayout, num_tokens: int) -> None:
        """Refuse a call whose tokens cannot be told: never edit by guess."""
        assert isinstance(self.offset, int)
        end = self.offset + num_tokens
        cut = num_tokens < layout.num_tokens and not self.has_cache
        if cut or (end > layout.num_tokens and not layout.grows):
            raise ValueError(
                f"the text blocks run on tokens {self.offset} to {end} while the batch has {layout.num_tokens}: "
                f"{self.sites.model_name} feeds its text stack something else than `input_ids`, or keeps a cache that "
                "vlreft cannot read"
            )

    def _select_in_tower(self, site: Site, placed: Placed, h: Tensor) -> Selection:
        packed = h.dim() == 2
        if packed and not all(isinstance(item, All) for item in placed.positions.selects):
            raise ValueError(
                f"positions '{placed.positions.text}' select tokens of each image, but {self.sites.model_name} packs "
                "all images into one row; use 'patches'"
            )
        num_rows, num_tokens = (1, h.shape[0]) if packed else (h.shape[0], h.shape[1])
        masks = placed.positions.masks(tower_layout(num_tokens, site.num_cls, h.device))
        return select(placed.join(masks).expand(num_rows, -1), placed.num_slots)


def cache_in(values: Iterable[object]) -> Cache | None:
    """Return the cache among a call's or an output's values: transformers 5.24 changed its name, not its type."""
    for value in values:
        if isinstance(value, Cache):
            return value
    return None


def cache_name(model: nn.Module) -> str:
    """Return what the model's forward calls its cache, "" if it takes none."""
    names = inspect.signature(type(model).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), "")


def _is_filled(cache: Cache) -> bool:
    """Return whether a cache holds tokens; a static one counts them on the device, which costs a synchronisation."""
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return False
    return bool(length > 0)


def _refuse_unknown_prompt(acting: list[Placed]) -> None:
    for placed in acting:
        if placed.positions.needs_prompt_end:
            raise ValueError(
                f"positions '{placed.positions.text}' need to know where the prompt ends, but this training step has "
                "neither `labels` nor a `prompt_mask`; pass one of them to the model (vlreft.ReftTrainer and "
                "vlreft.ReftMixin pass the mask on even when the trainer takes the labels away)"
            )


def forget_compiled_graphs() -> None:
    """Make torch.compile look at hooks and switches again: it does not guard on them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
