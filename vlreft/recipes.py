"""`recipe(name)`: the published settings of ReFT methods as data, with what the papers report and what differs here.

Read in: ReFT (arXiv 2404.03592, sections 4, C and D, tables 1-13) and stanfordnlp/pyreft, examples/loreft; MRT (arXiv
2503.00723) and comeandcode/MRT; MoReS (arXiv 2412.12359) and bibisbar/LLaVA-Steering.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from vlreft.config import ReftConfig
from vlreft.published import Recipe, edit, training_arguments


def recipe(name: str) -> Recipe:
    """Return published settings by name, such as "mores". Raises ValueError for a name that is not there."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _named(model: str, tasks: tuple[str, ...], scores: tuple[float, ...]) -> dict[str, float]:
    return {f"{model}, {task}": score for task, score in zip(tasks, scores, strict=True)}


# What differs from pyreft --------------------------------------------------------------------------------------------

DIREFT = "The paper's DiReFT, h + V'(Wh + b) with a free V, is `nodireft` here and NodireftIntervention in pyreft."
FLOAT32 = "Edits are computed and trained in float32 whatever the base's dtype; pyreft has W and b in the base's."
ROTATION = "R comes from a Cholesky QR of a thin matrix; pyreft has torch's orthogonal parametrisation."
SHORT_PROMPTS = (
    "A prompt too short for all positions is shared out as the paper says, floor and ceiling of its half; pyreft takes "
    "at most the floor on either side."
)
LONG_PROMPTS = "A prompt longer than max_length is an error here; pyreft cuts it and goes on."
DROPOUT = "Dropout is on the edit; pyreft has it on the whole edited state."
TABLE_6 = (
    "Table 6 underlines DiReFT's best values, which was lost in the copy that we read; these are the values of "
    "pyreft's command for its search on GSM8K. That table has ranks from 8 on, the command has 4, untied; its trained "
    "numbers are as many as those of rank 8, tied, and the paper's 0.031 %."
)
COMMONSENSE_ANSWERS = (
    "pyreft's prompt ends before 'the correct answer is', which the model learns to say; rows that want the same have "
    "it in their answer."
)
SAMPLING = (
    "Decoding is the paper's (section D.1), with the other values from pyreft's task_config.py; pyreft's README "
    "decodes greedily."
)
TOTAL_LENGTH = (
    "max_length bounds prompt and answer together, as in pyreft's task_config.py; the paper says 2,048 new tokens."
)
PYREFT = "stanfordnlp/pyreft, examples/loreft"

# Reasoning and instructions: sections 4.2 to 4.4 of the ReFT paper ---------------------------------------------------

LLAMA_R8 = {"LLaMA-7B": 2_097_408, "LLaMA-13B": 3_277_120, "Llama-2-7B": 2_097_408, "Llama-3-8B": 2_097_408}
PERCENT = {"trained numbers, 7B": "0.031 %", "trained numbers, 13B": "0.025 %"}
COMMONSENSE = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA")
ARITHMETIC = ("AQuA", "GSM8K", "MAWPS", "SVAMP", "mean")


class Reasoning(NamedTuple):
    """What commonsense and arithmetic share: all but epochs and decoding; `means` in the order of LLAMA_R8."""

    shown: str
    config: ReftConfig
    optimiser: dict[str, Any]
    source: str
    differs: tuple[str, ...]
    means: tuple[float, ...]
    commonsense_7b: dict[str, float]
    arithmetic: dict[str, float]
    instruct: float


