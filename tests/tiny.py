"""Two very small models with random weights, and a watch over what a refused call must leave as it was."""

import contextlib
import functools
import random

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

IMAGE_ID = 30
TEXT = {
    "vocab_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(width=16, **settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, **{**TEXT, **settings})).eval()


def qwen2(width=16):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(hidden_size=width, **TEXT)).eval()


def llava():
    """A tower of four blocks (0 to 2 are read), four patches and a class token an image."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=24, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(hidden_size=16, **TEXT), image_token_id=IMAGE_ID)
    return LlavaForConditionalGeneration(config).eval()


shared_llama, shared_llava = functools.cache(llama), functools.cache(llava)


def text_batch(num_rows=2, num_tokens=7, answer=2):
    """Return input ids and labels with the last `answer` tokens labelled."""
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(1, 29, (num_rows, num_tokens), generator=generator)
    return {"input_ids": ids_BL, "labels": ids_BL.where(torch.arange(num_tokens) >= num_tokens - answer, -100)}


def image_batch():
    ids_BL = torch.tensor([[3, *[IMAGE_ID] * 4, 5, 6], [*[IMAGE_ID] * 4, 7, 8, 9]])
    return {"input_ids": ids_BL, "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def shake(reft, seed=1):
    """Move the interventions' numbers off their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in reft.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return reft


def numbers(reft):
    return {name: parameter.detach().clone() for name, parameter in reft.edits.named_parameters()}


def state_of(model):
    """Return what `attach` may change in a model, and the state of the random generators."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return {
        "children": [path for path, _ in model.named_modules()],
        "hooks": {
            (path, kind): list(getattr(module, kind)) for path, module in model.named_modules() for kind in kinds
        },
        "own attributes": sorted(model.__dict__),
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "tensors": {name: (id(tensor), tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()},
        "training": [module.training for module in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    }


@contextlib.contextmanager
def untouched(model):
    """Assert that what happens inside leaves a model, and the user's random numbers, exactly as they were."""
    before, weights = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@contextlib.contextmanager
def half_frozen(model):
    """Freeze one parameter of a model inside: whoever restores the flags must restore this one too."""
    assert all(parameter.requires_grad for parameter in model.parameters()), "an earlier test left the model frozen"
    parameter = next(model.parameters()).requires_grad_(False)
    try:
        yield model
    finally:
        parameter.requires_grad_(True)
