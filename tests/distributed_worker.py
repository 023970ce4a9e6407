"""Two processes on gloo that run what a test tells them, and the functions that tests tell them to run.

They are started once and kept: importing takes longer than training. A call that does not come back in time is a rank
that waits for the other one for ever; both are ended then, and the next call starts new ones.
"""

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

NUM_RANKS = 2
NUM_SECONDS = 120.0  # a call that takes longer hangs, or the machine is very busy
BATCH = 4  # rows of all ranks together


class Ranks:
    """Two processes: `ranks(function, *args)` runs a function of this module in both, and returns both results."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Raises AssertionError, with the ranks' tracebacks, if one of them failed or hangs."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function.__name__, args, options))
        results = [self._result(rank, pipe) for rank, pipe in enumerate(self.pipes)]
        if failures := [result for is_fine, result in results if not is_fine]:
            self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in results]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.meeting.cleanup()
        self.processes, self.pipes = [], []

    def _result(self, rank: int, pipe: Any) -> tuple[bool, Any]:
        try:
            return pipe.recv() if pipe.poll(NUM_SECONDS) else (False, f"rank {rank} hangs")
        except EOFError:
            return False, f"rank {rank} died"

    def _start(self) -> None:
        self.meeting = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, f"{self.meeting.name}/ranks", theirs), daemon=True)
            process.start()
            theirs.close()  # else a rank that dies leaves its end open here
            self.processes.append(process)
            self.pipes.append(ours)


def serve(rank: int, meeting: str, pipe: Any) -> None:
    """Meet the other rank in a file, then run what comes down a pipe, until the other end is closed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    seconds = datetime.timedelta(seconds=NUM_SECONDS)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_RANKS, timeout=seconds
    )
    shard_on_cpus()
    with contextlib.suppress(EOFError):
        while True:
            name, args, options = pipe.recv()
            try:
                with fresh_state():
                    pipe.send((True, globals()[name](*args, **options)))
            except BaseException:  # noqa: BLE001 - whatever it is, the test has to hear of it
                pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))


def shard_on_cpus() -> None:
    """Make accelerate use FSDP and DeepSpeed on CPUs too: it takes DDP there, whatever it is told, and says nothing."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **options: Any) -> None:
        is_new = "_mixed_precision" not in AcceleratorState._shared_state
        plain(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **options)
        if is_new and deepspeed_plugin is not None:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, {"default": deepspeed_plugin}
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
        if is_new and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


@contextlib.contextmanager
def fresh_state() -> Iterator[None]:
    """Forget the engine afterwards; the processes stay connected."""
    from accelerate.state import AcceleratorState

    try:
        yield
    finally:
        AcceleratorState._reset_state()
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]


def zero(stage: int) -> dict[str, Any]:
    """Return settings of DeepSpeed that take apart whatever ZeRO-3 may take apart."""
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    more = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"ddp_backend": "gloo", "deepspeed": {**auto, **more, "zero_optimization": optimization}}


# What ranks run, and the one process that they are compared with ------------------------------------------------------

ENGINES: dict[str | None, dict[str, Any]] = {
    None: {},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp": {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2}},
    "zero2": zero(2),
    "zero3": zero(3),
}


def whole(tensor: Tensor) -> Tensor:
    from vlreft.saving.shards import whole

    return whole(tensor).clone()


def make_trainer(
    name: str,
    folder: str,
    engine: str | None,
    *,
    rows: list[int] | None = None,
    attach: dict[str, Any] | None = None,
    lora: bool = False,
    unmodified: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Make a trainer and its interventions; `rows` are numbers of a kind's rows, below zero without their picture."""
    from test_trainer import KINDS, arguments
    from transformers import Trainer

    import vlreft

    kind = KINDS[name]
    model, reft = kind.attached(**(attach or {}))
    if lora:
        import peft

        torch.manual_seed(4)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        reft.requires_grad_()
    data = kind.rows()
    if rows is not None:
        data = [data[row] if row >= 0 else data[-row] | {"image": None} for row in rows]
        data = [{key: value for key, value in row.items() if value is not None} for row in data]
    num_ranks = NUM_RANKS if engine else 1
    accumulated = options.get("gradient_accumulation_steps", 1)
    options = {"per_device_train_batch_size": BATCH // num_ranks // accumulated} | ENGINES[engine] | options
    args = arguments(folder, remove_unused_columns=not unmodified, **options)
    trainer = (Trainer if unmodified else vlreft.ReftTrainer)(
        model=model, args=args, train_dataset=data, data_collator=kind.collator()
    )
    return trainer, reft


def train(name: str, folder: str, engine: str | None, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Train, and return what was trained, the losses, and the kinds of the parameters."""
    trainer, reft = make_trainer(name, folder, engine, **options)
    trainer.train(resume_from_checkpoint=resume)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "numbers": {name.rpartition("default.")[2]: whole(p) for name, p in trained.items() if "vlreft." in name},
        "lora": [whole(p) for name, p in trained.items() if "lora_" in name],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "kinds": sorted({type(parameter).__name__ for parameter in reft.parameters()}),
    }


def answer(name: str, folder: str, engine: str | None, num_rows: int) -> dict[str, Any]:
    """Train a little, then answer."""
    from test_trainer import KINDS

    trainer, _ = make_trainer(name, folder, engine, attach={"init": "reference"}, num_train_epochs=1)
    trainer.generation = {"max_new_tokens": 5, "do_sample": False}
    trainer.train()
    rows = KINDS[name].rows(num_rows)
    return {"answers": trainer.predict_answers(rows), "loss": trainer.evaluate(rows)["eval_loss"]}


def save_in_parts(name: str, folder: str) -> dict[str, Any]:
    """Train by a trainer of others, which shards interventions too; save on all ranks, load again, sharded."""
    trainer, reft = make_trainer(name, folder, "fsdp", unmodified=True, num_train_epochs=1, **only_text_blocks())
    trainer.train()
    reft.save_pretrained(f"{folder}/adapter")
    torch.distributed.barrier()
    before, print_before = {key: whole(p) for key, p in reft.edits.named_parameters()}, reft.fingerprint()
    with torch.no_grad():
        for parameter in reft.parameters():
            parameter.zero_()
    reft.load_weights(f"{folder}/adapter")
    after = {key: whole(p) for key, p in reft.edits.named_parameters()}
    kinds = sorted({type(parameter).__name__ for parameter in reft.parameters()})
    return {"before": before, "after": after, "prints": (print_before, reft.fingerprint()), "kinds": kinds}


def only_text_blocks() -> dict[str, Any]:
    return {"fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def refusal(name: str, folder: str, engine: str, **options: Any) -> str:
    """Return what a training says that is refused."""
    try:
        trainer, _ = make_trainer(name, folder, engine, **options)
        trainer.train()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def half_step(family: str, method: str, halves: Any, engine: str) -> tuple[Tensor, list[Tensor]]:
    """Take this rank's part of a training step in a hand-written loop; return its loss and the averaged gradients."""
    import matrix
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from zoo import FAMILIES

    row = FAMILIES[family]
    model = matrix.build(row)
    reft = matrix.attach(model, row, method)
    if engine == "DDP":
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = model
        for block in row.blocks(model, "text"):
            fully_shard(block)
        fully_shard(model)
    found = matrix.step(wrapped, reft, row, method, row.batch(halves[torch.distributed.get_rank()]))
    return found.loss, [whole(grad) for grad in found.grads]