REASONING = {
    "loreft": Reasoning(
        shown="LoReFT",
        config=ReftConfig(edit("loreft", "f7+l7", 8, tied=True)),
        optimiser={"batch": (16, 2), "warmup": 0.1},
        source=f"ReFT paper, sections 4.2, 4.3 and D.1, tables 1, 2 and 5; {PYREFT}/README.md",
        differs=(FLOAT32, ROTATION, SHORT_PROMPTS, LONG_PROMPTS),
        means=(80.2, 83.3, 81.8, 86.6),
        commonsense_7b=_named("LLaMA-7B", COMMONSENSE, (69.3, 84.4, 80.3, 93.1, 84.2, 83.2, 68.2, 78.9)),
        arithmetic={
            **_named("LLaMA-7B", ARITHMETIC, (21.4, 26.0, 76.2, 46.8, 42.6)),
            **_named("LLaMA-13B", ARITHMETIC, (23.6, 38.1, 82.4, 54.2, 49.6)),
        },
        instruct=85.60,
    ),
    "direft": Reasoning(
        shown="DiReFT",
        config=ReftConfig(edit("nodireft", "f7+l7", 4, dropout=0.05)),
        optimiser={"batch": (8, 4), "warmup": 0.0, "weight_decay": 0.06},
        source=f"ReFT paper, sections 4.2, 4.3 and D.1, tables 1, 2 and 6; {PYREFT}/README.md, hyperparameter tuning",
        differs=(DIREFT, TABLE_6, FLOAT32, SHORT_PROMPTS, LONG_PROMPTS, DROPOUT),
        means=(79.0, 82.2, 80.9, 85.4),
        commonsense_7b={},
        arithmetic={
            **_named("LLaMA-7B", ARITHMETIC, (21.3, 24.1, 74.5, 42.7, 40.6)),
            **_named("LLaMA-13B", ARITHMETIC, (20.5, 35.8, 80.8, 54.8, 48.0)),
        },
        instruct=84.85,
    ),
}


def _commonsense(method: str) -> Recipe:
    row = REASONING[method]
    means = {f"{model}, mean of 8 tasks": mean for model, mean in zip(LLAMA_R8, row.means, strict=True)}
    return Recipe(
        name=f"{method}-commonsense",
        title=f"{row.shown} on COMMONSENSE170K, evaluated on eight tasks",
        config=row.config,
        arguments=training_arguments(lr=9e-4, epochs=6, **row.optimiser),
        collator={"max_length": 512, "overflow": "cut"},
        generation={"max_new_tokens": 32, "do_sample": False},
        seeds=(42, 43, 44),
        num_trained=LLAMA_R8,
        reported=means | row.commonsense_7b | PERCENT | {"trained numbers, Llama-3-8B": "0.026 %"},
        source=row.source,
        differs=(*row.differs, COMMONSENSE_ANSWERS),
    )


def _arithmetic(method: str) -> Recipe:
    row = REASONING[method]
    return Recipe(
        name=f"{method}-arithmetic",
        title=f"{row.shown} on MATH10K, evaluated on four tasks",
        config=row.config,
        arguments=training_arguments(lr=9e-4, epochs=12, **row.optimiser),
        collator={"max_length": 512, "overflow": "cut"},
        generation={
            **{"max_new_tokens": 512, "do_sample": True, "temperature": 0.3, "top_p": 0.75, "top_k": 40},
            **{"num_beams": 4, "early_stopping": True},
        },
        seeds=(42, 43, 44),
        num_trained={model: LLAMA_R8[model] for model in ("LLaMA-7B", "LLaMA-13B")},
        reported=row.arithmetic | PERCENT,
        source=row.source,
        differs=(*row.differs, SAMPLING),
    )


def _instruct(method: str) -> Recipe:
    row, is_loreft = REASONING[method], method == "loreft"
    return Recipe(
        name=f"{method}-instruct",
        title=f"{row.shown} on Ultrafeedback, evaluated by Alpaca-Eval v1.0",
        config=ReftConfig(edit("loreft" if is_loreft else "nodireft", "f5+l5", 4, layers=[3, 9, 18, 24])),
        arguments=training_arguments(lr=9e-4, epochs=9, batch=(4, 32), warmup=0.0),
        collator={"max_length": 768, "overflow": "cut"},
        generation={"max_length": 2048, "do_sample": False, "no_repeat_ngram_size": 5, "repetition_penalty": 1.1},
        seeds=(42, 43),
        num_trained={"Llama-2-7B": 262_176},
        reported={
            "Llama-2-7B, win rate against text-davinci-003, judged by GPT-4": row.instruct,
            "trained numbers, 7B": "0.0039 %",
        },
        source=f"ReFT paper, sections 4.4 and D.1, tables 3 and 7 (one for both methods); {PYREFT}/README.md",
        differs=(ROTATION if is_loreft else DIREFT, FLOAT32, SHORT_PROMPTS, LONG_PROMPTS, TOTAL_LENGTH),
    )


# GLUE: section 4.5 of the ReFT paper, tables 9 to 13 -----------------------------------------------------------------

