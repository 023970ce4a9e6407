"""DAS against pyvene's, on a toy model with a known cause: interchange accuracy, and time per step.

    python -m tasks.bench.das                                      # vlreft alone: what it reaches
    python -m tasks.bench.das --pyvene ~/old/bin/python            # beside pyvene 0.1.8, with transformers 4.57

The model is a small Llama that is trained here to answer whether two pairs of symbols are alike in being equal:
(a == b) == (c == d), and to say a == b at b. The cause that is looked for is a == b, at the token b. Both sides load
the same weights, start from the same subspace and take the same batches and steps of Adam, over several seeds.

Steps are timed in turns, on the toy model and on a wide one with random weights, each side beside a floor of its own
interpreter: the source's run to its end without a graph, the base's with gradient behind the place.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import vlreft
from tasks.bench.das_worker import Method, load_base, start_rotation, time_steps, timed_steps, train
from tasks.bench.measure import describe_machine, describe_versions

NUM_SYMBOLS, NO, YES = 8, 8, 9
WORKER = Path(__file__).with_name("das_worker.py")
WIDE = {
    "vocab_size": NUM_SYMBOLS + 2,
    "hidden_size": 2048,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}


def draw(num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw rows of four symbols (N, 4); each pair is equal in half of them."""
    ids_NL = torch.randint(NUM_SYMBOLS, (num_rows, 4), generator=generator)
    is_equal_N2 = torch.rand(num_rows, 2, generator=generator) < 0.5
    other_N2 = torch.randint(1, NUM_SYMBOLS, (num_rows, 2), generator=generator)
    ids_NL[:, 1::2] = (ids_NL[:, ::2] + torch.where(is_equal_N2, 0, other_N2)) % NUM_SYMBOLS
    return ids_NL


def answers(is_first_equal_N: Tensor, ids_NL: Tensor) -> Tensor:
    """Return the answer's token of rows whose first pair counts as equal or not."""
    return torch.where(is_first_equal_N == (ids_NL[:, 2] == ids_NL[:, 3]), YES, NO)


def is_first_equal(ids_NL: Tensor) -> Tensor:
    """Return the cause."""
    return ids_NL[:, 0] == ids_NL[:, 1]


