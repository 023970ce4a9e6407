"""Teach a frozen vision-language model to answer a new kind of question, by editing a few hidden states.

    python examples/finetune_vqa.py                                  # the demo: about a minute on two cores
    python examples/finetune_vqa.py --data assets/demo-vqa/refuse --edit text=image:all --edit text=prompt:l4 --lr 3e-2
    python examples/finetune_vqa.py --data assets/demo-vqa/bgr --edit vision=prompt
    python examples/finetune_vqa.py --model llava-hf/llava-1.5-7b-hf --data FOLDER --test-split val --lr 9e-4 --epochs 1

FOLDER holds VQAv2's official questions and annotations JSON and its image folders; a data set's name on the hub works
as well. Each `--edit SITE=POSITIONS` adds one LoReFT per layer of that site.
"""

from pathlib import Path
from typing import Any

from common import command_line, load_base, recipe, train_and_report
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vlreft
from vlreft.data.datasets import load_vqa


def main() -> None:
    """Train, compare with the base, save, and load the adapter back into a fresh base."""
    parser = command_line(__doc__, "demo-llava", "demo-vqa/code", "runs/finetune_vqa", lr=1e-2, epochs=3)
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--edit", action="append", metavar="SITE=POSITIONS", help="default: text=prompt:l4")
    args = parser.parse_args()
    set_seed(args.seed)
    train, test = load_data(args.data, args.train_split), load_data(args.data, args.test_split)

    # 1. A frozen model and its processor, as from any hub.
    model = load_base(AutoModelForImageTextToText, args.model)
    processor = AutoProcessor.from_pretrained(args.model)

    # 2. Where to edit: `attach` freezes the model and hooks the interventions on, in place.
    edits = [edit.split("=", 1) for edit in args.edit or ["text=prompt:l4"]]
    config = vlreft.ReftConfig(
        vlreft.Intervention("loreft", site=site, layers="all", positions=positions, rank=args.rank)
        for site, positions in edits
    )
    reft = vlreft.attach(model, config)
    reft.print_trainable_parameters()

    # 3. Train with transformers' Trainer. The collator makes training batches and prompts from the same rows.
    trainer = vlreft.ReftTrainer(
        model=model,
        args=recipe(args),
        train_dataset=train,
        data_collator=vlreft.Collator(processor),
        generation={"max_new_tokens": args.max_new_tokens, "do_sample": False},
    )
    train_and_report(trainer, test, args, AutoModelForImageTextToText)


def load_data(name: str, split: str) -> Any:
    """Load a folder in VQAv2's official format, or a data set on the hub with image, question and answer columns."""
    if Path(name).is_dir():
        return load_vqa(name, split)
    import datasets

    data = datasets.load_dataset(name, split=split)
    return data if "answer" in data.column_names else data.rename_column("multiple_choice_answer", "answer")


if __name__ == "__main__":
    main()
