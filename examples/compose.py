"""Teach two skills in two groups of one subspace, each on its own task, and switch them on alone and together.

    python examples/compose.py                      # the demo: about four minutes on one core
    python examples/compose.py --num-seeds 3        # mean and spread over three seeds

One LoReFT has its rank split in the groups "code" and "refuse", which edit orthogonal subspaces. "code" learns made-up
words for colours, from questions for them among usual ones; "refuse" to answer "sorry" if anything red is in the
picture, from usual questions alone. Beside it, on as many examples: two adapters of half the rank, put on one after the
other, and one of the whole rank that was trained on both tasks at once.

Four kinds of questions are asked: usual ones and those for a colour in code, of pictures with something red and
without. Wanted is what both skills together would say. The last kind, a colour in code of a picture to be refused, was
taught to nobody as such: "code" alone says the word there, as it was taught, which is not what is wanted.

"both groups, routed": a router says for each question, from the frozen base's states, which groups act on it, as in
CS-ReFT (arXiv 2503.10617). Here its gates are hard, and each is learned from its own task alone: a question for code or
not, an answer of "sorry" or not.
"""

import json
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import command_line, exact_match, load_base, recipe
from datasets import concatenate_datasets
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vlreft
from vlreft.causes.subspaces import Angles, angles_between, principal_angles
from vlreft.data.datasets import load_vqa

TASKS = ("code", "refuse")
SETS = {"usual": "usual", "usual, red": "usual, red:\nsorry", "code": "code", "code, red": "code, red:\nsorry"}
COLUMNS = SETS | {"mean": "mean of the\nfour"}
Scores = dict[str, dict[str, float]]  # by what is switched on, then by what is asked
Degrees = dict[str, dict[str, list[float]]]  # by what it is between, then by place


def main() -> None:
    """Train for each seed, print the table, write `results.json` and `compose.png`."""
    parser = command_line(__doc__, "demo-llava", "demo-vqa", "runs/compose", lr=1e-2, epochs=3)
    parser.set_defaults(rank=8, max_new_tokens=6)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--num-test", type=int, default=150, help="questions of each kind")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    args = parser.parse_args()

    model = load_base(AutoModelForImageTextToText, args.model)
    collator = vlreft.Collator(AutoProcessor.from_pretrained(args.model))
    sets = load_sets(args)
    runs, angles = [], {}
    cache = vlreft.FeatureCache("1GB")  # no edit sits in the tower: it runs once for a picture
    with cache.on(model):
        for seed in range(args.seed, args.seed + args.num_seeds):
            scores, angles = compare(model, collator, sets, Namespace(**{**vars(args), "seed": seed}))
            runs.append(scores)
    report(runs, angles, args)


def load_sets(args: Namespace) -> dict[str, Any]:
    """Return the training set of each task, and the questions of each kind with the answers of both skills together."""
    folder = Path(args.data)
    code, refuse = (load_vqa(folder / task, "train") for task in TASKS)
    # Without usual questions among its own, "code" would learn to answer in code whatever it is asked.
    usual = [place for place, text in enumerate(refuse["answer"]) if text != "sorry"][:300]
    both = concatenate_datasets([code.select(range(700)), refuse.select(usual)])
    sets: dict[str, Any] = {
        "train code": both,
        "train refuse": refuse,
        "gate code": (both, [place < 700 for place in range(len(both))]),
        "gate refuse": (refuse, [text == "sorry" for text in refuse["answer"]]),
    }
    code, refuse = (load_vqa(folder / task, args.split) for task in TASKS)
    is_red = {image: text == "sorry" for image, text in zip(refuse["image_id"], refuse["answer"], strict=True)}
    for kind, rows in (("usual", refuse), ("code", code)):
        for red in (False, True):
            places = [place for place, image in enumerate(rows["image_id"]) if is_red.get(image) == red]
            chosen = [rows[place] for place in places[: args.num_test]]
            sets[f"{kind}, red" if red else kind] = [{**row, "answer": "sorry"} for row in chosen] if red else chosen
    return sets


def interventions(rank: int, groups: Sequence[str] = ()) -> vlreft.ReftConfig:
    """Return LoReFT on image tokens, where "refuse" has to look, and on the last tokens of the prompt."""
    return vlreft.ReftConfig(
        vlreft.Intervention("loreft", positions=positions, rank=rank, groups=groups)
        for positions in ("image:all", "prompt:l4")
    )