GLUE_TASKS = {
    **{"mnli": "MNLI", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE"},
    "stsb": "STS-B",
}
GLUE_METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}  # accuracy elsewhere; MNLI's is the matched one
ROBERTA = {"base": (18_444, "0.015 %"), "large": (49_176, "0.014 %")}
GLUE_DIFFERS = (
    FLOAT32,
    "The best epoch is chosen on one part of GLUE's validation set (1,000 rows of MNLI, QNLI and QQP, half of the "
    "others, drawn by the seed), the score is of the other part; the caller draws them and gives compute_metrics.",
    "The classifier is trained whole, in a float32 copy; its numbers are not among the trained ones, as in the paper.",
    "All of the first tokens are edited; pyreft edits at most half of a sequence.",
    "The paper replaced some seeds of RTE and CoLA, and took the best of three runs for QQP on RoBERTa-large.",
)


class Glue(NamedTuple):
    """One table of the paper, by columns in the order of GLUE_TASKS: learning rates in 1e-4, scores with their SD."""

    table: int
    first: tuple[int, ...]
    dropout: tuple[float, ...]
    rate: tuple[int, ...]
    warmup: tuple[float, ...]
    epochs: tuple[int, ...]
    scores: tuple[str, ...]
    weight_decay: tuple[float, ...] = (0.0,) * 8
    batch: tuple[int, ...] = (32,) * 8


GLUE = {
    ("loreft", "base"): Glue(
        table=9,
        first=(1, 3, 3, 3, 11, 11, 3, 3),
        dropout=(0.05, 0.1, 0.05, 0.2, 0.05, 0.05, 0.05, 0.05),
        rate=(6, 6, 3, 4, 9, 6, 9, 6),
        warmup=(0.06, 0.1, 0.0, 0.005, 0.1, 0.0, 0.0, 0.03),
        epochs=(40, 40, 40, 60, 20, 40, 60, 60),
        scores=("83.1 ± 0.26", "93.4 ± 0.64", "89.2 ± 2.62", "60.4 ± 2.60", "91.2 ± 0.25", "87.4 ± 0.23", "79.0 ± 2.76",
                "90.0 ± 0.29"),
    ),
    ("loreft", "large"): Glue(
        table=10,
        first=(1, 3, 3, 3, 11, 11, 3, 3),
        dropout=(0.05, 0.05, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05),
        rate=(6, 6, 3, 1, 9, 6, 6, 8),
        warmup=(0.0, 0.1, 0.06, 0.2, 0.1, 0.06, 0.0, 0.2),
        epochs=(20, 20, 30, 30, 20, 20, 30, 30),
        scores=("89.2 ± 0.27", "96.2 ± 0.72", "90.1 ± 1.17", "68.0 ± 1.44", "94.1 ± 0.35", "88.5 ± 0.45", "87.5 ± 1.49",
                "91.6 ± 0.43"),
    ),
    ("direft", "base"): Glue(
        table=11,
        first=(1, 3, 5, 1, 11, 11, 1, 3),
        dropout=(0.05, 0.1, 0.05, 0.0, 0.05, 0.05, 0.0, 0.05),
        rate=(6, 6, 3, 6, 9, 6, 9, 6),
        warmup=(0.06, 0.1, 0.1, 0.0, 0.1, 0.0, 0.0, 0.03),
        epochs=(40, 40, 40, 60, 20, 40, 60, 60),
        scores=("82.5 ± 0.22", "92.6 ± 0.76", "88.3 ± 1.23", "58.6 ± 1.99", "91.3 ± 0.19", "86.4 ± 0.27", "76.4 ± 1.48",
                "89.3 ± 0.56"),
        weight_decay=(0.0, 0.0, 0.0, 0.04, 0.0, 0.0, 0.04, 0.0),
        batch=(32, 32, 32, 32, 32, 32, 8, 32),
    ),
    ("direft", "large"): Glue(
        table=12,
        first=(1, 3, 1, 1, 11, 7, 3, 3),
        dropout=(0.05, 0.05, 0.1, 0.15, 0.05, 0.05, 0.05, 0.05),
        rate=(6, 6, 9, 9, 9, 9, 6, 8),
        warmup=(0.0, 0.1, 0.0, 0.0, 0.1, 0.1, 0.0, 0.1),
        epochs=(20, 20, 50, 60, 20, 20, 30, 30),
        scores=("88.7 ± 0.13", "95.4 ± 0.60", "88.5 ± 2.16", "66.7 ± 1.99", "93.9 ± 0.39", "88.1 ± 0.47", "86.9 ± 1.56",
                "91.2 ± 0.29"),
        weight_decay=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.006, 0.0),
    ),
}  # fmt: skip


