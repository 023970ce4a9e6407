"""The same laws on a CUDA device: `pytest -m gpu`."""

import pytest
import torch
from family import SAMPLES
from zoo import FAMILIES, intervention, shake

import vlreft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = vlreft.ReftConfig(
    [
        intervention("loreft", positions="question:f1+l2"),
        intervention("loreft", site="vision", positions="patches"),
        intervention("loreft", site="connector", positions="image"),
    ]
)


@pytest.fixture
def both():
    """Return a tiny LLaVA on the CPU and the same on the GPU, with the same interventions, and a batch."""
    family = FAMILIES["llava"]
    models = [family.build(), family.build().to("cuda")]
    refts = [shake(vlreft.attach(model, CONFIG)) for model in models]
    return models, refts, family.batch(SAMPLES)


def on_gpu(batch):
    return {name: tensor.to("cuda") for name, tensor in batch.items()}


def test_forward_and_gradients_are_those_of_the_cpu(both):
    models, refts, batch = both
    losses = [models[0](**batch).loss, models[1](**on_gpu(batch)).loss]
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-3, atol=1e-4)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(refts[1].parameters(), refts[0].parameters(), strict=True):
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-2, atol=1e-4)


def test_saved_on_the_cpu_and_loaded_on_the_gpu(both, tmp_path):
    models, refts, _ = both
    refts[0].save_pretrained(tmp_path)
    refts[1].detach()
    loaded = vlreft.load(models[1], tmp_path)
    for ours, theirs in zip(loaded.parameters(), refts[0].parameters(), strict=True):
        assert ours.cpu().equal(theirs)


def test_generation_with_and_without_a_cache_agrees(both):
    models, _, _ = both
    family, model = FAMILIES["llava"], models[1]
    batch = on_gpu(family.batch(SAMPLES, side="left", answer=False))
    cached = model.generate(**batch, **family.generation())
    assert cached.equal(model.generate(**batch, **family.generation(use_cache=False)))


def test_placing_the_edits_does_not_wait_for_the_device(both):
    models, _, batch = both
    batch = on_gpu(batch)
    models[1](**batch).loss.backward()  # the first batch is looked at
    runtime = models[1].vlreft.runtime
    torch.cuda.set_sync_debug_mode("error")
    try:
        runtime.edited(runtime.batches.lay_out("text", batch, runtime.acting("text"), training=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
