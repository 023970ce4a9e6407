"""Score a vision-language model in lmms-eval, with its interventions and without them.

    pip install "vlreft[lmms-eval]"                   # many packages: give it an environment of its own
    python examples/finetune_vqa.py                   # writes runs/finetune_vqa/adapter
    python examples/evaluate_lmms_eval.py             # a task on the demo's test questions
    python examples/evaluate_lmms_eval.py --model llava-hf/llava-1.5-7b-hf --adapter FOLDER --tasks pope mme

The harness loads the base by its own class; the interventions go on the transformers model inside of it, `lm.model`.
lmms-eval counts an error in `generate` as an empty answer and goes on: read its log if a score is 0.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ASSETS
from datasets import DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask  # pyright: ignore[reportMissingImports]
from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports]
from transformers import PreTrainedModel

import vlreft
from vlreft.data.datasets import load_vqa


def load_lm(model: str, harness_class: str = "llava_hf") -> Any:
    """Let the harness load a model: bfloat16 on a GPU, float32 on the CPU."""
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    # Without `device_map` the harness passes an empty one on, which transformers 5 refuses.
    lm = get_model(harness_class)(pretrained=model, device=device, device_map=device, dtype=dtype)
    lm.model.eval()
    if lm.model.num_parameters() < 50_000_000:
        torch.set_num_threads(1)
    return lm


def demo_task(folder: Path, scratch: Path) -> ConfigurableMessagesTask:
    """Return a task on a folder in VQAv2's form, its test split written to `scratch` as lmms-eval reads it."""
    DatasetDict({"test": load_vqa(folder, "test")}).save_to_disk(scratch)
    return ConfigurableMessagesTask(
        config={
            "task": "demo_vqa",
            "dataset_path": str(scratch),
            "dataset_kwargs": {"load_from_disk": True},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_visual": lambda row: [row["image"].convert("RGB")],
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"max_new_tokens": 32},
            "process_results": is_exact,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def is_exact(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 where the generated answer is the reference, letter case and outer blanks aside."""
    return {"exact_match": float(results[0].strip().lower() == row["answer"].strip().lower())}


def evaluate(lm: Any, model: PreTrainedModel, tasks: list[Any], limit: int | None = None) -> dict[str, Any]:
    """Run the harness on `model`, the one that `lm` was loaded with."""
    lm._model = model  # the harness drops its model at the end of a run
    results = simple_evaluate(model=lm, tasks=tasks, batch_size=1, limit=limit, bootstrap_iters=0)
    assert results is not None  # None is for the other processes of a distributed run
    return results


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a run, by task and metric."""
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, int | float)
    }


def main() -> None:
    """Let the harness load the base, put the adapter on it, evaluate both ways, print the scores side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "demo-llava"), help="a folder or a name on the hub")
    parser.add_argument("--harness-class", default="llava_hf", help="the harness' name for this kind of model")
    parser.add_argument("--adapter", default="runs/finetune_vqa/adapter", help="what `reft.save_pretrained` wrote")
    parser.add_argument("--tasks", nargs="+", help="the harness' names; by default a task on the demo's test questions")
    parser.add_argument("--limit", type=int, help="only the first so many rows of each task")
    parser.add_argument("--output", default="runs/evaluate_lmms_eval")
    args = parser.parse_args()

    # 1. The harness' own object, with a frozen transformers model in it.
    lm = load_lm(args.model, args.harness_class)

    # 2. The interventions go on that model, in place, and come off for the base's score.
    model = lm.model
    reft = vlreft.load(model, args.adapter)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = args.tasks or [demo_task(ASSETS / "demo-vqa/code", Path(scratch))]
        after = scores_of(evaluate(lm, model, tasks, args.limit))
        with reft.disabled():
            before = scores_of(evaluate(lm, model, tasks, args.limit))

    print(f"\n  {'':<32}{'base':>8}{'ReFT':>8}")
    print("\n".join(f"  {name:<32}{before[name]:>8.3f}{after[name]:>8.3f}" for name in after))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps({"base": before, "reft": after}, indent=2) + "\n")


if __name__ == "__main__":
    main()
