"""`FeatureCache`: what a frozen vision tower makes of a picture is computed once.

    cache = vlreft.FeatureCache("2GB")            # or FeatureCache("200GB", folder="features"), for several processes
    with cache.on(model):
        trainer.train()

Inside `on`, the model's own `get_image_features` answers from the cache: tower and connector run for pictures that were
never seen, and for these alone. It is the one way to pictures that families share, with `generate` too, and whatever
looks at a model's arguments still finds the pixels there. Where something behind the tower is trained, and in families
that run their tower without that method, the tower's forward answers instead.

Nothing is looked up by family. The first call of a kind runs both ways, and what comes of it is compared before it is
relied on; pictures that cannot be told apart are kept as whole batches.
"""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from vlreft.models.sites import TEXT_STREAMS, Site, Sites, find_sites
from vlreft.models.stacks import sub_configs
from vlreft.reft import Adapters
from vlreft.reuse.changes import Changes
from vlreft.reuse.pieces import (
    NoPieces,
    Rule,
    Tree,
    content_key,
    device_of,
    find_rule,
    is_close,
    join,
    join_arguments,
    lean,
    pack,
    split_arguments,
    take,
    unpack,
    whole,
)
from vlreft.reuse.stores import FolderStore, MemoryStore, Store, bytes_of
from vlreft.running.hooks import forget_compiled_graphs

logger = logging.getLogger("vlreft")

METHOD = "get_image_features"
# Arguments that training and generation hand on through everything, and that no picture depends on.
IGNORED = ("num_items_in_batch", "use_cache", "output_router_logits")
# What a config says that changes no feature.
IRRELEVANT = ("_name_or_path", "name_or_path", "use_cache", "transformers_version", "_commit_hash", "architectures")
# Whose forward hooks are known: ours, which `_Way.edited` asks, and those that record states.
KNOWN_HOOKS = ("vlreft.", "transformers.")
NORMS = nn.modules.batchnorm._BatchNorm
DROPOUTS = nn.modules.dropout._DropoutNd


class FeatureCache:
    """Keeps the features of pictures, least recently used first to go; one cache serves any number of models.

    budget: bytes, or a text as "2GB". folder: keep them there, in safetensors files, instead of in memory; processes
    and later runs share it. A feature is known by the pixels and all else that the processor made for the picture, and
    by every number of the tower: nothing stale is found, but where numbers were written to through `tensor.data`.
    num_hits, num_misses: pictures that were found, and that had to be computed. Raises ValueError for a budget that is
    none.
    """

    def __init__(self, budget: int | str = "2GB", folder: str | os.PathLike[str] | None = None) -> None:
        num_bytes = bytes_of(budget)
        self.store: Store = MemoryStore(num_bytes) if folder is None else FolderStore(Path(folder), num_bytes)
        self.num_hits = 0
        self.num_misses = 0
        self._changes = Changes()
        self._learned: WeakKeyDictionary[nn.Module, dict[str, _Learned]] = WeakKeyDictionary()

    def _learned_of(self, module: nn.Module, name: str) -> "_Learned":
        return self._learned.setdefault(module, {}).setdefault(name, _Learned())

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return self.store.num_bytes()

    @contextmanager
    def on(self, model: nn.Module, *, required: bool = True) -> Iterator[None]:
        """Answer from the cache inside; afterwards, also after an exception, the model is as it was.

        Of the features, an output of the model holds what its language model read of them, and no states of the tower.
        Where features may change, as with an intervention in the tower, nothing is kept: with `required` that is a
        ValueError with the reason, else the reason is logged once and the tower runs as usual. Interventions at the
        connector act behind what is kept.
        """
        ways = _Ways(self, model, required)
        ways.check()
        with ways.opened():
            yield


@dataclass(frozen=True, eq=False)
class _Kind:
    """What the first call of a kind gave: the type of its output, where it was, how pictures lie in it (None: unknown).

    A kind are the names and shapes that a call has, and whether it holds several pictures.
    """

    output: type
    device: torch.device
    rule: Rule | None


@dataclass(eq=False)
class _Learned:
    """What is known of one function: its kinds of calls, and a hash of the numbers that it reads at these versions."""

    kinds: dict[object, _Kind] = field(default_factory=dict)
    versions: list[tuple[int, int, int]] = field(default_factory=list)
    numbers: str = ""


