"""What modules give back: a tensor, a tuple or list of which the first item is the state, or a model's output."""

from typing import Any

from torch import Tensor


def states_in(output: Any) -> Tensor:
    """Return the hidden state that a block gives back."""
    return output[0] if isinstance(output, tuple | list) else output


def with_states(output: Any, h: Tensor) -> Any:
    """Return what a block gave back with another hidden state, in the same type."""
    if isinstance(output, tuple) and type(output) is not tuple:
        return output._replace(**{output._fields[0]: h})  # pyright: ignore[reportAttributeAccessIssue] - a named one
    if isinstance(output, tuple | list):
        return type(output)((h, *output[1:]))
    return h


def add_to_first(output: Any, zero: Tensor) -> Any:
    """Add to the loss if there is one, else to logits, or states where there is no head."""
    if isinstance(output, dict):
        first = next(name for name, value in output.items() if _is_float(value))
        output[first] = output[first] + zero
        return output
    if isinstance(output, Tensor):
        return output + zero
    place = next(place for place, value in enumerate(output) if _is_float(value))
    return (*output[:place], output[place] + zero, *output[place + 1 :])


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
