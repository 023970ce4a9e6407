"""`Example`: a test row with the answers before and after, drawn by group, and shown as a card of a report."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tasks.page import data_uri, escaped, folded, thumbnail
from vlreft.data.samples import open_image

MAX_EXAMPLES = 24
MAX_REFERENCES = 12  # different ones of one example
RIGHT = 0.5  # the score from which an answer counts as right, for the groups
GROUPS = {
    (False, True): "Fixed by the adapter",
    (True, False): "Broken by the adapter",
    (False, False): "Still wrong",
    (True, True): "Right both times",
}


@dataclass(frozen=True)
class Example:
    """One test row with the base's answer and the adapter's, and how right each is, in [0, 1].

    picture: a PIL image, or the bytes of a file.
    """

    question: str
    references: tuple[str, ...]
    before: str
    after: str
    score_before: float
    score_after: float
    picture: Image.Image | bytes | None = None

    def __post_init__(self) -> None:
        for score in (self.score_before, self.score_after):
            if not 0 <= score <= 1:
                raise ValueError(f"an example's score is {score}; it must be in [0, 1]: a share of right.")

    @property
    def group(self) -> str:
        """Which of `GROUPS` it is in."""
        return _group(self.score_before, self.score_after)


def count_groups(scores_before: Sequence[float], scores_after: Sequence[float]) -> dict[str, int]:
    """Count the rows that the adapter fixed, broke, and left wrong or right, for `Report.num_by_group`."""
    counts = Counter(_group(*scores) for scores in zip(scores_before, scores_after, strict=True))
    return {name: counts[name] for name in GROUPS.values()}


def examples_of(
    rows: Any,
    before: Sequence[Any],
    after: Sequence[Any],
    scores_before: Sequence[float],
    scores_after: Sequence[float],
    per_group: int = 6,
    seed: int = 0,
) -> list[Example]:
    """Draw up to `per_group` examples of each group by the seed; only the drawn rows are read.

    rows: a data set or list with a task's columns, pictures as a path, picture or what undecoded data sets hold.
    scores: each row's, in [0, 1], as in `Score.by_row`. Raises: ValueError for lengths that differ, broken pictures.
    """
    lengths = [len(values) for values in (rows, before, after, scores_before, scores_after)]
    if len(set(lengths)) > 1:
        raise ValueError(f"rows, answers and scores, before and after, have the lengths {lengths}; make them equal.")
    places: dict[str, list[int]] = {name: [] for name in GROUPS.values()}
    for place, scores in enumerate(zip(scores_before, scores_after, strict=True)):
        places[_group(*scores)].append(place)
    drawn = []
    for name, candidates in places.items():  # each group by itself: one more row in another changes nothing here
        chosen = random.Random(f"{seed} {name}").sample(candidates, min(per_group, len(candidates)))
        drawn += sorted(chosen)
    return [
        _example(rows[place], place, before[place], after[place], scores_before[place], scores_after[place])
        for place in drawn
    ]


def _example(
    row: Mapping[str, Any], place: int, before: Any, after: Any, score_before: float, score_after: float
) -> Example:
    picture = row.get("image")
    name = f"row {place}" if row.get("id") is None else f"row {place} (id {row['id']})"
    references = row.get("references") or ([row["answer"]] if row.get("answer") is not None else [])
    return Example(
        question="\n".join(str(row[key]) for key in ("question", "text", "text_pair") if row.get(key)),
        references=tuple(map(str, references)),
        before=_answer(before),
        after=_answer(after),
        score_before=float(score_before),
        score_after=float(score_after),
        picture=None if picture is None else thumbnail(open_image(picture, name)),
    )


def _answer(answer: Any) -> str:
    """An answer in words; of a ranking its first ten."""
    return ", ".join(map(str, answer[:10])) if isinstance(answer, list | tuple) else str(answer)


def _group(before: float, after: float) -> str:
    return GROUPS[before >= RIGHT, after >= RIGHT]


def cards(examples: Sequence[Example], num_by_group: Mapping[str, int]) -> str:
    """Return the examples by group as HTML, under how many rows there are of each group."""
    if len(examples) > MAX_EXAMPLES:
        raise ValueError(f"{len(examples)} examples; a report shows {MAX_EXAMPLES} at most: take fewer.")
    parts = []
    if num_by_group:
        counts = [f"{name.lower()} {num_by_group.get(name, 0):,}" for name in GROUPS.values()]
        parts.append(f"<p>Of {sum(num_by_group.values()):,} rows: {', '.join(counts)}.</p>")
    if parts or examples:
        parts.append(f'<p class="soft">An answer is right where its score is {RIGHT:g} or more.</p>')
    for name in GROUPS.values():
        group = "\n".join(_card(example) for example in examples if example.group == name)
        if group:
            parts.append(f'<h3>{escaped(name)}</h3>\n<div class="cards">{group}</div>')
    return "\n".join(parts)


def _card(example: Example) -> str:
    picture = example.picture
    if isinstance(picture, bytes):
        picture = open_image({"path": None, "bytes": picture}, "an example of the report")
    image = "" if picture is None else f'<img src="{data_uri(picture)}" alt="the picture of the question">'
    counts = Counter(example.references)
    known = " · ".join(
        f"{text} \N{MULTIPLICATION SIGN}{count}" if count > 1 else text
        for text, count in counts.most_common(MAX_REFERENCES)
    )
    left_out = len(counts) - MAX_REFERENCES
    known += f" · and {left_out} more" if left_out > 0 else ""
    rows = (
        ("reference", folded(known), ""),
        ("before", folded(example.before), _share(example.score_before)),
        ("after", folded(example.after), _share(example.score_after)),
    )
    entries = "".join(
        f'<dt>{name}</dt><dd>{share}<div class="text" dir="auto">{html}</div></dd>' for name, html, share in rows
    )
    ask = f'<div class="text ask" dir="auto">{folded(example.question)}</div>' if example.question else ""
    return f'<article class="card">{image}{ask}<dl>{entries}</dl></article>'


def _share(score: float) -> str:
    word, mark = ("right", "good") if score >= RIGHT else ("wrong", "bad")
    return f'<span class="{mark}">{word} ({score:.2g})</span>'