def _glue(method: str, size: str, task: str) -> Recipe:
    """Make the recipe of one column of a table; those of RoBERTa-base have the plain name."""
    rows, place, model = GLUE[method, size], list(GLUE_TASKS).index(task), f"RoBERTa-{size}"
    metric, dropout = GLUE_METRICS.get(task, "accuracy"), rows.dropout[place]
    ours, shown, note = ("loreft", "LoReFT", ROTATION) if method == "loreft" else ("nodireft", "DiReFT", DIREFT)
    count, percent = ROBERTA[size]
    arguments = training_arguments(
        lr=float(f"{rows.rate[place]}e-4"),  # the literal; a product would be off by one bit
        epochs=rows.epochs[place],
        batch=(rows.batch[place], 1),
        warmup=rows.warmup[place],
        weight_decay=rows.weight_decay[place],
    )
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True, "save_total_limit": 1}
    return Recipe(
        name=f"{method}-glue-{task}" + ("" if size == "base" else f"-{size}"),
        title=f"{shown} on GLUE's {GLUE_TASKS[task]}, for {model}",
        config=ReftConfig(edit(ours, f"f{rows.first[place]}", 1, dropout=dropout), modules_to_save=["classifier"]),
        arguments=arguments | {"eval_strategy": "epoch", "save_strategy": "epoch"} | best,
        tokenizer={"truncation": True, "max_length": 256},
        seeds=(42, 43, 44, 45, 46),
        num_trained={model: count},
        reported={f"{GLUE_TASKS[task]}, {metric}, SD": rows.scores[place], "trained numbers": percent},
        source=f"ReFT paper, sections 4.5, C.3 and D.1, tables {rows.table} and 13; {PYREFT}/README.md (max_length)",
        differs=(note, *((DROPOUT,) if dropout else ()), *GLUE_DIFFERS),
    )


# Vision and language -------------------------------------------------------------------------------------------------


def _mrt() -> Recipe:
    return Recipe(
        name="mrt",
        title="Multimodal Representation Tuning of a LLaVA with CLIP-L/14, on Vision-Flan",
        config=ReftConfig(
            [
                # Blocks counted from 0, of 24: the last is not read, the first is left out by the authors.
                edit("loreft", "prompt:all", 6, site="vision", layers=range(1, 23)),
                edit("loreft", "image:all", 6, site="connector"),
                edit("loreft", "question:f6+l6", 4),
            ]
        ),
        arguments=training_arguments(lr=6e-4, epochs=3, batch=(2, 64), warmup=0.03),
        collator={"max_length": 1024, "overflow": "cut"},
        generation={"max_new_tokens": 8, "do_sample": True, "temperature": 0.4},
        num_trained={"LLaVA-7B/224": 2_417_034},
        reported={"LLaVA, Vicuna-7B-v1.3, MME": 1580.40, "trained numbers": "0.03 %"},
        source=(
            "comeandcode/MRT: scripts/ds_tune.sh and mme.sh, MRT/train/train_MRT.py, modeling_clipMRT.py, "
            "modeling_llamaMRT.py; MRT paper, abstract (the 1580.40 and the 0.03 %)"
        ),
        differs=(
            "The vision blocks are those of a tower of 24; attach refuses blocks that a tower does not have or whose "
            "output is not read, so give another tower its own.",
            "The authors' code hard-codes where the text begins (38 system tokens, 255 more for the image), two tokens "
            "behind the image; here the question begins right behind it, wherever it is.",
            "Their last edited tokens are, in training, at the end of the answer, and in evaluation just before the "
            "prompt's last token; here they are the last of the prompt in both.",
            "Their code edits six tokens on either side, whatever the command says; summaries of the paper name four.",
            "Their batch is 2 rows, 32 steps, 2 GPUs; here 2 rows and 64 steps on one.",
            "Generation is that of their MME script, which samples; their default is greedy, with 128 new tokens.",
            "Their base is LLaVA after its first stage (Vicuna-7B-v1.3, a linear connector), not an instructed one.",
            "max_length counts the image's tokens; their tokenizer cuts without them. A prompt that is longer is an "
            "error here.",
            "Edits are computed and trained in float32; theirs are kept in bfloat16.",
        ),
    )


