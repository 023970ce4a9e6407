"""`Sharding`: what a Trainer does otherwise where ranks hold parts of the base (FSDP2, DeepSpeed), or it is quantised.

What is trained is small. It stays whole on every rank, in its own precision, and its gradients are averaged; only the
frozen base is sharded. Checkpoints under FSDP are those of a training without it: the base is never gathered for one.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

from vlreft.reft import find_reft
from vlreft.running.beside import without_peft

if TYPE_CHECKING:
    _TrainerType = Trainer
else:
    _TrainerType = object


class Sharding(_TrainerType):
    """The part of `ReftMixin` that FSDP2 and quantised bases need; without them it changes nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Make the trainer, which on a quantised base must see that there are adapters. Raises ValueError if it cannot.

        What it takes is whatever the trainer takes, the model first or by its name.
        """
        model = args[0] if args else options.get("model")
        with _shown_as_adapted(model):
            super().__init__(*args, **options)

    def create_accelerator_and_postprocess(self) -> None:
        """Choose what is sharded. Raises ValueError for settings of FSDP that interventions do not survive."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            self._keep_whole_under_deepspeed()
        if not self.is_fsdp_enabled:
            return
        plugin, model = self.accelerator.state.fsdp_plugin, self.model
        assert plugin is not None
        assert isinstance(model, nn.Module)
        if plugin.fsdp_version != 2:
            raise ValueError(
                "interventions train under FSDP2: `fsdp_config={'version': 2}` (`fsdp_version: 2` in YAML)"
            )
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "`cpu_ram_efficient_loading` leaves every process but the first without numbers, of interventions "
                "too: set it to False (`fsdp_cpu_ram_efficient_loading: false` in YAML)"
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "FSDP's own `activation_checkpointing` runs whole blocks again, edits included, after the forward that "
                "knows what to edit: use the training argument of that name (`gradient_checkpointing`) instead"
            )
        if plugin.ignored_modules is not None:
            raise ValueError("`ignored_modules` is where vlreft names what is trained; leave it out")
        plugin.ignored_modules = [module.to(self.accelerator.device) for module in _trained_modules(model)]
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = _text_blocks(model)

    def _keep_whole_under_deepspeed(self) -> None:
        """Let ZeRO-3 leave interventions whole on every rank, as it does with what is small, so that they can be saved.

        Raises ValueError for whole modules, which are not small.
        """
        plugin = self.accelerator.state.deepspeed_plugin
        assert plugin is not None
        assert isinstance(self.model, nn.Module)
        if plugin.zero_stage != 3:
            return
        reft = find_reft(self.model)
        assert reft is not None
        if reft.config.modules_to_save:
            raise ValueError(
                "`modules_to_save` does not go with DeepSpeed's ZeRO-3, which takes it to pieces; use ZeRO-2"
            )
        settings, name = plugin.deepspeed_config["zero_optimization"], "stage3_param_persistence_threshold"
        hidden = self.model.config.get_text_config().hidden_size if isinstance(self.model, PreTrainedModel) else 0
        given = settings.get(name, "auto")
        usual = 10 * hidden if given == "auto" else int(given)  # transformers' own choice
        settings[name] = max(usual, *(parameter.numel() + 1 for parameter in reft.parameters()))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make the trainer's own step, then average the gradients of what FSDP does not know of."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            _average_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the trainer's own loss. Raises ValueError, on all ranks, where one of them would wait for ever."""
        if self.is_fsdp_enabled:
            self.refuse_other_inputs(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def refuse_other_inputs(self, inputs: dict[str, Tensor | Any]) -> None:
        """Raise ValueError if some ranks have pictures and others have none, and the vision tower is sharded.

        The tower's blocks gather their weights from all ranks, also from those that do not run them.
        """
        if not _shards_the_tower(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            return
        names = sorted(name for name, value in inputs.items() if isinstance(value, Tensor))
        number = zlib.crc32(",".join(names).encode())
        both = torch.tensor([number, -number], device=self.accelerator.device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        if both[0] != -both[1]:
            raise ValueError(
                f"a batch has {names} on this rank and something else on another: ranks without pictures do not run "
                "the vision tower, whose sharded blocks need all ranks; shard the language model's blocks alone (what "
                "vlreft does where `transformer_layer_cls_to_wrap` is left out), or give every batch a picture"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; under FSDP without gathering the base, which the trainer's own way does."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def own_places(self, num_examples: int) -> Sequence[int]:
        """Return which examples this rank answers; under FSDP as many as the others, for which the last come again."""
        places = range(self.args.process_index, num_examples, self.args.world_size)
        if not self.is_fsdp_enabled:
            return places
        num_missing = -(-num_examples // self.args.world_size) - len(places)
        return [*places, *[num_examples - 1] * num_missing]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_if_whole():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_if_whole():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _as_if_whole(self) -> Iterator[None]:
        """Hide FSDP from the trainer, which writes the whole base beside the optimizer: what that holds is not sharded.

        Checkpoints are then the same whatever the engine, and one goes on where the other stopped.
        """
        before, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = before


@contextmanager
def _shown_as_adapted(model: Any) -> Iterator[None]:
    """Let transformers know that a quantised base has adapters on it: it trains none without, and looks for peft's."""
    base = without_peft(model) if isinstance(model, nn.Module) else model
    quantizer = vars(base).get("hf_quantizer") if isinstance(base, PreTrainedModel) else None
    if quantizer is None or find_reft(base) is None:
        yield
        return
    if not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"the base is quantised by {method}, which has no gradient; use torchao or bitsandbytes")
    flag = "_hf_peft_config_loaded"
    before = vars(base).get(flag)
    setattr(base, flag, True)
    try:
        yield
    finally:
        if before is None:
            delattr(base, flag)
        else:
            setattr(base, flag, before)


def _text_blocks(model: nn.Module) -> list[str]:
    """Return the classes of the blocks that run in every forward: those of the language model, not of the tower.

    A tower that is not sharded block by block is gathered with the rest, on all ranks, whether they have a picture or
    not. transformers' own choice may also name classes that the model lacks, which accelerate refuses.
    """
    reft = find_reft(model)
    assert reft is not None
    sites = reft.runtime.sites.by_name
    stacks = [sites[name] for name in ("text", "text_encoder") if name in sites]
    return sorted({type(block).__name__ for site in stacks for block in site.blocks})


def _trained_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have parameters of their own to train."""
    return [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]


def _shards_the_tower(model: nn.Module) -> bool:
    reft = find_reft(model)
    vision = reft.runtime.sites.by_name.get("vision") if reft is not None else None
    return vision is not None and any(isinstance(block, FSDPModule) for block in vision.blocks)


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their mean over all ranks; a rank without one counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_type.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
