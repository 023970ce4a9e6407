"""Teach a frozen text-only language model new words, with the same library, trainer and collator as for images.

    python examples/finetune_lm.py                                     # the demo: under a minute on two cores
    python examples/finetune_lm.py --model meta-llama/Llama-2-7b-hf --data FOLDER --positions f7+l7 --rank 8 --tied

FOLDER holds train.jsonl and test.jsonl, a JSON object with `question` and `answer` a line.
"""

from pathlib import Path

from common import command_line, load_base, recipe, train_and_report
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import vlreft
from vlreft.data.datasets import load_jsonl


def main() -> None:
    """Train, compare with the base, save, and load the adapter back into a fresh base."""
    parser = command_line(__doc__, "demo-lm", "demo-vqa/lm_code", "runs/finetune_lm", lr=1e-2, epochs=5)
    parser.add_argument("--positions", default="l4")
    parser.add_argument("--tied", action="store_true", help="one intervention for all `+` parts of the positions")
    args = parser.parse_args()
    set_seed(args.seed)
    train, test = load_jsonl(Path(args.data) / "train.jsonl"), load_jsonl(Path(args.data) / "test.jsonl")

    # 1. A frozen model and its tokenizer, as from any hub.
    model = load_base(AutoModelForCausalLM, args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    # 2. Where to edit: the given prompt positions, after every block.
    intervention = vlreft.Intervention("loreft", positions=args.positions, rank=args.rank, tied=args.tied)
    reft = vlreft.attach(model, vlreft.ReftConfig(intervention))
    reft.print_trainable_parameters()

    # 3. Train with transformers' Trainer. The collator makes training batches and prompts from the same rows.
    trainer = vlreft.ReftTrainer(
        model=model,
        args=recipe(args),
        train_dataset=train,
        data_collator=vlreft.Collator(tokenizer),
        generation={"max_new_tokens": args.max_new_tokens, "do_sample": False},
    )
    train_and_report(trainer, test, args, AutoModelForCausalLM)


if __name__ == "__main__":
    main()
