"""Score a language model in lm-evaluation-harness, with its interventions and without them.

    pip install "vlreft[lm-eval]"
    python examples/finetune_lm.py                    # writes runs/finetune_lm/adapter
    python examples/evaluate_lm_eval.py               # two tasks on the demo's test file
    python examples/evaluate_lm_eval.py --model NAME --adapter FOLDER --tasks arc_easy gsm8k --limit 100

The model stays a transformers model, so generation needs nothing but the harness' own `HFLM(pretrained=model)`. Choices
and log-likelihoods need `ReftLM` below.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import ASSETS, load_base
from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import vlreft

HFLM: Any = huggingface.HFLM  # decorators of the harness hide both types
simple_evaluate: Any = evaluator.simple_evaluate

Request = tuple[Any, list[int], list[int]]  # a key, the ids of the prompt, those of the continuation to score
WORDS = ["blick", "dax", "fep", "kiv", "lorp", "toma", "wug", "zib"]  # the demo's answers


class ReftLM(HFLM):
    """HFLM for decoder-only models that tells the interventions where each prompt ends.

    HFLM scores a continuation by `model(input_ids)`: rows of prompt and continuation, padded on the right, without a
    mask. All of it would count as the prompt, and `l4` would edit the continuation or the padding: the score would
    change with the batch size, and be that of another model than the one that generates.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1) -> None:
        """Take a loaded model, with interventions or without."""
        # HFLM's cache of logits gives one forward to requests of the same tokens that may end their prompts elsewhere.
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, logits_cache=False
        )
        self._rows: list[tuple[Tensor, int]] = []

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score batch by batch, in HFLM's own order (the longest first), so that the rows of a call are known."""
        place = sorted(range(len(requests)), key=lambda index: _rank(requests[index]))
        scores: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(place), self.batch_size):
            batch = place[start : start + self.batch_size]
            self._rows = [_row(requests[index], self.max_length) for index in batch]
            found = super()._loglikelihood_tokens([requests[index] for index in batch], True, override_bs)
            scores.update(zip(batch, found, strict=True))
        self._rows = []
        return [scores[index] for index in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Run the model on a batch of `_loglikelihood_tokens`, with the masks that it lacks. Shapes: (B, L) ids."""
        rows = [row for row, _ in self._rows]
        if not rows or not torch.equal(pad_sequence(rows, batch_first=True), inps.cpu()):
            raise RuntimeError("these are not the rows that were asked for: this class is written for lm_eval 0.4.13")
        place_1L = torch.arange(inps.shape[1], device=inps.device)[None]
        num_tokens_B1 = torch.tensor([[len(row)] for row in rows], device=inps.device)
        num_prompt_B1 = torch.tensor([[num_prompt] for _, num_prompt in self._rows], device=inps.device)
        with torch.no_grad():
            return self.model(
                inps, attention_mask=(place_1L < num_tokens_B1).long(), prompt_mask=place_1L < num_prompt_B1
            ).logits


def _rank(request: Request) -> tuple[int, tuple[int, ...]]:
    ids = request[1] + request[2]
    return -len(ids), tuple(ids)


def _row(request: Request, max_length: int) -> tuple[Tensor, int]:
    """Return the ids that the model will see, the last one being only predicted, and how many are the prompt's."""
    _, prompt, continuation = request
    ids = (prompt + continuation)[-(max_length + 1) : -1]
    return torch.tensor(ids), len(ids) + 1 - len(continuation)


def demo_tasks(file: Path) -> list[dict[str, Any]]:
    """Return two tasks on a JSON-lines file with `question` and `answer`: by generation, and by choice of a word."""
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    generation = {"until": [], "max_gen_toks": 32, "do_sample": False}
    return [
        {
            **data,
            "task": "demo_generated",
            "output_type": "generate_until",
            "generation_kwargs": generation,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        {
            **data,
            "task": "demo_choice",
            "output_type": "multiple_choice",
            "doc_to_choice": WORDS,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ]


def evaluate(lm: Any, tasks: list[Any], limit: int | None = None) -> dict[str, Any]:
    """Run the harness; prompts are in the model's chat form if it has one, as in training."""
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=any(isinstance(task, str) for task in tasks)),  # seconds to index
        apply_chat_template=lm.tokenizer.chat_template is not None,
        limit=limit,
        bootstrap_iters=0,
    )
    assert results is not None  # None is for the other processes of a distributed run
    return results


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a run, by task and metric."""
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if "," in metric and "_stderr" not in metric
    }


def main() -> None:
    """Load base and adapter, evaluate both ways, print the scores side by side and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "demo-lm"), help="a folder or a name on the hub")
    parser.add_argument("--adapter", default="runs/finetune_lm/adapter", help="what `reft.save_pretrained` wrote")
    parser.add_argument("--tasks", nargs="+", help="the harness' names; by default two tasks on the demo's test file")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first so many rows of each task")
    parser.add_argument("--output", default="runs/evaluate_lm_eval")
    args = parser.parse_args()

    # 1. A frozen model with its interventions, as anywhere else.
    model = load_base(AutoModelForCausalLM, args.model)
    model.generation_config.max_new_tokens = None  # how long an answer may be is for the task to say
    reft = vlreft.load(model, args.adapter)

    # 2. The harness takes it as it is.
    lm = ReftLM(model, AutoTokenizer.from_pretrained(args.model), args.batch_size)
    tasks = args.tasks or demo_tasks(ASSETS / "demo-vqa/lm_code/test.jsonl")
    after = scores_of(evaluate(lm, tasks, args.limit))
    with reft.disabled():
        before = scores_of(evaluate(lm, tasks, args.limit))

    print(f"\n  {'':<32}{'base':>8}{'ReFT':>8}")
    print("\n".join(f"  {name:<32}{before[name]:>8.3f}{after[name]:>8.3f}" for name in after))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps({"base": before, "reft": after}, indent=2) + "\n")


if __name__ == "__main__":
    main()
