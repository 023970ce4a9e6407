"""Shared fixtures: offline, one thread, seeded; models are built once and must come back as they were lent."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vlreft-tests-")  # before datasets does
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from family import Family
from torch import Tensor
from transformers import PreTrainedModel
from zoo import FAMILIES, shake

import vlreft
from vlreft.reft import find_reft

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _built() -> dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]:
    return {}


def hooks_of_vlreft(model: torch.nn.Module) -> list[str]:
    """Return where hooks of the library sit in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        f"{path}.{kind}"
        for path, module in model.named_modules()
        for kind in kinds
        for hook in getattr(module, kind).values()
        if getattr(getattr(hook, "func", hook), "__module__", "").startswith("vlreft")
    ]


def assert_clean(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Assert that a model is as it was built: nothing of the library on it, same weights, all of them trainable."""
    assert hooks_of_vlreft(model) == []
    assert "vlreft" not in dict(model.named_children())
    assert "generate" not in model.__dict__
    now = model.state_dict()
    assert now.keys() == weights.keys()
    changed = [name for name in weights if now[name].dtype != weights[name].dtype or not now[name].equal(weights[name])]
    assert changed == []
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == []
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


@pytest.fixture
def lend(_built: dict[str, Any]) -> Iterator[Callable[[Family | str], PreTrainedModel]]:
    """Lend a family's model in eval mode; it must come back clean (the session has one of each)."""
    lent: set[str] = set()

    def lend_one(family: Family | str) -> PreTrainedModel:
        name = str(family)
        if name not in _built:
            model = FAMILIES[name].build()
            _built[name] = (model, {key: value.clone() for key, value in model.state_dict().items()})
        lent.add(name)
        return _built[name][0]

    yield lend_one
    for name in lent:
        model, weights = _built[name]
        model.eval()
        try:
            assert_clean(model, weights)
        except AssertionError:
            del _built[name]  # let the other tests start afresh
            raise


@pytest.fixture
def attached(lend: Callable[..., PreTrainedModel]) -> Iterator[Callable[..., tuple[PreTrainedModel, vlreft.Reft]]]:
    """Attach interventions to a lent model, moved off their start; they are detached after the test."""
    ours: list[vlreft.Reft] = []

    def attach_one(
        family: Family | str,
        *items: vlreft.Intervention,
        is_shaken: bool = True,
        name: str = "default",
        model: PreTrainedModel | None = None,
    ) -> tuple[PreTrainedModel, vlreft.Reft]:
        model = lend(family) if model is None else model
        reft = vlreft.attach(model, vlreft.ReftConfig(items), name)
        ours.append(reft)
        return model, shake(reft) if is_shaken else reft

    yield attach_one
    for reft in reversed(ours):
        if find_reft(reft.model, reft.name) is reft:
            reft.detach()
