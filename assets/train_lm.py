"""Train assets/demo-lm: a text-only model that answers questions about scenes told in words.

Run: python assets/train_lm.py            (one CPU thread; see assets/README.md for the minutes it took)

It reads `there is a small red circle , a large blue star . what is the color of the star ?`. Vocabulary and layout
of the prompt are those of demo-llava, without the image. Training starts from demo-llava's language model: from
random weights it did not find out within 1250 steps which colour belongs to which shape.

Shapes: B sequences, L tokens each, padded on the right.
"""

import argparse
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import (
    IGNORE,
    TOKEN_IDS,
    Optimizers,
    build_text_config,
    build_tokenizer,
    chat_template,
    constant_then_linear,
    copy_drill,
    encode,
    log,
    save_half,
)
from torch.nn import functional
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
from world import ask, ask_any, in_words, make_scene, scene_rng

KIND_WEIGHTS = {"color": 1.0, "shape": 1.0, "size": 1.0, "count": 0.5, "present": 1.0}
KINDS = tuple(KIND_WEIGHTS)
BATCH = 64  # conversations
TURNS = 4  # questions in each: the scene is read once for all of them
COPY_SHARE = 0.1  # of the conversations; the rest are about a scene

Turn = tuple[list[int], list[int]]  # question ids, answer ids


def conversation(rng: random.Random) -> list[Turn]:
    """Questions about a fresh scene, which stands before the first of them, or copy drills."""
    if rng.random() < COPY_SHARE:
        return [copy_drill(rng) for _ in range(TURNS)]
    scene = make_scene(rng)
    asked = [ask_any(scene, KINDS, rng, tuple(KIND_WEIGHTS.values())) for _ in range(TURNS)]
    opening = encode(in_words(scene, rng))
    return [
        (opening + encode(qa.question) if turn == 0 else encode(qa.question), encode(qa.answer))
        for turn, qa in enumerate(asked)
    ]


def collate(conversations: list[list[Turn]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, both (B, L); a label is the token to predict at its place, or IGNORE."""
    rows = []
    for turns in conversations:
        ids, labels = [TOKEN_IDS["<s>"]], [IGNORE]
        for question, answer in turns:
            prompt, target = [TOKEN_IDS["<user>"], *question, TOKEN_IDS["<assistant>"]], [*answer, TOKEN_IDS["</s>"]]
            ids += prompt + target
            labels += [IGNORE] * (len(prompt) - 1) + target + [IGNORE]
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [TOKEN_IDS["<pad>"]] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
    return ids, labels


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, split: str, number: int) -> dict[str, float]:
    """Per kind, the share of right answers to one question about each of the first `number` scenes of a split."""
    right, total = defaultdict(int), defaultdict(int)
    for kind in KINDS:
        examples = []
        for index in range(number):
            scene, rng = make_scene(scene_rng(split, index)), scene_rng(split, index, "lm_eval")
            if (qa := ask(scene, kind, rng)) is not None:
                examples.append([(encode(f"{in_words(scene, rng)} {qa.question}"), encode(qa.answer))])
        ids, labels = collate(examples)
        wrong = (model(ids).logits.argmax(-1) != labels) & (labels != IGNORE)
        right[kind], total[kind] = (~wrong.any(-1)).sum().item(), len(examples)
    scores = {kind: round(right[kind] / total[kind], 4) for kind in KINDS}
    return {"mean": round(sum(scores.values()) / len(scores), 4), **scores}


def train(model: LlamaForCausalLM, args: argparse.Namespace) -> None:
    """Next-token loss on the answers; every step draws fresh scenes, so nothing can be learnt by heart."""
    schedule = constant_then_linear(args.steps, warmup=40, decay_from=0.4)
    optimizers = Optimizers([model], muon=0.005, adamw=1e-3, schedule=schedule)
    rng, start = scene_rng("lm_base", args.seed), time.process_time()
    for step in range(args.steps):
        ids, labels = collate([conversation(rng) for _ in range(BATCH)])
        wanted = labels != IGNORE
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state[wanted]
            logits = model.lm_head(hidden)
        loss = functional.cross_entropy(logits.float(), labels[wanted])
        optimizers.step(loss)
        if (step + 1) % args.every == 0:
            seconds = round(time.process_time() - start)
            scores = exact_match(model, "dev", 200)
            log(args.log, step=step + 1, cpu_seconds=seconds, loss=round(loss.item(), 4), **scores)


def main() -> None:
    """Train, report on dev and test, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo-lm", help="folder to write")
    parser.add_argument("--start", type=Path, default=Path(__file__).parent / "demo-llava", help="model to start from")
    parser.add_argument("--log", type=Path, help="file to append one JSON line per evaluation to")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations on dev")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(build_text_config())
    model.model.load_state_dict(
        LlavaForConditionalGeneration.from_pretrained(args.start).model.language_model.state_dict()
    )
    model.set_attn_implementation("eager")  # faster than sdpa on these short sequences
    train(model, args)
    save_half(model, args.out)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template(images=False)
    tokenizer.save_pretrained(args.out)
    for split, number in (("dev", 500), ("test", 1000)):
        log(args.log, stage="final", split=split, **exact_match(model, split, number))


if __name__ == "__main__":
    main()
