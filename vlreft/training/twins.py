"""`reference`: the base beside the model that is being trained, without a second copy of its weights."""

import copy

from torch import nn

from vlreft.reft import find_adapters


def reference(model: nn.Module) -> nn.Module:
    """Return the frozen base that a model is without its interventions: an object of its own, with the same tensors.

    For what compares the two, as TRL's `DPOTrainer(model, ref_model=vlreft.reference(model))`. It is in eval mode and
    takes no memory but for its modules. Raises ValueError for a model without interventions, and for one of which other
    weights are trained: they would move in both.
    """
    adapters = find_adapters(model)
    if adapters is None:
        raise ValueError("no interventions are attached, so the model is its own reference; call `vlreft.attach` first")
    own = {id(parameter) for parameter in adapters.parameters()}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if moving:
        raise ValueError(
            f"{len(moving)} parameters beside the interventions are trained ({moving[0]}, ...), and the reference has "
            "them too, so it would move too: freeze them, or load the reference as a model of its own"
        )
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    twin_adapters = find_adapters(twin)
    assert twin_adapters is not None
    twin_adapters.was_trainable.clear()  # detaching would unfreeze the weights that both have
    for reft in list(twin_adapters.refts.values()):
        reft.detach()
    return twin.eval()
