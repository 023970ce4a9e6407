"""Features of a batch of pictures, taken apart into one piece per picture and put together again.

Shape suffixes: N = pictures.

A `Tree` is what a model's function gives back: tensors in lists, tuples and dicts, with plain numbers between. How the
pictures lie in it is not looked up by family, but found out once from three runs: of the whole batch, of its first
picture, and of the others (`find_rule`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from vlreft.reuse.stores import Packed

Tree = Any
# "same": no picture's own; "rows": a row each; "items": an item each of a list; else the rule of each part.
Rule = str | list["Rule"] | dict[str, "Rule"]

# Left out of what is kept: states that no language model reads.
STATES = ("hidden_state", "hidden_states", "attentions")
# What the same pictures may differ by in batches of other sizes, relative to the largest number: rounding.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class NoPieces(ValueError):  # noqa: N818 - where it is raised, nothing has gone wrong
    """The pictures of a batch cannot be told apart."""


# Arguments -----------------------------------------------------------------------------------------------------------


def split_arguments(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments for each picture alone; one dict, all of them, where pictures cannot be told apart.

    Either every tensor has a row a picture, or the pixels are packed and a tensor of sizes, (N, 2) or (N, 3), says how
    many of their rows each picture has.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    pixels = next((tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim() > 1), None)
    if pixels is None or any(tensor.dim() == 0 for tensor in tensors.values()):
        return [dict(arguments)]
    if all(len(tensor) == len(pixels) for tensor in tensors.values()):
        lengths = {name: [1] * len(pixels) for name in tensors}
    elif (rows_N := _rows_of_pictures(tensors, len(pixels))) is not None:
        lengths = {name: rows_N if len(t) == len(pixels) else [1] * len(rows_N) for name, t in tensors.items()}
        if any(len(tensor) not in (len(pixels), len(rows_N)) for tensor in tensors.values()):
            return [dict(arguments)]
    else:
        return [dict(arguments)]
    cut = {name: tensor.split(lengths[name]) for name, tensor in tensors.items()}
    num_pictures = len(next(iter(cut.values())))
    return [{**arguments, **{name: parts[i] for name, parts in cut.items()}} for i in range(num_pictures)]


def join_arguments(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of a call with some pictures of a split one."""
    return {
        name: torch.cat([part[name] for part in parts]) if isinstance(value, Tensor) and value.dim() else value
        for name, value in parts[0].items()
    }


def _rows_of_pictures(tensors: Mapping[str, Tensor], num_rows: int) -> list[int] | None:
    for sizes in tensors.values():
        if not sizes.is_floating_point() and sizes.dim() == 2 and sizes.shape[1] in (2, 3):
            rows_N = sizes.prod(1).tolist()
            if sum(rows_N) == num_rows:
                return rows_N
    return None


def content_key(*what: object) -> str:
    """Return a hash of values and tensors: their types, shapes and numbers. Raises NoPieces for other objects."""
    digest = hashlib.sha256()
    _digest(digest, what)
    return digest.hexdigest()


