"""Record what pyvene makes of interchange interventions: `interchange.json.gz`, for tests/test_interchange.py.

    PYVENE_PYTHON tests/golden/record_interchange.py

PYVENE_PYTHON is an interpreter with pyvene 0.1.8 and transformers 4.57. The models are tiny and random; their numbers
are in the file, so that nothing depends on how a library draws them. Everything is float32 on the CPU.
"""

import gzip
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyvene
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WIDTH, NUM_LAYERS, VOCABULARY, NUM_ROWS = 16, 2, 24, 3
RANK = 3
COMPONENTS = {"output": "block_output", "input": "block_input", "mlp": "mlp_output", "attention": "attention_output"}
# Name: layer, component (ours), positions of the base, positions of the source, method.
CASES: dict[str, tuple[int, str, Sequence[int], Sequence[int], str]] = {
    "last": (0, "output", (6,), (6,), "interchange"),
    "three": (1, "output", (2, 3, 4), (2, 3, 4), "interchange"),
    "elsewhere": (0, "output", (5, 6), (1, 2), "interchange"),
    "input": (1, "input", (4, 5), (4, 5), "interchange"),
    "mlp": (0, "mlp", (3,), (3,), "interchange"),
    "attention": (1, "attention", (5,), (5,), "interchange"),
    "das": (0, "output", (3,), (3,), "das"),
    "das three": (1, "output", (2, 3, 4), (4, 5, 6), "das"),
    "das mlp": (0, "mlp", (1,), (1,), "das"),
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": NUM_LAYERS,
        "n_head": 2,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
}


def build(name: str) -> nn.Module:
    """Make a model with numbers loud enough for an exchange to be heard."""
    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "gpt2": (GPT2LMHeadModel, GPT2Config)}
    kind, config = kinds[name]
    model: nn.Module = kind(config(**SIZES[name]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(noise * scale + (0.0 if parameter.dim() > 1 else parameter))
    return model.eval()


def orthonormal(rank: int, seed: int) -> Tensor:
    """Return some R with orthonormal rows."""
    draw_DR = torch.randn(WIDTH, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw_DR)[0].T.contiguous()


def wrap(model: nn.Module, layer: int, component: str, num_positions: int, method: str) -> tuple[Any, dict[str, Any]]:
    """Put one intervention of pyvene on a model; return it and its numbers by our names."""
    kind = {"interchange": pyvene.VanillaIntervention, "das": pyvene.LowRankRotatedSpaceIntervention}[method]
    # Of each state alone, as pyreft does it; by default pyvene rotates all positions as one long state.
    edit = kind(embed_dim=WIDTH, low_rank_dimension=RANK, keep_last_dim=True)
    place = {
        "layer": layer,
        "component": COMPONENTS[component],
        "max_number_of_units": num_positions,
        "intervention": edit,
    }
    wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model=model)
    numbers: dict[str, Any] = {}
    if method == "das":
        edit.rotate_layer.weight = orthonormal(RANK, 5).T.clone()
        numbers["rotation"] = edit.rotate_layer.weight.detach().T.tolist()
    return wrapped, numbers


def main() -> None:
    """Run all cases on both models and write the file."""
    generator = torch.Generator().manual_seed(1)
    base_BL, source_BL = (torch.randint(1, VOCABULARY, (NUM_ROWS, 8), generator=generator) for _ in range(2))
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in ("pyvene", "torch", "transformers")},
        "base": base_BL.tolist(),
        "source": source_BL.tolist(),
        "models": {},
    }
    for name in SIZES:
        model = build(name)
        cases = {}
        for case, (layer, component, at_base, at_source, method) in CASES.items():
            wrapped, numbers = wrap(model, layer, component, len(at_base), method)
            places = ([[list(at_source)] * NUM_ROWS], [[list(at_base)] * NUM_ROWS])
            with torch.no_grad():
                _, edited = wrapped(
                    {"input_ids": base_BL}, [{"input_ids": source_BL}], unit_locations={"sources->base": places}
                )
            cases[case] = {
                "method": method,
                "layer": layer,
                "component": component,
                "at_base": list(at_base),
                "at_source": list(at_source),
                "numbers": numbers,
                "logits": edited.logits.tolist(),
            }
        state = {key: tensor.tolist() for key, tensor in model.state_dict().items() if "vlreft" not in key}
        with torch.no_grad():
            logits = model(input_ids=base_BL).logits.tolist()
        found["models"][name] = {"config": SIZES[name], "state": state, "logits": logits, "cases": cases}
    path = Path(__file__).with_name("interchange.json.gz")
    path.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


if __name__ == "__main__":
    main()
