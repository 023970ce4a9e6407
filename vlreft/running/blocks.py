"""`BlockWatch`: what a block was called with, for edits inside it and for blocks that run again in the backward pass.

Activation checkpointing runs a block's forward a second time, when the layout of its batch is long gone, and perhaps
after another batch's forward. Hooks on transformers' blocks stay outside of that; hooks on modules inside do not, and
open_clip recomputes the whole call of a block. The edits must be those of the first time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from vlreft.models.components import Target

Snapshot = Callable[[], AbstractContextManager[None]]
FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps a block's checkpointing function


class ScopedCheckpoint:
    """A block's checkpointing function that runs the block in the scope of its first run, however late it is."""

    def __init__(self, function: Callable[..., Any], snapshot: Callable[[], Snapshot]) -> None:
        self.function = function
        self.snapshot = snapshot

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `forward`. Raises ValueError where the edits inside would get no gradient."""
        is_reentrant = getattr(self.function, "keywords", {}).get("use_reentrant", False)
        needs = any(isinstance(value, Tensor) and value.requires_grad for value in args)
        if is_reentrant and not needs and torch.is_grad_enabled():
            raise ValueError(
                "reentrant activation checkpointing gives edits inside a block no gradient where nothing before the "
                'block has one; use {"use_reentrant": False}'
            )
        restore = self.snapshot()

        def in_its_scope(*inner: Any, **more: Any) -> Any:
            with restore():
                return forward(*inner, **more)

        return self.function(in_its_scope, *args, **kwargs)


class BlockWatch:
    """Watches the blocks that hold edited modules. `snapshot` takes what is going on and returns how to restore it."""

    def __init__(self, model: nn.Module, snapshot: Callable[[], Snapshot]) -> None:
        self.is_transformers = isinstance(model, PreTrainedModel)
        self.snapshot = snapshot
        self.handles: dict[nn.Module, Any] = {}
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.waiting: dict[nn.Module, nn.Module] = {}
        self.inner: dict[nn.Module, list[nn.Module]] = {}
        self._first_runs = WeakTensorKeyDictionary()
        self._recomputing: AbstractContextManager[None] | None = None

    def add(self, target: Target) -> None:
        """Watch the block of a module that an edit sits on, or the module itself if it is a block."""
        block = target.module if target.block is None else target.block
        if target.block is not None:
            self.inner.setdefault(block, []).append(target.module)
        if block not in self.handles:
            self.handles[block] = [
                block.register_forward_pre_hook(self._starts, prepend=True, with_kwargs=True),
                block.register_forward_hook(self._ends, always_call=True),
            ]

    def remove(self, target: Target) -> None:
        """Do not expect a module to run any more."""
        for modules in self.inner.values():
            if target.module in modules:
                modules.remove(target.module)

    def close(self) -> None:
        """Take all hooks off."""
        for block, handles in self.handles.items():
            for handle in handles:
                handle.remove()
            if isinstance(wrapped := block.__dict__.get(FUNCTION), ScopedCheckpoint):
                block.__dict__[FUNCTION] = wrapped.function

    def _starts(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = states_of(args, kwargs)
        self.shapes[block] = tuple(h.shape[:-1])
        self.waiting.update({module: block for module in self.inner.get(block, ())})
        function = block.__dict__.get(FUNCTION)
        if function is not None and not isinstance(function, ScopedCheckpoint):
            block.__dict__[FUNCTION] = ScopedCheckpoint(function, partial(self._snapshot_of, block))
        if self.is_transformers or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        # open_clip's recomputation gets the very same input; a new forward never does.
        if (restore := self._first_runs.get(h)) is not None:
            recomputing = restore()
            recomputing.__enter__()
            self._recomputing = recomputing
        else:
            self._first_runs[h] = self._snapshot_of(block)

    def _snapshot_of(self, block: nn.Module) -> Snapshot:
        restore, shape = self.snapshot(), self.shapes[block]

        @contextmanager
        def restored() -> Iterator[None]:
            before, self.shapes[block] = self.shapes[block], shape
            try:
                with restore():
                    yield
            finally:
                self.shapes[block] = before

        return restored

    def _ends(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._recomputing is not None:
            self._recomputing.__exit__(None, None, None)
            self._recomputing = None

    def in_the_blocks_shape(self, target: Target, h: Tensor, where: str) -> Tensor:
        """Return a module's states in its block's shape. Raises ValueError where they are cut otherwise."""
        if target.block is None:
            return h
        self.waiting.pop(target.module, None)
        shape = self.shapes.get(target.block)
        if shape is None or tuple(h.shape[:-1]) == shape:
            return h
        if h.dim() == 2 and h.shape[0] == torch.Size(shape).numel():
            return h.reshape(*shape, h.shape[-1])
        raise ValueError(
            f"{where}: its {type(target.module).__name__} works on states of shape {tuple(h.shape)} where the block "
            f"has {shape}, as windows of attention do; use component='output'"
        )

    def refuse_what_never_ran(self) -> None:
        """Raise ValueError for a module that its block did without: its edit would be lost without a word."""
        if not self.waiting:
            return
        module, block = next(iter(self.waiting.items()))
        self.waiting.clear()
        raise ValueError(
            f"a {type(block).__name__} ran and never called its {type(module).__name__}, which an intervention edits: "
            "use another component, or a module by its path"
        )


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state of a block's call, which some families pass by name."""
    if args:
        return args[0]
    return next(value for name, value in kwargs.items() if name.startswith("hidden_state"))