def _digest(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _digest(digest, item)
    elif isinstance(value, Mapping):
        _digest(digest, [list(pair) for pair in sorted(value.items())])
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        text = repr(value)
        digest.update(f"{type(value).__name__} {len(text)} {text};".encode())
    else:
        raise NoPieces(f"an argument of the type {type(value).__name__} has no content to know it by")


# Outputs -------------------------------------------------------------------------------------------------------------


def lean(output: Any) -> Tree:
    """Return what a language model reads of a function's output: all but the tower's own states, where there is more.

    Where states are all there is, the last ones.
    """
    if not isinstance(output, ModelOutput):
        return output
    kept = {n: v for n, v in output.items() if not n.endswith(STATES) and not isinstance(v, ModelOutput)}
    return kept or {name: value for name, value in output.items() if name == "last_hidden_state"} or whole(output)


def whole(output: Any) -> Tree:
    """Return an output as a tree, without outputs inside of it."""
    if not isinstance(output, ModelOutput):
        return output
    return {name: value for name, value in output.items() if not isinstance(value, ModelOutput)}


def find_rule(tree: Tree, first: Tree, rest: Tree, num_pictures: int) -> Rule:
    """Return how the pictures lie in a tree, from it and those of its first picture and of the others.

    Raises NoPieces where that is not to be told.
    """
    if isinstance(tree, Tensor):
        if tree.shape == first.shape == rest.shape and tree.equal(first) and tree.equal(rest):
            return "same"
        if [len(t) if t.dim() else -1 for t in (tree, first, rest)] == [num_pictures, 1, num_pictures - 1]:
            return "rows"
    elif isinstance(tree, list | tuple):
        lengths = [len(t) for t in (tree, first, rest)]
        if lengths == [num_pictures, 1, num_pictures - 1] and all(isinstance(item, Tensor) for item in tree):
            return "items"
        if len(set(lengths)) == 1:
            return [find_rule(*items, num_pictures) for items in zip(tree, first, rest, strict=True)]
    elif isinstance(tree, dict):
        if tree.keys() == first.keys() == rest.keys():
            return {name: find_rule(tree[name], first[name], rest[name], num_pictures) for name in tree}
    elif tree == first == rest:
        return "same"
    raise NoPieces("which of the features are whose is not to be told")


def take(tree: Tree, rule: Rule, place: int, num_pictures: int) -> Tree:
    """Return the piece of one picture, as if it had been run alone. Raises NoPieces where the rule does not hold."""
    if rule == "same":
        return tree
    if isinstance(rule, dict):
        return {name: take(tree[name], inner, place, num_pictures) for name, inner in rule.items()}
    if isinstance(rule, list):
        return type(tree)(take(item, inner, place, num_pictures) for item, inner in zip(tree, rule, strict=True))
    if len(tree) != num_pictures:
        raise NoPieces(f"there are {len(tree)} features for {num_pictures} pictures")
    return tree[place : place + 1]


def join(pieces: Sequence[Tree], rule: Rule) -> Tree:
    """Return the tree of several pictures from their pieces."""
    first = pieces[0]
    if rule == "same" or len(pieces) == 1:
        return first
    if rule == "rows":
        return torch.cat(list(pieces))
    if rule == "items":
        return type(first)(item for piece in pieces for item in piece)
    if isinstance(rule, dict):
        return {name: join([piece[name] for piece in pieces], inner) for name, inner in rule.items()}
    return type(first)(join([piece[i] for piece in pieces], inner) for i, inner in enumerate(rule))


def is_close(one: Tree, other: Tree) -> bool:
    """Whether two trees are the same but for rounding."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point() or one.numel() == 0:
            return one.equal(other)
        other = other.to(one.device)
        return one.equal(other) or bool((one - other).abs().max() <= ROUNDING[one.dtype] * one.abs().max())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_close(one[name], other[name]) for name in one)
    return one == other


# Flat, to be kept ----------------------------------------------------------------------------------------------------


def pack(tree: Tree) -> Packed:
    """Return a tree flat, its tensors copied to the CPU. Raises NoPieces for other objects in it."""
    tensors: list[Tensor] = []
    with torch.inference_mode(False):  # tensors of inference mode could not be used in training later
        form = json.dumps(_flatten(tree, tensors))
    return Packed(form, tensors)


def _flatten(tree: Tree, tensors: list[Tensor]) -> list[Any]:
    if isinstance(tree, Tensor):
        tensors.append(torch.empty(tree.shape, dtype=tree.dtype).copy_(tree.detach()))
        return ["tensor", len(tensors) - 1]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, [_flatten(item, tensors) for item in tree]]
    if type(tree) is dict:
        return ["dict", {name: _flatten(item, tensors) for name, item in tree.items()}]
    if tree is None or isinstance(tree, bool | int | float | str):
        return ["value", tree]
    raise NoPieces(f"a {type(tree).__name__} among the features cannot be kept")


def unpack(packed: Packed, device: torch.device) -> Tree:
    """Return the tree, its tensors copied to a device."""
    with torch.inference_mode(False):
        return _unflatten(json.loads(packed.form), packed.tensors, device)


def _unflatten(form: list[Any], tensors: Sequence[Tensor], device: torch.device) -> Tree:
    kind, value = form
    if kind == "tensor":
        return tensors[value].to(device, copy=True)
    if kind == "dict":
        return {name: _unflatten(item, tensors, device) for name, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_unflatten(item, tensors, device) for item in value]
        return items if kind == "list" else tuple(items)
    return value


def device_of(tree: Tree) -> torch.device:
    """Return where the first tensor of a tree is."""
    if isinstance(tree, Tensor):
        return tree.device
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return next((device for item in items if (device := device_of(item)).type != "meta"), torch.device("meta"))
