"""Teach a frozen vision-language model to caption in a new style.

    python examples/caption.py                                       # the demo: about a minute on two cores
    python examples/caption.py --model llava-hf/llava-1.5-7b-hf --data FOLDER --test-split val --lr 9e-4 --epochs 1

FOLDER holds captions in COCO's format and its image folders. A style spans the whole caption, and edits of the prompt
alone fade along it: the second intervention acts on the caption's own tokens as they are generated (`response`).
"""

from common import command_line, load_base, recipe, train_and_report
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vlreft
from vlreft.data.datasets import load_captions


def main() -> None:
    """Train, compare with the base, save, and load the adapter back into a fresh base."""
    parser = command_line(__doc__, "demo-llava", "demo-vqa/short", "runs/caption", lr=3e-2, epochs=8)
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    args = parser.parse_args()
    set_seed(args.seed)
    train, test = load_captions(args.data, args.train_split), load_captions(args.data, args.test_split)

    # 1. A frozen model and its processor, as from any hub.
    model = load_base(AutoModelForImageTextToText, args.model)
    processor = AutoProcessor.from_pretrained(args.model)

    # 2. Where to edit: the text of the prompt, and the caption.
    config = vlreft.ReftConfig(
        [
            vlreft.Intervention("loreft", positions="question", rank=args.rank),
            vlreft.Intervention("loreft", positions="response", rank=args.rank),
        ]
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


if __name__ == "__main__":
    main()