def train_base(folder: Path, num_steps: int) -> float:
    """Train the toy model, save it; return its accuracy on all rows there are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_SYMBOLS + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    for _ in range(num_steps):
        ids_BL = draw(256, generator)
        logits_BLV, cause_B = model(input_ids=ids_BL).logits, is_first_equal(ids_BL)
        loss = F.cross_entropy(logits_BLV[:, -1], answers(cause_B, ids_BL))
        # It is told the cause too, or it would be long at finding out.
        (loss + F.cross_entropy(logits_BLV[:, 1], torch.where(cause_B, YES, NO))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    every_NL = torch.cartesian_prod(*[torch.arange(NUM_SYMBOLS)] * 4)
    with torch.no_grad():
        said_N = model.eval()(input_ids=every_NL).logits[:, -1].argmax(-1)
    model.save_pretrained(folder)
    return float((said_N == answers(is_first_equal(every_NL), every_NL)).float().mean())


def pairs(num_rows: int, seed: int) -> dict[str, list[Any]]:
    """Return bases, sources and what the model should say if a == b came from the source."""
    generator = torch.Generator().manual_seed(seed)
    base_NL, source_NL = draw(num_rows, generator), draw(num_rows, generator)
    answer_N = answers(is_first_equal(source_NL), base_NL)
    return {"base": base_NL.tolist(), "source": source_NL.tolist(), "answer": answer_N.tolist()}


def vlreft_method(model: Any, order: dict[str, Any], seed: int) -> Method:
    """DAS as it is done here."""
    place = f"[{order['position']}:{order['position'] + 1}]"
    item = vlreft.Intervention("das", layers=order["layer"], positions=place, rank=order["rank"], init="reference")
    reft = vlreft.attach(model, vlreft.ReftConfig(item))
    with torch.no_grad():
        for parameter in reft.parameters():
            parameter.copy_(start_rotation(order, seed))

    def exchange(base_BL: Tensor, source_BL: Tensor) -> Tensor:
        with reft.sources({"input_ids": source_BL}):
            return model(input_ids=base_BL).logits[:, -1]

    return Method(exchange, list(reft.parameters()))


class Peer:
    """The other interpreter, asked one thing after another."""

    def __init__(self, python: str, order: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(WORKER), str(order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **command: Any) -> Any:
        """Return the answer to a command. Raises ValueError if the other side died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(f"pyvene's side died at {command}, with the return code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compare_times(order: dict[str, Any], peer: Peer | None, num_rounds: int, count: int) -> dict[str, Any]:
    """Time steps in turns; return medians in milliseconds, wall and CPU, and ratios with quartiles over rounds."""
    ours = timed_steps(order, "vlreft", vlreft_method)
    rounds: list[dict[str, list[float]]] = []
    for number in range(-1, num_rounds):
        found = {name: time_steps(steps, count) for name, steps in ours.items()}
        if peer is not None:
            found |= peer.ask(do="time", count=count)
        if number >= 0:
            rounds.append(found)
    pairs_of = [(f"{side}{size}", f"{side}{size} floor") for side in ("vlreft", "pyvene") for size in ("", " wide")]
    pairs_of += [("vlreft", "pyvene"), ("vlreft wide", "pyvene wide")]
    ratios = {}
    for of, to in pairs_of:
        if to not in rounds[0] or of not in rounds[0]:
            continue
        for place, kind in enumerate(("wall", "cpu")):
            values = [found[of][place] / found[to][place] for found in rounds]
            quartiles = statistics.quantiles(values)[::2]
            ratios[f"{of} / {to}, {kind}"] = {"median": statistics.median(values), "quartiles": quartiles}
    medians = {
        name: [statistics.median(found[name][place] for found in rounds) for place in (0, 1)] for name in rounds[0]
    }
    return {"milliseconds": medians, "ratios": ratios, "num_rounds": num_rounds, "steps_per_round": count}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the toy model, run both sides, write the record as JSON and print it."""
    args = _parse(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="vlreft-das-") as name:
        folder = Path(name)
        base_accuracy = train_base(folder, args.base_steps)
        order = {
            "folder": name,
            "width": 64,
            "rank": args.rank,
            "layer": args.layer,
            "position": args.position,
            "threads": args.threads,
            "batch_size": 64,
            "num_steps": args.steps,
            "wide": WIDE,
            "train": pairs(4096, 1),
            "test": pairs(16_384, 2),
        }
        path = folder / "order.json"
        path.write_text(json.dumps(order), encoding="utf-8")
        peer = Peer(args.pyvene, path) if args.pyvene else None
        seeds: list[dict[str, Any]] = []
        for seed in range(args.seeds):
            found: dict[str, Any] = {"vlreft": train(vlreft_method(load_base(order), order, seed), order, seed)}
            if peer is not None:
                found["pyvene"] = peer.ask(do="train", seed=seed)
            seeds.append(found)
        times = compare_times(order, peer, args.rounds, args.steps_per_round)
        versions = {"ours": describe_versions(), "theirs": peer.ask(do="versions") if peer is not None else None}
        if peer is not None:
            peer.close()
    settings = {name: order[name] for name in ("rank", "layer", "position", "batch_size", "num_steps")}
    record = {
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions,
        "settings": settings,
        "base_accuracy": base_accuracy,
        "accuracy": seeds,
        "times": times,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"base accuracy {base_accuracy:.4f}")
    for seed, found in enumerate(seeds):
        shown = ", ".join(f"{side} {one['before']:.3f} -> {one['after']:.3f}" for side, one in found.items())
        print(f"seed {seed}: {shown}")
    print(", ".join(f"{name} {wall:.2f} ({cpu:.2f}) ms" for name, (wall, cpu) in times["milliseconds"].items()))
    for name, ratio in times["ratios"].items():
        print(f"{name}: {ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})")
    return record


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.bench.das", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pyvene", metavar="PYTHON", help="the interpreter of an environment with pyvene")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--position", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps-per-round", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/das.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