def compare(model: Any, collator: vlreft.Collator, sets: Mapping[str, Any], args: Namespace) -> tuple[Scores, Degrees]:
    """Train all of it for one seed; return the scores, and the angles between what was learned."""
    scores: Scores = {}
    folder = Path(args.output, f"seed-{args.seed}")

    def train(data: Any) -> None:
        vlreft.ReftTrainer(model=model, args=recipe(args), train_dataset=data, data_collator=collator).train()
        model.eval()

    def attach(config: vlreft.ReftConfig, number: int = 0) -> vlreft.Reft:
        set_seed(args.seed + 1000 * number)  # no two start from one subspace
        return vlreft.attach(model, config)

    def score(name: str) -> None:
        note(name, {kind: answer(model, collator, sets[kind], args.max_new_tokens) for kind in SETS})

    def note(name: str, answers: Mapping[str, list[str]]) -> None:
        scores[name] = {kind: exact_match(answers[kind], sets[kind])["accuracy"] for kind in SETS}
        scores[name]["mean"] = statistics.mean(scores[name].values())
        print(name, {kind: round(value, 3) for kind, value in scores[name].items()}, flush=True)

    # 1. One adapter in two groups, each trained on its own task alone.
    grouped = attach(interventions(args.rank, TASKS))
    with grouped.disabled():
        score("nothing")
    for task in TASKS:
        with grouped.groups(task):
            train(sets[f"train {task}"])
    for task in TASKS:
        with grouped.groups(task):
            score(f"group {task}")
    score("both groups")
    gates = {task: Gate.learn(model, grouped, collator, *sets[f"gate {task}"]) for task in TASKS}
    answers = {kind: answer(model, collator, sets[kind], args.max_new_tokens, Router(grouped, gates)) for kind in SETS}
    note("both groups, routed", answers)
    angles = {"two groups": by_place(principal_angles((grouped, TASKS[0]), (grouped, TASKS[1])))}
    grouped.save_pretrained(folder / "grouped")
    grouped.detach()

    # 2. Two adapters of half the rank, trained apart, then put on one after the other.
    for number, task in enumerate(TASKS):
        alone = attach(interventions(args.rank // 2), number)
        train(sets[f"train {task}"])
        score(f"adapter {task}")
        alone.save_pretrained(folder / task)
        alone.detach()
    stacked = [vlreft.load(model, folder / task, task) for task in TASKS]
    score("both adapters")
    angles["two adapters"] = by_place(principal_angles(*stacked))
    shape = next(stacked[0].parameters()).shape  # rank and width
    draws = [angles_between(torch.randn(shape), torch.randn(shape)) for _ in range(100)]
    angles["two random subspaces"] = {"anywhere, on average": torch.stack(draws).mean(0).tolist()}
    for reft in stacked:
        reft.detach()

    # 3. One adapter of the whole rank, trained on both tasks at once.
    joint = attach(interventions(args.rank))
    train(concatenate_datasets([sets[f"train {task}"] for task in TASKS]))
    score("one adapter, joint")
    joint.detach()
    return scores, angles


def by_place(angles: Sequence[Angles]) -> dict[str, list[float]]:
    """Return the degrees alone, under the name of their place."""
    return {f"layer {angle.layer}, {angle.positions}": angle.degrees_K.tolist() for angle in angles}


def batches(model: Any, collator: vlreft.Collator, rows: Any) -> Iterator[dict[str, Tensor]]:
    """Make prompts of the rows, a hundred at a time."""
    for start in range(0, len(rows), 100):
        prompts = collator.prompts([rows[place] for place in range(start, min(start + 100, len(rows)))])
        yield {name: tensor.to(model.device) for name, tensor in prompts.items()}


def answer(
    model: Any, collator: vlreft.Collator, rows: Any, max_new_tokens: int, router: "Router | None" = None
) -> list[str]:
    """Answer each row, greedily, with all that is on the model; with a router, by the groups that it opens for it."""
    answers: list[str] = []
    for batch in batches(model, collator, rows):
        with nullcontext() if router is None else router.routed(batch):
            ids_BS = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers += collator.decode(ids_BS, batch["input_ids"].shape[1])
    return answers


def features(grouped: vlreft.Reft, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the base has at the places that are edited, a mean over the tokens of each."""
    means = [read.states_BKD.sum(1) / read.valid_BK.sum(1, keepdim=True) for read in grouped.read(batch)]
    return torch.cat(means, 1)


@dataclass(frozen=True, eq=False)
class Gate:
    """A logistic regression on the base's states that opens or closes a group for a row."""

    mean_F: Tensor
    spread_F: Tensor
    linear: torch.nn.Linear

    @classmethod
    def learn(
        cls, model: Any, grouped: vlreft.Reft, collator: vlreft.Collator, rows: Any, is_open: Sequence[bool]
    ) -> "Gate":
        """Learn it from rows and what it should say to each."""
        states_NF = torch.cat([features(grouped, batch) for batch in batches(model, collator, rows)])
        wanted_N = torch.tensor(is_open, dtype=torch.float32, device=states_NF.device)
        gate = cls(states_NF.mean(0), states_NF.std(0) + 1e-6, torch.nn.Linear(states_NF.shape[1], 1))
        gate.linear.to(states_NF.device)
        optimizer = torch.optim.AdamW(gate.linear.parameters(), lr=1e-3, weight_decay=1.0)
        for _ in range(500):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(gate.logits(states_NF), wanted_N).backward()
            optimizer.step()
        return gate

    def logits(self, states_BF: Tensor) -> Tensor:
        """Return the log-odds that it is open, (B,)."""
        return self.linear((states_BF - self.mean_F) / self.spread_F)[:, 0]

    @torch.no_grad()
    def open(self, states_BF: Tensor) -> Tensor:
        """Return for each row whether it is open, as a strength of 0 or 1, (B,)."""
        return (self.logits(states_BF) > 0).float()


@dataclass(frozen=True, eq=False)
class Router:
    """A gate for each group of an adapter."""

    grouped: vlreft.Reft
    gates: Mapping[str, Gate]

    def routed(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the groups act, inside, on the rows that their gates open them for."""
        states_BF = features(self.grouped, batch)
        return self.grouped.groups({group: gate.open(states_BF) for group, gate in self.gates.items()})


def report(runs: Sequence[Scores], angles: Degrees, args: Namespace) -> None:
    """Print the table and the angles; write `results.json` and the picture."""
    output = Path(args.output)
    names = list(runs[0])
    mean = {name: {kind: statistics.mean(run[name][kind] for run in runs) for kind in COLUMNS} for name in names}
    print(f"\n  {'switched on':<20}" + "".join(f"{title.replace(chr(10), ' '):>22}" for title in COLUMNS.values()))
    for name in names:
        cells = [f"{mean[name][kind]:.3f}" for kind in COLUMNS]
        if len(runs) > 1:
            spread = [statistics.stdev(run[name][kind] for run in runs) for kind in COLUMNS]
            cells = [f"{cell} ± {sd:.3f}" for cell, sd in zip(cells, spread, strict=True)]
        print(f"  {name:<20}" + "".join(f"{cell:>22}" for cell in cells))
    print("\nprincipal angles between what 'code' and 'refuse' edit, in degrees:")
    for name, places in angles.items():
        for place, degrees in places.items():
            print(f"  {name:<22}{place:<22}" + "".join(f"{angle:6.1f}" for angle in degrees))
    results = {
        "accuracy": mean,
        "runs": list(runs),
        "angles": angles,
        "seeds": list(range(args.seed, args.seed + args.num_seeds)),
        "num_test": args.num_test,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(output / "compose.png", mean, angles)
    print(f"\nwrote {output}/results.json, {output}/compose.png and the adapters in {output}/seed-*")


def draw(path: Path, mean: Scores, angles: Degrees) -> None:
    """Draw the accuracies as a matrix, and the angles of each place as a line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), gridspec_kw={"width_ratios": (1.3, 1)})
    cells = [[of_name[kind] for kind in COLUMNS] for of_name in mean.values()]
    left.imshow(cells, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    left.set_xticks(range(len(COLUMNS)), list(COLUMNS.values()))
    left.set_yticks(range(len(mean)), list(mean))
    left.set_title("exact match")
    for row, of_row in enumerate(cells):
        for column, value in enumerate(of_row):
            left.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.7 else "black")
    for (name, places), color in zip(angles.items(), ("tab:green", "tab:purple", "black"), strict=True):
        for number, degrees in enumerate(places.values()):
            label = None if number else name
            right.plot(range(1, len(degrees) + 1), degrees, "o-", color=color, alpha=0.6, label=label)
    right.set(xlabel="principal angle", ylabel="degrees", ylim=(0, 95), title="between 'code' and 'refuse', each place")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
