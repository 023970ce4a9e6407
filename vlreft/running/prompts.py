"""What a call of `generate` says about its prompt: the tokens, their padding, and what a decoder begins with.

Shape suffixes: B = rows, L = tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def prompt_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the ids_BL (or embeddings, (B, L, D)) that `generate` is given as the prompt, None if it is given none."""
    tokens = args[0] if args else None
    for name in ("inputs", "input_ids", "inputs_embeds"):
        tokens = kwargs.get(name) if tokens is None else tokens
    return tokens if isinstance(tokens, Tensor) else None


def num_rows_of(kwargs: Mapping[str, Any]) -> int | None:
    """Return how many rows `generate` will make from the pictures it is given, None if it is given no tensor."""
    return next((value.shape[0] for value in kwargs.values() if isinstance(value, Tensor) and value.dim()), None)


def guess_attention_mask(
    model: PreTrainedModel, input_ids_BL: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Follow `generate`'s own rule for a call without a mask: pads are masked unless pad is also an end token.

    What counts as pad and end is said by the call, else by the call's config, else by the model's.
    """
    of_call = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    said: dict[str, Any] = {}
    for name in ("pad_token_id", "eos_token_id"):
        configs = (kwargs.get(name), getattr(of_call, name, None), getattr(model.generation_config, name))
        said[name] = next((value for value in configs if value is not None), None)
    pad, eos = said["pad_token_id"], said["eos_token_id"]
    ends = eos if isinstance(eos, list) else [eos]
    return None if pad is None or pad in ends else input_ids_BL != pad


def decoder_prompt_length(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> int:
    """Return how many tokens the decoder of an encoder-decoder begins with: one, or those that the caller gives it."""
    given_BL = kwargs.get("decoder_input_ids")
    if not isinstance(given_BL, Tensor):
        return 1
    start = kwargs.get("decoder_start_token_id", getattr(model.generation_config, "decoder_start_token_id", None))
    has_start = start is None or bool((given_BL[:, 0] == start).all())
    return given_BL.shape[1] + (0 if has_start else 1)  # `generate` puts a missing start token in front
