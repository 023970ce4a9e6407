"""`Runtime`: the hooks of one model, shared by all that is attached to it, and the scope of one forward.

Shape suffixes: B = rows, L = tokens of the prompt's layout, T = tokens of this forward, D = width.

How a forward flows: the pre-hook of the model (or of an inner module that is called by itself) lays out the batch; the
pre-hook of a stack's owner begins a call of its stream, that of a tower notes what it is given; each chosen module's
hook selects positions once per position string and edits them, out of place; the model's own hook closes the scope.
During `generate` the layout is that of the caller's prompt.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlreft.layout import TokenLayout, text_layout
from vlreft.models.components import Target
from vlreft.models.sites import Site, Sites
from vlreft.placed import Placed, Switch
from vlreft.positions import Selection
from vlreft.running.batches import Batches, tokens_in
from vlreft.running.beside import Spot, refuse_frozen, spot_of
from vlreft.running.blocks import BlockWatch, Snapshot, states_of
from vlreft.running.outputs import add_to_first, states_in, with_states
from vlreft.running.pictures import image_grid
from vlreft.running.prompts import decoder_prompt_length, guess_attention_mask, num_rows_of, prompt_tokens
from vlreft.running.streams import Stream
from vlreft.running.towers import TowerCall

Key = tuple[str, int, str]  # site, layer, component


@dataclass(eq=False)
class _Hooked:
    """One hooked module and what is placed at it, in the order in which it acts."""

    site: Site
    layer: int
    target: Target
    handle: Any
    spot: Spot | None
    items: list[Placed] = field(default_factory=list)


class Runtime:
    """Hooks one model. Made by the first `attach`, gone with the last `detach`."""

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        """Register the hooks that belong to no edit; `place` registers the others."""
        self.model = model
        self.sites = sites
        self.hooked: dict[Key, _Hooked] = {}
        self.streams = {
            name: Stream(name, vocabulary, sites.model_name) for name, vocabulary in sites.vocabularies.items()
        }
        self.tower_call = TowerCall()
        self.boxes_B4: Tensor | None = None
        self.has_run: set[Key] = set()
        self.is_muted = False
        self.batches = Batches(model, sites)
        self._watch = BlockWatch(model, self._snapshot)
        self._is_transformers = isinstance(model, PreTrainedModel)
        self._opened_by: nn.Module | None = None
        self._handles: list[Any] = []
        self._hook_the_model()
        self._own_generate = model.__dict__.get("generate")
        if isinstance(model, PreTrainedModel) and callable(getattr(type(model), "generate", None)):
            model.generate = self.generate  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    def _hook_the_model(self) -> None:
        for name, stream in self.streams.items():
            site = self.sites.by_name[name]
            before = partial(self._owner_starts, stream, _forward_names(site.owner))
            self._handles.append(site.owner.register_forward_pre_hook(before, with_kwargs=True))
            for module in self._ways_in(site):
                before = partial(self._inner_enters, stream, _forward_names(module))
                self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                after = partial(self._inner_leaves, stream)
                self._handles.append(module.register_forward_hook(after, always_call=True))
            if not self._is_transformers:
                self._handles.append(
                    _embedding(self.model).register_forward_pre_hook(partial(self._ids_arrive, stream))
                )
        vision = self.sites.by_name.get("vision")
        if vision is not None and vision.tower is not None:
            tower = vision.tower.module
            before = partial(self._tower_starts, _forward_names(tower))
            self._handles.append(tower.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self._handles.append(tower.register_forward_hook(self._tower_leaves, always_call=True))
        names = _forward_names(self.model)
        self._handles += [
            self.model.register_forward_pre_hook(partial(self._enter, names), prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]

    def _ways_in(self, site: Site) -> list[nn.Module]:
        """Return the modules between the model and a stack's owner, itself included: people call them directly."""
        if not self._is_transformers:
            return []
        around = [module for module in self.model.modules() if any(inner is site.owner for inner in module.modules())]
        return [module for module in around if module is not self.model and not isinstance(module, nn.ModuleList)]

    # Attaching -------------------------------------------------------------------------------------------------

    def place(self, site: Site, layer: int, component: str, target: Target, placed: Placed) -> None:
        """Add an intervention; those at one module act in the order in which they were placed."""
        key = (site.name, layer, component)
        if key not in self.hooked:
            # In front of all other hooks: transformers records hidden states by hooks of its own, and LLaVA feeds its
            # projector from what they recorded.
            if target.at_input:
                hook = partial(self._edit_input, key)
                handle = target.module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                hook = partial(self._edit_output, key)
                handle = target.module.register_forward_hook(hook, prepend=True)
            is_leaf = next(target.module.children(), None) is None  # peft wraps no block
            what = f"the edit of site '{site.name}' layer {layer} ({component})"
            spot = spot_of(self.model, target.module, what) if is_leaf else None
            self.hooked[key] = _Hooked(site, layer, target, handle, spot)
            if target.block is not None or not self._is_transformers:
                self._watch.add(target)
        self.hooked[key].items.append(placed)

    def remove(self, switch: Switch) -> None:
        """Take out everything placed with `switch`, and the hooks nobody needs any more."""
        for key, hooked in list(self.hooked.items()):
            hooked.items = [placed for placed in hooked.items if placed.switch is not switch]
            if not hooked.items:
                hooked.handle.remove()
                self._watch.remove(hooked.target)
                del self.hooked[key]

    def close(self) -> None:
        """Remove the remaining hooks and give `generate` back."""
        for handle in self._handles:
            handle.remove()
        self._watch.close()
        if self._own_generate is not None:
            self.model.generate = self._own_generate  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
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
        call: Mapping[str, Any] | None = None,
        repeats: bool = False,
        num_start: int = 1,
    ) -> Iterator[None]:
        """Fix the prompt for all forwards inside; whatever they see beyond position L is an answer being generated.

        `call` are the other arguments, which may say more of the pictures. In an encoder-decoder the prompt is the
        encoder's, and the decoder begins with `num_start` tokens.
        """
        call = call or {}
        for placed in self.acting("text"):
            placed.positions.generated(torch.zeros(0, dtype=torch.long))  # refuses what decoding cannot know
        has_encoder = self.batches.has_encoder
        with ExitStack() as scopes:
            for name, stream in self.streams.items():
                if name == "text" and has_encoder:
                    mask_BL = call.get("decoder_attention_mask")
                    mask_BL = mask_BL if mask_BL is not None and mask_BL.shape == (shape[0], num_start) else None
                    layout = text_layout(
                        (shape[0], num_start), device, attention_mask_BL=mask_BL, grows=True, repeats=repeats
                    )
                else:
                    layout = text_layout(
                        shape,
                        device,
                        stream.vocabulary,
                        input_ids_BL=input_ids_BL,
                        attention_mask_BL=attention_mask_BL,
                        is_image_BL=self.batches.image_mask(call),
                        grows=name == "text",
                        repeats=repeats,
                    )
                scopes.enter_context(stream.fixed(layout, partial(image_grid, self.sites, call, self.boxes_B4)))
            yield

    @contextmanager
    def scope(self, layout: TokenLayout) -> Iterator[None]:
        """Use one layout for all forwards inside, each of which may hold a part of it, told by the cache's length."""
        with self.streams["text"].fixed(layout):
            yield

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Edit nothing inside: for forwards on tokens that no intervention selects."""
        before, self.is_muted = self.is_muted, True
        try:
            yield
        finally:
            self.is_muted = before

    @contextmanager
    def boxes(self, boxes_B4: Tensor) -> Iterator[None]:
        """Give each picture of the forwards inside its box."""
        before, self.boxes_B4 = self.boxes_B4, boxes_B4
        try:
            yield
        finally:
            self.boxes_B4 = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own `generate` with the caller's prompt as the layout of every forward in it."""
        model: Any = self.model
        own = self._own_generate or partial(type(model).generate, model)
        tokens = prompt_tokens(args, kwargs)
        num_start = decoder_prompt_length(model, kwargs) if self.batches.has_encoder else 1
        if self.sites.quirk.writes_prompt and "decoder_input_ids" not in kwargs and self.acting("text"):
            raise ValueError(
                f"{self.sites.model_name} cannot generate with edits of its decoder: {self.sites.quirk.why}, and does "
                "not say how long it is; pass `decoder_input_ids`"
            )
        if tokens is None and (num_rows := num_rows_of(kwargs)) is not None:
            # A picture alone: the decoder begins with its start token, or with what it is given.
            with self.prompt(None, None, (num_rows, 1), model.device, call=kwargs, repeats=True, num_start=num_start):
                return own(*args, **kwargs)
        if tokens is None:
            return own(*args, **kwargs)  # generate itself knows what to say about a call without a prompt
        ids_BL = tokens if tokens.dim() == 2 and not tokens.is_floating_point() else None
        mask_BL = kwargs.get("attention_mask")
        if mask_BL is None and ids_BL is not None:
            mask_BL = guess_attention_mask(model, ids_BL, args, kwargs)
        num_tokens = tokens.shape[1] - (0 if self.batches.has_encoder else self.sites.quirk.num_dropped)
        with self.prompt(
            None if ids_BL is None else ids_BL[:, :num_tokens],
            None if mask_BL is None else mask_BL[:, :num_tokens],
            (tokens.shape[0], num_tokens),
            tokens.device,
            call=kwargs,
            repeats=True,
            num_start=num_start,
        ):
            return own(*args, **kwargs)

    def _snapshot(self) -> Snapshot:
        """Take the calls that are going on; return how to bring them back."""
        calls = {stream: stream.current_call() for stream in self.streams.values()}
        tower_call = self.tower_call

        @contextmanager
        def restored() -> Iterator[None]:
            before, before_tower = {stream: stream.call for stream in calls}, self.tower_call
            for stream, call in calls.items():
                stream.call = call
            self.tower_call = tower_call
            try:
                yield
            finally:
                for stream, call in before.items():
                    stream.call = call
                self.tower_call = before_tower

        return restored

    # Hooks of a forward ----------------------------------------------------------------------------------------

    def edited(self, layout: TokenLayout) -> Tensor:
        """Return the mask_BL of tokens that anything acting on the text stream edits."""
        edited_BL = torch.zeros_like(layout.mask("prompt"))
        for placed in self.acting("text"):
            edited_BL = edited_BL | placed.join(placed.positions.masks(layout))
        return edited_BL

    def acting(self, stream: str) -> list[Placed]:
        """Return what is switched on among the edits of a stream; "" has the edits in towers."""
        return [
            item
            for hooked in self.hooked.values()
            if hooked.site.stream == stream
            for item in hooked.items
            if item.switch.on
        ]

    def _enter(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_prompt_BL = kwargs.pop("prompt_mask", None)
        self.has_run = set()
        if module.training and torch.is_grad_enabled():
            refuse_frozen((item for hooked in self.hooked.values() for item in hooked.items), self.model)
        for hooked in self.hooked.values():
            if hooked.spot is not None:
                hooked.spot.refuse_wrapped()
        call = dict(zip(names, args, strict=False)) | kwargs
        if self._is_transformers and not self.is_muted:
            for stream in self.streams.values():
                if not stream.is_fixed and self.acting(stream.name):
                    layout = self.batches.lay_out(
                        stream.name,
                        call,
                        self.acting(stream.name),
                        is_prompt_BL=is_prompt_BL,
                        training=module.training,
                    )
                    if layout is not None:
                        stream.open(layout, partial(image_grid, self.sites, call, self.boxes_B4))
        return args, kwargs

    def _inner_enters(
        self, stream: Stream, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Lay out the batch of an inner module that is called by itself, as `get_text_features` does."""
        if stream.scope is not None or self.is_muted or not self.acting(stream.name):
            return
        call = dict(zip(names, args, strict=False)) | kwargs
        if tokens_in(call) is None or (self.batches.has_encoder and stream.name == "text"):
            return
        acting = self.acting(stream.name)
        layout = self.batches.lay_out(stream.name, call, acting, training=module.training)
        if layout is not None:
            stream.open(layout)
            self._opened_by = module

    def _inner_leaves(self, stream: Stream, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._opened_by is module:
            stream.close()
            self._opened_by = None

    def _ids_arrive(self, stream: Stream, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Lay out the texts of an open_clip model: its tower is run by methods, and sees no ids but here."""
        ids_BL = F.pad(args[0], (0, stream.vocabulary.num_behind), value=stream.vocabulary.pad_id)
        stream.open(
            text_layout((ids_BL.shape[0], ids_BL.shape[1]), ids_BL.device, stream.vocabulary, input_ids_BL=ids_BL)
        )

    def _owner_starts(
        self, stream: Stream, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        stream.start_call(dict(zip(names, args, strict=False)) | kwargs, self.acting(stream.name))

    def _tower_starts(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tower_call = TowerCall(dict(zip(names, args, strict=False)) | kwargs, self.boxes_B4)

    def _tower_leaves(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tower_call = TowerCall()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Close the scope; give interventions whose module did not run a zero gradient.

        A batch without an image does not call the tower; without this, its parameters would have no gradient on this
        rank and data-parallel training would wait for ever.
        """
        for stream in self.streams.values():
            stream.close()
        if output is None:  # it did not come to its end
            self._watch.waiting.clear()
            return None
        self._watch.refuse_what_never_ran()
        if not (module.training and torch.is_grad_enabled()) or self.is_muted:
            return None
        idle = [
            item
            for key, hooked in self.hooked.items()
            if key not in self.has_run
            for item in hooked.items
            if item.switch.on
        ]
        if not idle:
            return None
        zeros = [parameter.sum() * 0.0 for placed in idle for parameter in placed.edit.parameters()]
        return add_to_first(output, torch.stack([zero.to(zeros[0]) for zero in zeros]).sum()) if zeros else None

    # Editing ---------------------------------------------------------------------------------------------------

    def _edit_output(self, key: Key, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = states_in(output)
        edited = self._edit(key, h)
        return None if edited is h else with_states(output, edited)

    def _edit_input(self, key: Key, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = states_of(args, kwargs)
        edited = self._edit(key, h)
        if edited is h:
            return None
        if args:
            return (edited, *args[1:]), kwargs
        return args, {name: edited if value is h else value for name, value in kwargs.items()}

    def _edit(self, key: Key, h: Tensor) -> Tensor:
        self.has_run.add(key)
        hooked = self.hooked[key]
        site, given = hooked.site, h
        h = self._watch.in_the_blocks_shape(hooked.target, h, f"site '{site.name}' layer {hooked.layer}")
        call = self.streams[site.stream].call if site.stream else None
        if self.is_muted or (call is not None and call.is_over):
            return given
        acting = sorted((item for item in hooked.items if item.switch.on), key=lambda item: item.switch.order)
        if not acting:
            return given
        if h.shape[-1] != hooked.target.width:
            raise ValueError(
                f"site '{site.name}' layer {hooked.layer}: its states are {tuple(h.shape)}, not of the width "
                f"{hooked.target.width} in their last dimension; use another component, or a module by its path"
            )
        if site.sequence_first:
            h = h.transpose(0, 1)
        for placed in acting:
            selection = self._select(site, placed.selecting, h)
            h = h if selection is None else placed.act(h, selection)
        h = h.transpose(0, 1) if site.sequence_first else h
        return h if h.shape == given.shape else h.reshape(given.shape)

    def _select(self, site: Site, placed: Placed, h: Tensor) -> Selection | None:
        if not site.stream:
            return self.tower_call.select(site, placed, tuple(h.shape[:-1]), h.device)
        if h.dim() != 3:
            raise ValueError(
                f"site '{site.name}' of {self.sites.model_name} has states of {h.dim()} dimensions, {tuple(h.shape)}: "
                "which tokens are which is not to be told; edit another site"
            )
        return self.streams[site.stream].current_call().select(placed, (h.shape[0], h.shape[1]), h.device)


def _forward_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _embedding(model: nn.Module) -> nn.Embedding:
    """Return the table of words of a model that is no transformers model."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings)


def forget_compiled_graphs() -> None:
    """Make torch.compile look at hooks and switches again: it does not guard on them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
