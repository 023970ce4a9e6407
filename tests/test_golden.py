"""pyreft's recorded numbers, reproduced through the public interface; see `golden/README.md`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vlreft

GOLDEN = np.load(Path(__file__).parent / "golden" / "pyreft.npz", allow_pickle=False)
POSITIONS = "f3+l3"

# kind: method, settings, pyreft's matrices by our parameters' names
FREE, ROTATED = {"projection": "V", "weight": "W", "bias": "b"}, {"rotation": "R", "weight": "W", "bias": "b"}
KINDS = {
    "loreft": ("loreft", {}, ROTATED),
    "loreft_relu": ("loreft", {"activation": "relu"}, ROTATED),
    "loreft_tied": ("loreft", {"tied": True}, ROTATED),
    "direft": ("direft", {}, ROTATED),
    "noreft": ("noreft", {}, FREE),
    "noreft_nobias": ("noreft", {}, FREE),
    "nodireft": ("nodireft", {}, FREE),
    "consreft": ("consreft", {}, {"rotation": "R", "bias": "b"}),
    "lobireft": ("lobireft", {}, {"rotation": "R", "bias": "b"}),
}


def golden(key):
    return torch.from_numpy(GOLDEN[key].copy())


def base_model():
    model = LlamaForCausalLM(LlamaConfig(**json.loads(str(GOLDEN["config"]))))
    state = {key.removeprefix("base/"): golden(key) for key in GOLDEN.files if key.startswith("base/")}
    model.load_state_dict(state)
    return model.eval()


def attach(kind):
    """Return the base with pyreft's interventions, and their parameters by pyreft's keys without the matrix."""
    method, settings, matrices = KINDS[kind]
    model = base_model()
    item = vlreft.Intervention(method, positions=POSITIONS, rank=4, init="reference", **settings)
    reft = vlreft.attach(model, vlreft.ReftConfig(item))
    parameters = {}
    for name, edit in reft.edits.items():
        _, _, layer, part = name.split(":")
        place = f"{kind}/L{layer}/{''.join(spelling[0] for spelling in part.split('+'))}"
        parameters[place] = dict(edit.named_parameters())
        assert set(parameters[place]) == set(matrices)
        with torch.no_grad():
            for ours, theirs in matrices.items():
                parameters[place][ours].copy_(golden(f"{place}/{theirs}"))
            if kind == "noreft":
                parameters[place]["bias"].sub_(golden(f"{place}/c"))
    return model, reft, parameters


def batch():
    return {key: golden(key) for key in ("input_ids", "attention_mask", "labels")}


def close(actual, key):
    torch.testing.assert_close(actual, golden(key), atol=1e-5, rtol=1e-5)


def test_every_recorded_kind_is_compared():
    assert {key.split("/")[1] for key in GOLDEN.files if key.startswith("logits/")} - {"base"} == set(KINDS)


def test_base():
    output = base_model()(**batch())
    close(output.logits, "logits/base")
    close(output.loss, "loss/base")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients(kind):
    model, _, parameters = attach(kind)
    output = model(**batch())
    close(output.logits, f"logits/{kind}")
    close(output.loss, f"loss/{kind}")
    output.loss.backward()
    compared = set()
    for place, ours in parameters.items():
        for name, theirs in KINDS[kind][2].items():
            if (key := f"grad/{place}/{theirs}") in GOLDEN:
                close(ours[name].grad, key)
                compared.add(key)
        if kind == "noreft":
            close(-ours["bias"].grad, f"grad/{place}/c")
            compared.add(f"grad/{place}/c")
    recorded = {key for key in GOLDEN.files if key.startswith(f"grad/{kind}/")}
    assert compared == recorded
    assert len(recorded) >= len(parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_the_edits_matter(kind):
    """Or the comparison with pyreft would be one of the base with itself."""
    assert not torch.allclose(golden(f"logits/{kind}"), golden("logits/base"), atol=1e-2)


@pytest.mark.parametrize(("prompts", "positions"), [("input_ids", "positions"), ("gen/input_ids", "gen/positions")])
def test_positions(prompts, positions):
    _, reft, _ = attach("loreft")
    mask_BL = golden(prompts.replace("input_ids", "attention_mask"))
    if prompts == "input_ids":
        mask_BL = mask_BL * (torch.arange(mask_BL.shape[1]) < golden("prompt_len")[:, None])
    (edited_BL,) = reft.edited(golden(prompts), mask_BL)
    for row, edited_L in enumerate(edited_BL):
        assert edited_L.nonzero().flatten().tolist() == golden(positions)[:, row].flatten().tolist()


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_from_left_padded_prompts(use_cache, disabled):
    model, reft, _ = attach("loreft")
    prompts = {key: golden(f"gen/{key}") for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    if disabled:
        with reft.disabled():
            tokens = model.generate(**prompts, **settings)
    else:
        tokens = model.generate(**prompts, **settings)
    expected = golden("gen/tokens_base" if disabled else "gen/tokens")
    assert tokens[:, prompts["input_ids"].shape[1] :].tolist() == expected.tolist()
