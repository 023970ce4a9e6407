"""Print what every family does with every intervention in every way of running them.

    python tests/matrix.py                                      # everything: minutes
    python tests/matrix.py --families llava --methods loreft das --ways DDP TRL

Every cell takes a training step with edits at all sites of a family and compares it with the plain step: the loss and
each gradient. It has passed, is refused with the sentence that says why, or is not run here, with the reason.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from distributed_worker import Ranks, half_step
from family import SAMPLES, Family, Sample
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from zoo import FAMILIES, shake
from zoo import INTERVENTIONS as TRAINED

import vlreft
from vlreft.interventions import INTERVENTIONS

LAYER = {"text": 1, "vision": 1, "connector": 0}
POSITIONS = {"text": "f2+l2", "vision": "patches", "connector": "image"}
SOURCED = {"interchange": {}, "das": {"rank": 3}, "boundless_das": {}}
# Ranks differ in what they have: the second has no picture, or, where a source is read, none can be without.
HALVES = ((SAMPLES[0],), (SAMPLES[1],))
HALVES_WITH_IMAGES = ((SAMPLES[0],), (SAMPLES[2],))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Cell:
    """What came of one cell: "passed", "refused", "not run" or "FAILED", the last three with a reason."""

    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """What a training step gives: its loss, and the gradients of the interventions."""

    loss: Tensor
    grads: list[Tensor]


class NotRun(Exception):  # noqa: N818 - it is no error
    """Why a cell is not run here."""


def config_of(family: Family, method: str) -> vlreft.ReftConfig:
    """Put a method at every site of a family."""
    fields = SOURCED[method] | {"init": "reference"} if method in SOURCED else dict(TRAINED[method].fields)
    return vlreft.ReftConfig(
        [
            vlreft.Intervention(method, site=site, layers=LAYER[site], positions=POSITIONS[site], **fields)
            for site in family.sites
        ]
    )


def build(family: Family) -> nn.Module:
    """Build a family's model, the same in every process."""
    torch.manual_seed(0)
    return family.build()


def attach(model: nn.Module, family: Family, method: str) -> vlreft.Reft:
    """Attach a method, moved off its start, the same every time."""
    torch.manual_seed(0)
    return shake(vlreft.attach(model, config_of(family, method)))


def source_of(family: Family, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of the same form with other words and pictures."""
    ids, special = batch["input_ids"], torch.tensor([0, *family.image_tokens])
    other = torch.where(torch.isin(ids, special), ids, (ids - family.first_id - 5 + 7) % 22 + 5 + family.first_id)
    made = {name: value for name, value in batch.items() if name != "labels"} | {"input_ids": other}
    return made | {name: -value for name, value in made.items() if value.is_floating_point()}


def step(model: nn.Module, reft: vlreft.Reft, family: Family, method: str, batch: Mapping[str, Tensor]) -> Step:
    """Take a training step; a method that reads sources gets one, and one without numbers to train only the loss."""
    sources = reft.sources(source_of(family, batch)) if method in SOURCED else contextlib.nullcontext()
    model.train()
    with sources:
        loss = model(**batch).loss
        return Step(loss.detach().float(), gradients(reft, loss))


def gradients(reft: vlreft.Reft, loss: Tensor) -> list[Tensor]:
    """Run backward, and take the gradients of all parameters away; there is one for each."""
    if loss.requires_grad:
        loss.backward()
    parameters = list(reft.parameters())  # now: FSDP2 has others during the forward
    assert all(parameter.grad is not None for parameter in parameters), "a parameter has no gradient"
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return found


def assert_same(ours: Step, plain: Step, tolerance: float = TOLERANCE) -> None:
    """Assert that two steps agree within rounding, and that there was something to agree on."""
    torch.testing.assert_close(ours.loss, plain.loss, rtol=tolerance, atol=tolerance)
    assert not plain.grads or any(grad.abs().max() > 1e-3 for grad in plain.grads), "there is no gradient"
    for mine, other in zip(ours.grads, plain.grads, strict=True):
        bound = tolerance * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(mine.to(other.dtype), other, rtol=tolerance, atol=bound)


# The ways -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One family and one method; `base` is copied for each way, `ranks` are two processes."""

    family: Family
    method: str
    base: nn.Module
    ranks: Ranks

    def fresh(self) -> nn.Module:
        """Return a copy of the base."""
        return copy.deepcopy(self.base)

    def batch(self, samples: Sequence[Sample] = SAMPLES) -> dict[str, Tensor]:
        """Write samples down."""
        return self.family.batch(samples)

    @functools.cached_property
    def plain(self) -> Step:
        """The plain step on all samples."""
        return self.step(model := self.fresh(), self.attach(model))

    def attach(self, model: nn.Module) -> vlreft.Reft:
        """Attach the method."""
        return attach(model, self.family, self.method)

    def step(self, model: nn.Module, reft: vlreft.Reft, samples: Sequence[Sample] = SAMPLES) -> Step:
        """Take a step."""
        return step(model, reft, self.family, self.method, self.batch(samples))


def on_ranks(case: Case, engine: str) -> None:
    halves = HALVES_WITH_IMAGES if case.method in SOURCED else HALVES
    model = case.fresh()
    reft = case.attach(model)
    alone = [case.step(model, reft, half) for half in halves]
    if not alone[0].grads and engine == "DDP":
        raise NotRun("DDP takes no model without numbers to train, and it has none")
    results = case.ranks(half_step, case.family.name, case.method, halves, engine)
    for result, mine in zip(results, alone, strict=True):
        mean = [torch.stack(grads).mean(0) for grads in zip(*(half.grads for half in alone), strict=True)]
        assert_same(Step(*result), Step(mine.loss, mean))


def with_checkpointing(case: Case) -> None:
    for use_reentrant in (False, True):
        model = case.fresh()
        reft = case.attach(model)
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})  # pyright: ignore[reportCallIssue]
        assert_same(case.step(model, reft), case.plain)