CONNECTOR = (
    "The authors also train the connector whole, and do not count it; the recipe 'mores-connector' does so for models "
    "whose connector is called multi_modal_projector."
)
UNIFORM = (
    "The tokens are the middles of nine equal stretches; theirs begin with the first token and are a whole number of "
    "tokens apart, so that the last ones, seven at most, are out of reach."
)
MIXED = {
    **_named(
        "Phi-2 (3B)",
        ("VQAv2", "GQA", "TextVQA", "ScienceQA, images", "POPE", "MM-Vet", "MMMU", "mean"),
        (74.1, 52.1, 48.5, 70.0, 87.6, 30.3, 35.3, 56.9),
    ),
    "Phi-2 (3B), trained numbers": "0.164 M",
}
SINGLE = ("ScienceQA, images", "VizWiz", "IconQA-txt", "IconQA-blank")
SINGLE_TASKS = {
    **_named("7B", SINGLE, (83.6, 54.2, 64.2, 70.2)),
    **_named("13B", SINGLE, (89.5, 54.3, 74.9, 71.5)),
    **{"7B, trained numbers": "0.262 M", "13B, trained numbers": "0.410 M"},
}
MORES_DIFFERS = (
    "The bias is counted: one number for each layer and rank more than in the paper's counts.",
    "The configuration in the authors' repository has rank 4, their command's name 2; rank 1 is the paper's table.",
    "Rows without a picture are not edited; the authors' code edits one token of their prompt.",
    "Where the tokenizer puts a token in front of every text (LLaMA's does), the authors' positions are one token too "
    "early, by our reading of their tinyllava/data/template/base.py.",
    "Of several pictures in a row their code edits the first; here the image tokens of all of them are one segment.",
    "Dropout is on the edit; the authors have it on the whole edited state.",
    "Their batch is 8 rows, 4 steps, 4 GPUs; here 8 rows and 16 steps on one.",
    "Their scripts set no length, 2,048 is their model configuration's default; a longer prompt is an error here.",
    "Their settings of DeepSpeed clip no gradient, by our reading; here the norm is clipped at 1.",
    "128 new tokens is their script for VQA; that for ScienceQA has 1,024.",
    "Edits are computed and trained in float32; their W and b are in float16.",
)


def _mores(
    name: str,
    what: str,
    reported: Mapping[str, float | str],
    *,
    positions: str = "image:f4+l5",
    epochs: int = 1,
    modules: tuple[str, ...] = (),
    differs: tuple[str, ...] = (CONNECTOR,),
) -> Recipe:
    return Recipe(
        name=name,
        title=f"MoReS, a few visual tokens in every block of the language model, {what}",
        config=ReftConfig(edit("loreft", positions, 1, tied=True, dropout=0.05), modules_to_save=modules),
        arguments=training_arguments(lr=2e-4, epochs=epochs, batch=(8, 16), warmup=0.03, schedule="cosine"),
        collator={"max_length": 2048, "overflow": "cut"},
        generation={"max_new_tokens": 128, "do_sample": False},
        dtype="float16",
        num_trained={"Phi-2 (3B)": 163_840 + 32, "LLaVA-1.5-7B": 262_144 + 32, "LLaVA-1.5-13B": 409_600 + 40},
        reported=reported,
        source=(
            "MoReS paper, the tables of results; bibisbar/LLaVA-Steering: scripts/exp, scripts/train/finetune_phi2.sh, "
            "scripts/eval, tinyllava/data/template, tinyllava/model/intervention_models.py"
        ),
        differs=(*differs, *MORES_DIFFERS),
    )


def _everything() -> Iterator[Recipe]:
    for make in (_commonsense, _arithmetic, _instruct):
        yield from (make(method) for method in REASONING)
    for method, size in GLUE:
        yield from (_glue(method, size, task) for task in GLUE_TASKS)
    yield _mrt()
    yield _mores("mores", "LLaVA-665k", MIXED)
    yield _mores("mores-task", "one task at a time", SINGLE_TASKS, epochs=10)
    yield _mores(
        "mores-connector", "LLaVA-665k, with the connector", MIXED, modules=("multi_modal_projector",), differs=()
    )
    notes = (CONNECTOR, UNIFORM)
    yield _mores("mores-uniform", "LLaVA-665k, spread evenly", {}, positions="image:uniform9", differs=notes)


RECIPES: Mapping[str, Recipe] = MappingProxyType({made.name: made for made in _everything()})