@dataclass(eq=False)
class _Way:
    """One function of one module that is answered from the cache.

    inside: the modules that its answer depends on. shorten: what of its output is kept. own: the function itself.
    learned: what is known of it from earlier calls, also of earlier scopes. refused: why calls of a kind are not kept.
    changes: tells whether its numbers have changed.
    """

    model: nn.Module
    module: nn.Module
    name: str
    inside: frozenset[nn.Module]
    shorten: Callable[[Any], Tree]
    learned: _Learned
    changes: Changes
    refused: dict[object, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own: Callable[..., Any] = getattr(self.module, self.name)
        self.signature = inspect.signature(self.own)
        self.defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.default is not parameter.empty
        }
        own = [(path, module) for path, module in self.module.named_modules() if module in self.inside]
        self.tensors = {
            f"{path}.{name}": tensor
            for path, module in own
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }

    def edited(self) -> str:
        """Return what that is attached acts on the features, "" if nothing does."""
        for adapters in self.model.children():
            if not isinstance(adapters, Adapters):
                continue
            for hooked in adapters.runtime.hooked.values():
                if hooked.target.module in self.inside and any(placed.switch.on for placed in hooked.items):
                    return f"an intervention at site '{hooked.site.name}' layer {hooked.layer} edits them on their way"
            for head in adapters.head_hooks:
                if head.base in self.inside and head.switch.on:
                    return f"`modules_to_save` trains '{head.path}', through which they go"
        return ""

    def forbidden(self) -> str:
        """Return why the features may change, "" if they may not."""
        if reason := self.edited():
            return reason
        if torch.is_grad_enabled():
            for name, tensor in self.tensors.items():
                if tensor.requires_grad:
                    return f"'{name}', through which they go, is trainable"
        for module in self.inside:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                name = getattr(getattr(hook, "func", hook), "__module__", "") or ""
                if not name.startswith(KNOWN_HOOKS):
                    return f"a forward hook of '{name}' on a {type(module).__name__} may do what it likes with them"
            if isinstance(module, DROPOUTS) and module.training and module.p > 0:
                return "dropout draws them at random in training"
            if isinstance(module, NORMS) and module.training and module.track_running_stats:
                return "batch normalisation follows, in training, the pictures that it sees"
        return ""

    def fingerprint(self) -> str:
        """Return a hash of all that features depend on beside the picture; numbers are read again if they changed."""
        versions = self.changes.versions(self.tensors.values())
        if versions != self.learned.versions:
            self.learned.versions, self.learned.numbers = versions, content_key(self.tensors)
        config = getattr(self.module, "config", None)
        settings = [
            [name, key, repr(value)]
            for name, part in (sub_configs(config) if isinstance(config, PreTrainedConfig) else ())
            for key, value in sorted(vars(part).items())
            if key not in IRRELEVANT and not isinstance(value, PreTrainedConfig)
        ]
        return content_key(_written(self.own), transformers.__version__, self.learned.numbers, settings)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name. Raises NoPieces for one that has arguments without a name."""
        given: dict[str, Any] = {}
        for name, value in self.signature.bind(*args, **kwargs).arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise NoPieces(f"{type(self.module).__name__}.{self.name} takes arguments without a name")
            else:
                given[name] = value
        return given


class _Ways:
    """The functions of one model that are answered from a cache, while its scope is open."""

    def __init__(self, cache: FeatureCache, model: nn.Module, required: bool) -> None:
        self.cache = cache
        self.required = required
        self.name = type(model).__name__
        self.refused: set[str] = set()
        self.is_running = False
        self.was_asked = False
        sites = find_sites(model)
        vision = sites.by_name.get("vision")
        tower = vision.tower.module if vision is not None and vision.tower is not None else None
        if tower is not None and any(site.owner in set(tower.modules()) for site in _texts(sites)):
            tower = None
        self.model = model
        owner, inside = _features_owner(sites, tower)
        self.features = None if owner is None else self._way(owner, METHOD, inside, lean)
        self.tower = None
        if tower is not None:
            self.tower = self._way(tower, "forward", frozenset(tower.modules()), whole)
        self.all = [way for way in (self.features, self.tower) if way is not None]

    def _way(self, module: nn.Module, name: str, inside: frozenset[nn.Module], shorten: Callable[[Any], Tree]) -> _Way:
        learned = self.cache._learned_of(module, name)
        return _Way(self.model, module, name, inside, shorten, learned, self.cache._changes)

    def check(self) -> None:
        """Refuse a model of which nothing can be kept."""
        if not self.all:
            self.refuse(f"no vision tower and no `{METHOD}` was found in it")
        else:
            self.refuse(self.all[-1].edited())

    def refuse(self, reason: str) -> None:
        """Raise ValueError with a reason, or log it once; do nothing if there is none."""
        if reason and self.required:
            raise ValueError(f"features of {self.name} cannot be kept: {reason}")
        if reason and reason not in self.refused:
            logger.info("features of %s are not kept: %s", self.name, reason)
            self.refused.add(reason)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Answer inside; give the functions back afterwards, unless somebody has replaced them since."""
        before = [way.module.__dict__.get(way.name) for way in self.all]
        answers = [self._answer_of(way) for way in self.all]
        forget_compiled_graphs()  # compiled code would go on to call the functions that it knows
        for way, answer in zip(self.all, answers, strict=True):
            setattr(way.module, way.name, answer)
        try:
            yield
        finally:
            for way, answer, own in zip(self.all, answers, before, strict=True):
                if way.module.__dict__.get(way.name) is answer:
                    delattr(way.module, way.name)
                    if own is not None:
                        setattr(way.module, way.name, own)
            if self.all and self.tower is None and not self.was_asked:
                logger.info("features of %s are not kept: `%s` was never called in it", self.name, METHOD)
            self.all = []
            forget_compiled_graphs()

    def _answer_of(self, way: _Way) -> Callable[..., Any]:
        @functools.wraps(way.own)
        def answer(*args: Any, **kwargs: Any) -> Any:
            # Running already: the tower inside of the features. Closed: somebody has wrapped this and kept it.
            if self.is_running or way not in self.all:
                return way.own(*args, **kwargs)
            return self._answer(way, args, kwargs)

        return torch.compiler.disable(answer)

    def _answer(self, way: _Way, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.was_asked = True
        reason = way.forbidden()
        if not reason:
            try:
                return self._kept(way, way.arguments(args, kwargs))
            except NoPieces as error:
                reason = str(error)
        elif way is self.features and self.tower is not None:
            return way.own(*args, **kwargs)  # the tower answers, if anything does
        self.refuse(reason)
        return self._run(way, args, kwargs)

    def _run(self, way: _Way, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        before, self.is_running = self.is_running, True
        try:
            return way.own(*args, **kwargs)
        finally:
            self.is_running = before

    def _lean(self, way: _Way, arguments: Mapping[str, Any]) -> Tree:
        with torch.no_grad():
            return way.shorten(self._run(way, (), arguments))

    def _kept(self, way: _Way, given: dict[str, Any]) -> Any:
        """Answer a call from the cache. Raises NoPieces where that may not be."""
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        if not tensors:
            return self._run(way, (), given)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise NoPieces("a gradient of the pixels is asked for")
        aside = {name: value for name, value in given.items() if name in IGNORED}
        parts = split_arguments({name: value for name, value in given.items() if name not in aside})
        said = {name: value for name, value in parts[0].items() if value is not None}
        shapes = {n: v.dim() if isinstance(v, Tensor) else type(v).__name__ for n, v in said.items()}
        number = (len(parts) > 1, way.module.training, *sorted(shapes.items()))
        parts = [aside | part for part in parts]
        if number in way.refused:
            raise NoPieces(way.refused[number])
        try:
            if (kind := way.learned.kinds.get(number)) is not None:
                tree = self._known(way, kind, given, parts)
            else:
                kind, tree = self._first(way, given, parts)
                way.learned.kinds[number] = kind
        except NoPieces as error:
            way.refused[number] = str(error)
            raise
        if issubclass(kind.output, ModelOutput) and is_dataclass(kind.output):
            return kind.output(**{item.name: tree.get(item.name) for item in fields(kind.output)})
        return tree

    def _known(self, way: _Way, kind: _Kind, given: dict[str, Any], parts: list[dict[str, Any]]) -> Tree:
        """Return what is known of the pictures of a call, and run the others."""
        rule: Rule = "same"
        if kind.rule is None:
            parts = [given]
        else:
            rule = kind.rule
        keys = self._keys(way, parts)
        found = {key: self.cache.store.get(key) for key in keys}
        unknown = {key: part for key, part in zip(keys, parts, strict=True) if found[key] is None}
        self.cache.num_misses += len(unknown)
        self.cache.num_hits += len(keys) - len(unknown)
        pieces = {key: unpack(packed, kind.device) for key, packed in found.items() if packed is not None}
        if unknown:
            tree = self._lean(way, given if len(unknown) == len(parts) else join_arguments(list(unknown.values())))
            for place, key in enumerate(unknown):
                pieces[key] = take(tree, rule, place, len(unknown))
                self._keep(key, pieces[key])
            if len(unknown) == len(parts):
                return tree
        return join([pieces[key] for key in keys], rule)

    def _keys(self, way: _Way, parts: Sequence[Mapping[str, Any]]) -> list[str]:
        device = next(value.device for value in parts[0].values() if isinstance(value, Tensor)).type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        common = content_key(way.fingerprint(), device, precision)
        named = [{**way.defaults, **part} for part in parts]
        return [content_key(common, {n: v for n, v in part.items() if n not in IGNORED}) for part in named]

    def _first(self, way: _Way, given: dict[str, Any], parts: list[dict[str, Any]]) -> tuple[_Kind, Tree]:
        """Run the first call of a kind both ways. Raises NoPieces if what comes of it may not be relied on."""
        with torch.no_grad():
            output = self._run(way, (), given)
        tree = way.shorten(output)
        rule = self._rule(way, tree, parts) if len(parts) > 1 else None
        if rule is None:
            if not is_close(tree, self._lean(way, given)):
                raise NoPieces("the same pictures give other features when they are run again")
            parts, pieces = [given], [tree]
        else:
            pieces = [take(tree, rule, place, len(parts)) for place in range(len(parts))]
        for key, piece in zip(self._keys(way, parts), pieces, strict=True):
            if (known := self.cache.store.get(key)) is None:
                self._keep(key, piece)
            elif not is_close(piece, unpack(known, device_of(piece))):
                raise NoPieces("what was kept of a picture is not what its tower makes of it now")
        self.cache.num_misses += len(pieces)
        what = "one by one" if rule is not None else "as they come, one call together"
        logger.info("features of %s are kept %s (%s.%s)", self.name, what, type(way.module).__name__, way.name)
        return _Kind(type(output), device_of(tree), rule), tree

    def _rule(self, way: _Way, tree: Tree, parts: list[dict[str, Any]]) -> Rule | None:
        """Return how pictures lie in what they gave together; None if each of them gives something else by itself."""
        num_pictures = len(parts)
        try:
            first, rest = self._lean(way, parts[0]), self._lean(way, join_arguments(parts[1:]))
            rule = find_rule(tree, first, rest, num_pictures)
            alone = [first, *(take(rest, rule, place, num_pictures - 1) for place in range(num_pictures - 1))]
            together = [take(tree, rule, place, num_pictures) for place in range(num_pictures)]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # it does not run on a part of a batch
        return rule if all(map(is_close, together, alone)) else None

    def _keep(self, key: str, piece: Tree) -> None:
        packed = pack(piece)
        if not self.cache.store.put(key, packed):
            raise NoPieces(f"those of one picture take {packed.num_bytes:,} bytes, more than the whole `budget`")


def _texts(sites: Sites) -> list[Site]:
    return [site for name, site in sites.by_name.items() if name in TEXT_STREAMS]


def _features_owner(sites: Sites, tower: nn.Module | None) -> tuple[nn.Module | None, frozenset[nn.Module]]:
    """Return the innermost module with a `get_image_features`, None if there is none; and the modules it may call."""
    owners = [
        module
        for module in sites.model.modules()
        if callable(getattr(type(module), METHOD, None)) and (tower is None or tower in set(module.modules()))
    ]
    if not owners:
        return None, frozenset()
    owner = min(owners, key=lambda module: len(set(module.modules())))
    outside: set[nn.Module] = set()
    for site in _texts(sites):
        # What runs the words is no part of it, unless the tower is in there too.
        around = set(site.owner.modules())
        is_apart = owner not in around and (tower is None or tower not in around)
        outside |= around if is_apart else {module for block in site.blocks for module in block.modules()}
    return owner, frozenset(set(owner.modules()) - outside)


def _written(function: Callable[..., Any]) -> list[str]:
    """Return what tells a function from another one that stands in its place."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return [str(getattr(function, "__module__", "")), name, "" if code is None else code.co_code.hex()]