def compiled(case: Case) -> None:
    model = case.fresh()
    reft = case.attach(model)
    torch._dynamo.reset()
    assert_same(case.step(torch.compile(model, backend="eager"), reft), case.plain)  # pyright: ignore[reportArgumentType]


def in_bfloat16(case: Case) -> None:
    model = case.fresh().to(torch.bfloat16)
    reft = case.attach(model)
    batch = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in case.batch().items()}
    ours = step(model, reft, case.family, case.method, batch)
    assert {parameter.dtype for parameter in reft.parameters()} <= {torch.float32}, "numbers lost their precision"
    assert ours.loss.isfinite(), "the loss is not finite"
    torch.testing.assert_close(ours.loss, case.plain.loss, rtol=0.1, atol=0.1)
    for mine, other in zip(ours.grads, case.plain.grads, strict=True):
        assert mine.isfinite().all(), "a gradient is not finite"
        if other.abs().max() > 1e-3:
            cosine = nn.functional.cosine_similarity(mine.flatten(), other.flatten(), dim=0)
            assert cosine > 0.8 or mine.numel() < 4, f"a gradient points elsewhere: cosine {cosine:.2f}"


def offloaded(case: Case) -> None:
    import accelerate

    model = case.fresh()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert_same(case.step(model, case.attach(model)), case.plain, 0.0)


def beside_lora(case: Case) -> None:
    if importlib.util.find_spec("peft") is None:
        raise NotRun("peft is not installed")
    import peft

    model = case.fresh()
    targets = ["c_attn"] if case.family.name == "gpt2" else ["q_proj", "v_proj"]
    fan = {"fan_in_fan_out": True} if case.family.name == "gpt2" else {}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **fan))  # pyright: ignore[reportArgumentType]
    reft = case.attach(model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # so that the step is the plain one
    ours = case.step(wrapped, reft)
    assert_same(ours, case.plain)
    learning = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n and p.grad is not None]
    if ours.grads:
        assert any(grad.abs().max() > 0 for grad in learning), "LoRA learns nothing"


def with_trl(case: Case) -> None:
    if importlib.util.find_spec("trl") is None:
        raise NotRun("trl is not installed")
    if case.method == "interchange":
        raise NotRun("it has no numbers to train")
    import datasets
    import trl
    from processors import text_tokenizer

    model = case.fresh()
    reft = case.attach(model)
    args = trl.SFTConfig(
        tempfile.mkdtemp(),
        report_to="none",
        use_cpu=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=model,  # pyright: ignore[reportArgumentType]
        args=args,
        train_dataset=datasets.Dataset.from_list([{"input_ids": [1, 2]}]),
        data_collator=lambda rows: rows,
        processing_class=text_tokenizer(chat=True),
    )
    batch = case.batch()
    sources = reft.sources(source_of(case.family, batch)) if case.method in SOURCED else contextlib.nullcontext()
    model.train()
    with sources:
        loss = trainer.compute_loss(model, dict(batch))
        assert_same(Step(loss.detach(), gradients(reft, loss)), case.plain)


WAYS: dict[str, Callable[[Case], None]] = {
    "DDP": functools.partial(on_ranks, engine="DDP"),
    "FSDP2": functools.partial(on_ranks, engine="FSDP2"),
    "checkpointing": with_checkpointing,
    "compile": compiled,
    "bf16": in_bfloat16,
    "offload": offloaded,
    "peft": beside_lora,
    "TRL": with_trl,
}


def run(way: str, case: Case) -> Cell:
    """Run one cell."""
    try:
        WAYS[way](case)
    except NotRun as reason:
        return Cell("not run", str(reason))
    except ValueError as error:
        return Cell("refused", str(error))
    except (AssertionError, RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        return Cell("FAILED", f"{type(error).__name__}: {error}")
    return Cell("passed")


def table_of(families: Sequence[str], methods: Sequence[str], ways: Sequence[str]) -> dict[tuple[str, str, str], Cell]:
    """Run the cells of a table, by family, method and way."""
    ranks = Ranks()
    found: dict[tuple[str, str, str], Cell] = {}
    try:
        for name in families:
            base = build(FAMILIES[name])
            for method in methods:
                case = Case(FAMILIES[name], method, base, ranks)
                for way in ways:
                    found[name, method, way] = run(way, case)
    finally:
        ranks.close()
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries say of themselves out of the table."""
    import warnings

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, then the reasons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", default=list(INTERVENTIONS), choices=list(INTERVENTIONS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with quiet():
        cells = table_of(chosen.families, chosen.methods, chosen.ways)
    console = Console(width=150)
    table = Table("family", "intervention", *chosen.ways)
    for name in chosen.families:
        for method in chosen.methods:
            table.add_row(name, method, *(cells[name, method, way].outcome for way in chosen.ways))
    console.print(table)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for (name, method, way), cell in cells.items():
        if cell.reason:
            reasons.setdefault((cell.outcome, way, cell.reason), []).append(f"{name} {method}")
    for (outcome, way, reason), where in reasons.items():
        console.print(f"[bold]{outcome}[/] {way}: {', '.join(where)}\n    {reason}", highlight=False)
    console.print(dict(Counter(cell.outcome for cell in cells.values())))


if __name__ == "__main__":
    main()
