"""`ReftMixin` for any `transformers.Trainer` subclass, and `ReftTrainer`: one trainer for text, VQA and captioning."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import EvalLoopOutput

from vlreft.causes.interchange import InterchangeCollator
from vlreft.data.collator import Collator
from vlreft.data.contrast import ClassCollator, PairCollator
from vlreft.layout import prompt_from_labels, refuse_bad_labels
from vlreft.reft import Reft, find_only_reft
from vlreft.reuse.grouping import ImageGroups, image_keys
from vlreft.reuse.kept import KeptPrefixes
from vlreft.reuse.prefix import PrefixReuse
from vlreft.reuse.questions import Questions
from vlreft.running.beside import load_peft, peft_model, peft_parameters, save_peft
from vlreft.training.answers import AnswerFile, answer_all
from vlreft.training.faults import SafeTraining
from vlreft.training.sharding import Sharding

logger = logging.getLogger("vlreft")

# What models put out beside their logits; the Trainer would gather it from all processes as if it were predictions.
NO_PREDICTIONS = ("cache", "past_key_values", "image_outputs", "image_hidden_states")

# Collators that turn columns into model inputs; the model's signature knows none of these columns.
ROW_COLLATORS = (Collator, InterchangeCollator, ClassCollator, PairCollator)

AnswerMetrics = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Mapping[str, float]]


class ReftMixin(SafeTraining, Sharding):
    """Make a Trainer subclass train interventions: `class MyTrainer(ReftMixin, SFTTrainer)`.

    The model must have interventions attached. Checkpoints then hold the adapter alone, resuming and
    `load_best_model_at_end` read it back in place, the prompt's end reaches the model even where the trainer takes the
    labels away (label smoothing, a loss function of one's own), and a `vlreft.Collator` sees all columns. What happens
    when something breaks is `vlreft.training.faults.SafeTraining`'s.
    """

    # Off here: other trainers read the logits of the whole batch. `ReftTrainer` has "auto".
    reuse_prefix: Literal["auto"] | bool = False
    keep_prefixes: int | str | KeptPrefixes | None = None
    keep_prefixes_in: str | Path | None = None
    group_by_image: bool = False
    _wrapped: Any = None
    _inner: Any = None
    _reuse: PrefixReuse | None = None
    _kept: KeptPrefixes | None = None

    @property
    def reft(self) -> Reft:
        """The interventions being trained. Raises ValueError unless exactly one set is attached."""
        return find_only_reft(self._unwrapped())

    def _unwrapped(self) -> nn.Module:
        """Return the model as it was given, perhaps a `PeftModel`, without what accelerate has put around it."""
        if self._wrapped is not self.model:  # unwrapping looks through all modules, and a step asks more than once
            self._wrapped = self.model
            self._inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return self._inner

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the trainer's own optimizer. Raises ValueError if it would train what no checkpoint holds."""
        _check_trainable(self.reft, self._unwrapped())
        if self.reft.acting_groups is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "inside `reft.groups(...)` the other groups are held where an optimiser steps on the parameters that "
                "they have, which FSDP and DeepSpeed do not; train on one device or with DDP, or all groups together"
            )
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the trainer's own loss, with `prompt_mask` added to the inputs, inside their `sources` if any."""
        if "sources" in inputs:
            with self._sourced(inputs) as rest:
                return ReftMixin.compute_loss(self, model, rest, return_outputs, num_items_in_batch)
        if isinstance(model, nn.DataParallel):
            raise ValueError("torch.nn.DataParallel copies the hooks without their model; use `accelerate launch`")
        labels = inputs.get("labels")
        is_generative = isinstance(self.reft.model, GenerationMixin)
        if is_generative and isinstance(labels, Tensor) and "prompt_mask" not in inputs:
            if labels.device.type == "cpu" or self.state.global_step == 0:  # elsewhere looking costs a synchronisation
                refuse_bad_labels(labels)
            inputs = {**inputs, "prompt_mask": prompt_from_labels(labels)}
        if is_generative and isinstance(self.label_smoother, LabelSmoother):
            # transformers shifts the labels for text-only models alone; a vision-language model would learn to repeat
            # the token that it is reading.
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        if not model.training or not isinstance(labels, Tensor) or (reuse := self._prefix_reuse()) is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with reuse.cut(inputs) as rest:
            return super().compute_loss(model, rest, return_outputs, num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a step inside the batch's `sources`: checkpointed blocks run once more in the backward pass."""
        with self._sourced(inputs) as rest:
            return super().training_step(model, rest, num_items_in_batch)

    @contextmanager
    def _sourced(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a batch without its `sources`, which interchange interventions put in inside."""
        if "sources" not in inputs:
            yield inputs
            return
        collator = self.data_collator
        positions = collator.source_positions if isinstance(collator, InterchangeCollator) else None
        with ExitStack() as scopes:
            with self.compute_loss_context_manager():  # the sources run in the precision of the base
                sources: Any = self._prepare_input(inputs["sources"])
                scopes.enter_context(self.reft.sources(sources, positions))
            yield {name: value for name, value in inputs.items() if name != "sources"}

    def _prefix_reuse(self) -> PrefixReuse | None:
        if self._reuse is not None:
            return self._reuse
        # A sharded model hangs unless all ranks call it equally often; a compiled one is compiled anew for each length.
        # A connector that is trained has its gradient from the prefix.
        trains_modules = bool(self.reft.config.modules_to_save) or _trains_peft(self.reft)
        forbidden = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile or trains_modules
        if forbidden and self.reuse_prefix is True:
            raise ValueError(
                "`reuse_prefix=True` goes with neither FSDP, DeepSpeed, torch_compile, peft nor `modules_to_save`; use "
                "'auto'"
            )
        kept = self._kept_prefixes()
        if forbidden and kept is not None and kept.required:
            raise ValueError(
                "`keep_prefixes` goes with neither FSDP, DeepSpeed, torch_compile, peft nor `modules_to_save`; leave "
                "it out"
            )
        if forbidden or self.reuse_prefix is False:
            return None
        self._reuse = PrefixReuse(self.reft, required=self.reuse_prefix is True, kept=kept)
        return self._reuse

    def _kept_prefixes(self) -> KeptPrefixes | None:
        """Return the store of prefixes, made once; None if none are kept. Raises ValueError for settings that clash."""
        if self.keep_prefixes is None:
            if self.keep_prefixes_in is not None:
                raise ValueError("`keep_prefixes_in` says where, `keep_prefixes` how much: give it a budget as '20GB'")
            return None
        if self.reuse_prefix is False:
            raise ValueError("`keep_prefixes` keeps what `reuse_prefix` reuses, which is off; set it to 'auto' or True")
        if isinstance(self.keep_prefixes, KeptPrefixes):
            if self.keep_prefixes_in is not None:
                raise ValueError("a `vlreft.KeptPrefixes` has its own folder; leave `keep_prefixes_in` out")
            return self.keep_prefixes
        if self._kept is None:
            self._kept = KeptPrefixes(self.keep_prefixes, self.keep_prefixes_in)
        return self._kept

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_image:
            return super()._get_train_sampler(train_dataset)
        strategy = self.args.train_sampling_strategy
        if strategy != "random":
            raise ValueError(
                f"`group_by_image` is an order of its own, as `train_sampling_strategy` (={strategy!r}) is"
            )
        # The trainer's own: of the given one, columns that the model does not read may have been taken away.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ImageGroups(
            image_keys(self.train_dataset), self._train_batch_size, seed=seed, epoch=lambda: int(self.state.epoch or 0)
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter instead of the model; peft's, if they are trained beside it, into a folder of their own."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        self.reft.save_pretrained(folder)
        save_peft(self._unwrapped(), folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.reft.load_weights(resume_from_checkpoint)
        load_peft(self._unwrapped(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info("loading the best adapter, %s (%s)", best, self.state.best_metric)
        self.reft.load_weights(best)
        load_peft(self._unwrapped(), Path(best))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        assert columns is not None
        if "prompt_mask" not in columns:  # the hooks take it; the forward, which the signature is of, does not
            columns.append("prompt_mask")

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if isinstance(self.data_collator, ROW_COLLATORS):
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, ROW_COLLATORS):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)


def _trains_peft(reft: Reft) -> bool:
    return any(parameter.requires_grad for parameter in peft_parameters(reft.model))


def _check_trainable(reft: Reft, model: nn.Module) -> None:
    """Refuse to train nothing, or numbers that are not in the checkpoints and would be lost without a word."""
    own = {id(parameter) for parameter in reft.parameters()}
    if not any(parameter.requires_grad for parameter in reft.parameters()):
        raise ValueError(
            f"the interventions '{reft.name}' are frozen: something froze the whole model after `vlreft.attach`, as "
            "peft does; call `vlreft.attach` last, or `reft.requires_grad_()` after it"
        )
    if peft_model(model) is not None:
        own |= {id(parameter) for parameter in peft_parameters(model)}
    elif _trains_peft(reft):
        raise ValueError(
            "peft's adapters are trained beside the interventions, and only a `PeftModel` can save them: give the "
            "trainer what `peft.get_peft_model(model, config)` returned"
        )
    others = [name for name, p in reft.model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise ValueError(
            f"{len(others)} parameters of the base are trainable ({others[0]}, ...), but checkpoints hold the "
            "interventions and `modules_to_save` alone: freeze them (`requires_grad_(False)`), name their module in "
            "`ReftConfig(..., modules_to_save=[...])`, or use a plain transformers.Trainer"
        )


class ReftTrainer(ReftMixin, Trainer):
    """`transformers.Trainer` for interventions, with evaluation by generation.

    answer_metrics: called with the generated answers and the examples they answer, returns named numbers; they join the
        evaluation's metrics (`eval_<name>`), so that early stopping and `load_best_model_at_end` can use them. Needs a
        `vlreft.Collator`. Their answers are written to `answers/` in the output folder as they come, and an interrupted
        evaluation goes on where it stopped.
    generation: arguments of `model.generate` for it; greedy with 32 new tokens by default.
    reuse_prefix: run the tokens before the first edited one without a graph (same gradients, less time and memory):
        wherever that is exact ("auto"), always (True: an error that says why where it is not), or never (False).
    keep_prefixes: a budget of host memory, as "2GB", in which these tokens' keys and values are kept over epochs, least
        recently used first to go, known by the content of text and pictures; what one takes is logged at the first.
    keep_prefixes_in: a folder to keep them in instead, within that budget, as safetensors files of this run alone.
    group_by_image: batches hold the questions about one picture together (it runs once for them), pictures in random
        order; rows have an `image_id`, or the path of their `image`. In evaluation rows keep their order, and those of
        one picture that follow one another run it once, wherever that is exact.
    Everything else is `transformers.Trainer`'s.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        answer_metrics: AnswerMetrics | None = None,
        generation: Mapping[str, Any] | None = None,
        reuse_prefix: Literal["auto"] | bool = "auto",
        keep_prefixes: int | str | KeptPrefixes | None = None,
        keep_prefixes_in: str | Path | None = None,
        group_by_image: bool = False,
    ) -> None:
        """Check that there is something to train, then hand over to `transformers.Trainer`."""
        find_only_reft(model)
        if answer_metrics is not None and not isinstance(data_collator, Collator | InterchangeCollator):
            raise ValueError("`answer_metrics` needs `data_collator=vlreft.Collator(processor)` to make prompts with")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if isinstance(data_collator, ClassCollator | PairCollator):
            self.label_names = ["labels"]  # else read off the model's forward, which knows of no such thing
        self.answer_metrics = answer_metrics
        self.reuse_prefix = reuse_prefix
        self.keep_prefixes, self.keep_prefixes_in = keep_prefixes, keep_prefixes_in
        self.group_by_image = group_by_image
        self._kept_prefixes()  # says now what is wrong with its settings
        self.generation = dict(generation or {"max_new_tokens": 32, "do_sample": False})

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate by loss, then by generated answers if there are `answer_metrics`."""
        if ignore_keys is None:
            config = self.reft.model.config if isinstance(self.reft.model, PreTrainedModel) else None
            ignore_keys = [*getattr(config, "keys_to_ignore_at_inference", ()), *NO_PREDICTIONS]
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.answer_metrics is None:
            return output
        dataset: Any = dataloader.dataset
        answers = self.predict_answers(dataset, file=self._evaluation_file(metric_key_prefix))
        scores = self.answer_metrics(answers, dataset)
        named = {f"{metric_key_prefix}_{name}": float(score) for name, score in scores.items()}
        return output._replace(metrics=dict(output.metrics or {}) | named)

    def predict_answers(
        self,
        dataset: Any,
        *,
        file: AnswerFile | None = None,
        score: Callable[[Sequence[str]], float] | None = None,
    ) -> list[str]:
        """Generate an answer for each example of a dataset with a length; prompts are batched and left-padded.

        file: takes the answers as they come; those that it holds already are not generated again. Examples are told
            apart by `id` or `question_id`, else by their place. One process only.
        score: of the answers so far, those to the first examples, for the progress bar; called a few times in all.
        """
        collator = self.data_collator
        if not isinstance(collator, Collator | InterchangeCollator):
            raise ValueError("`predict_answers` needs `data_collator=vlreft.Collator(processor)`")
        if file is not None and self.args.world_size > 1:
            raise ValueError(f"`file` is for one process, there are {self.args.world_size}; gather the answers instead")

        generation = self.generation | ({"synced_gpus": True} if self.is_fsdp_enabled else {})
        questions = self._shared_questions(collator)

        def answer(examples: list[Any]) -> list[str]:
            if questions is not None:
                with self.compute_loss_context_manager():
                    return questions.answer(examples, **generation)
            batch = self._prepare_inputs(collator.prompts(examples))
            if self.is_fsdp_enabled:
                self.refuse_other_inputs(batch)
            with torch.no_grad(), self._sourced(batch) as rest, self.compute_loss_context_manager():
                ids_BS = self.reft.model.generate(**rest, **generation)  # pyright: ignore[reportCallIssue]
            return collator.decode(ids_BS, batch["input_ids"].shape[1])

        model, places = self.reft.model, self.own_places(len(dataset))
        size, is_shown = self.args.per_device_eval_batch_size, not self.args.disable_tqdm
        was_training = model.training
        model.eval()
        try:
            answers = answer_all(answer, dataset, places, size, file=file, score=score, is_shown=is_shown)
        finally:
            model.train(was_training)
        return [text for _, text in sorted(dict(self._gather(list(zip(places, answers, strict=True)))).items())]

    def _shared_questions(self, collator: Collator | InterchangeCollator) -> Questions | None:
        """Return what runs a picture once for the rows that follow one another; None where rows run one by one."""
        model = self.reft.model
        # The processes of a sharded model call it equally often. Sources are prompts of their own.
        if not self.group_by_image or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        if not isinstance(model, PreTrainedModel) or not isinstance(collator, Collator):
            return None
        return Questions(model, collator, required=False)

    def answers_key(self) -> str:
        """Return a hash of what answers depend on, for `AnswerFile`: interventions, generation, batch, base."""
        base = self.reft.model.config.name_or_path if isinstance(self.reft.model, PreTrainedModel) else ""
        settings = (self.generation, self.args.per_device_eval_batch_size, base)
        return hashlib.sha256(f"{self.reft.fingerprint()} {settings}".encode()).hexdigest()

    def _evaluation_file(self, prefix: str) -> AnswerFile | None:
        if self.args.world_size > 1:
            return None
        path = Path(str(self.args.output_dir), "answers", f"{prefix}-{self.state.global_step:06d}.jsonl")
        return AnswerFile(path, self.answers_key(), replace=True)

    def _gather(self, answers: list[tuple[int, str]]) -> list[tuple[int, str]]:
        if self.args.world_size == 1:
            return answers
        from accelerate.utils import gather_object

        return gather_object(answers)
