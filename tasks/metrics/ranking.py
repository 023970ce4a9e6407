"""`recall_at_k` of retrieval, `rankings` that it takes, and `accuracy` of classification."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.metrics.score import Row, Score, check_lengths, mean_score

KS = (1, 5, 10)
MOST_SCORES = 2**22  # computed at a time: 16 MiB of float32, and as much again for the sort


def recall_at_k(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
    """Return the mean of recall at 1, 5 and 10, of pictures by text and of texts by picture; the six are its parts.

    Recall@k is the share of queries with at least one match among the first k, not the share of matches found
    (LAION-AI/CLIP_benchmark, clip_benchmark/metrics/zeroshot_retrieval.py). Where there are fewer than k candidates,
    all are looked at.

    answers: as `rankings` makes them; "texts" of a picture's first row counts as the picture's.
    rows: a caption each, with `id` and `image_id`.
    Raises: ValueError for a caption id that comes twice; for a ranking too short, with an id twice, or a foreign one.
    """
    check_lengths(answers, rows)
    image_of = {row["id"]: row["image_id"] for row in rows}
    if len(image_of) != len(rows):
        raise ValueError(f"{len(rows)} rows have {len(image_of)} different ids; each caption needs its own.")
    images = set(image_of.values())
    ranks_of_text, ranks_of_image = [], {}
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        found = _checked(answer, "images", images, number)
        ranks_of_text.append(_rank(found, row["image_id"]))
        if row["image_id"] not in ranks_of_image:
            owners = [image_of[text] for text in _checked(answer, "texts", image_of, number)]
            ranks_of_image[row["image_id"]] = _rank(owners, row["image_id"])
    parts = {}
    for name, ranks in (("text_to_image", ranks_of_text), ("image_to_text", list(ranks_of_image.values()))):
        parts |= {f"{name}_r{k}": sum(rank < k for rank in ranks) / len(ranks) for k in KS}
    over = (
        f"{len(rows)} captions, {len(images)} pictures; mean of six recalls (rsum/6), at least one match in the top k"
    )
    return Score("recall", sum(parts.values()) / len(parts), over, None, parts)


def _checked(answer: Any, key: str, known: Any, number: int) -> Sequence[Any]:
    """Return one ranking of an answer, up to the highest k."""
    if not isinstance(answer, dict) or key not in answer:
        raise ValueError(f"the answer to row {number} has no ranking {key!r}; make the answers with `rankings`.")
    found, wanted = answer[key][: KS[-1]], min(KS[-1], len(known))
    if len(found) < wanted or len(set(found)) < len(found):
        raise ValueError(f"row {number}: {key!r} must have {wanted} different ids, best first; got {list(found)}.")
    if foreign := [name for name in found if name not in known]:
        raise ValueError(f"row {number}: {key!r} ranks {foreign[0]!r}, which is none of the rows'.")
    return found


def _rank(found: Sequence[Any], wanted: Any) -> int:
    return found.index(wanted) if wanted in found else KS[-1]


def rankings(
    image_IE: Tensor,
    text_TE: Tensor,
    image_ids: Sequence[Any],
    text_ids: Sequence[Any],
    text_image_ids: Sequence[Any],
    k: int = KS[-1],
) -> list[dict[str, list[Any]]]:
    """Rank by inner product; return for each text the first k pictures, and the first k texts of its own picture.

    image_IE, text_TE: embeddings, of length 1 for cosines, on one device. Scores that tie rank in the order of the
    ids given. Memory is that of `MOST_SCORES` scores. text_image_ids: the picture of each text.
    Raises: ValueError for numbers of rows that do not fit, embeddings that are not finite, and texts of no picture.
    """
    sizes = (len(image_IE), len(text_TE), len(text_TE))
    if sizes != (len(image_ids), len(text_ids), len(text_image_ids)):
        given = (len(image_ids), len(text_ids), len(text_image_ids))
        raise ValueError(f"{sizes[:2]} embeddings of pictures and texts, but {given} ids; there must be one to each.")
    if not (image_IE.isfinite().all() and text_TE.isfinite().all()):
        raise ValueError("embeddings have to be finite; some here are NaN or infinite.")
    place = {name: number for number, name in enumerate(image_ids)}
    if homeless := [name for name in text_image_ids if name not in place]:
        raise ValueError(f"a text belongs to {homeless[0]!r}, which is not in `image_ids`.")
    images = _first(text_TE, image_IE, k)
    texts = _first(image_IE, text_TE, k)
    return [
        {"images": [image_ids[i] for i in found], "texts": [text_ids[i] for i in texts[place[name]]]}
        for found, name in zip(images, text_image_ids, strict=True)
    ]


@torch.no_grad()
def _first(query_QE: Tensor, key_KE: Tensor, k: int) -> list[list[int]]:
    """Return each query's first k keys by inner product, the earlier one where two tie."""
    found, key_EK = [], key_KE.float().T
    for query_CE in query_QE.float().split(max(1, MOST_SCORES // len(key_KE))):
        order_CK = torch.sort(query_CE @ key_EK, dim=1, descending=True, stable=True).indices
        found += order_CK[:, :k].tolist()
    return found


def accuracy(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
    """Return the share of answers that are the row's `answer`; the mean of the classes' recalls is a part.

    That mean is over the classes that rows have, as scikit-learn's balanced accuracy (CLIP_benchmark's
    `mean_per_class_recall`).
    """
    check_lengths(answers, rows)
    by_row = [float(answer == row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    by_class = defaultdict(list)
    for row, is_right in zip(rows, by_row, strict=True):
        by_class[row["answer"]].append(is_right)
    recall = sum(sum(of_class) / len(of_class) for of_class in by_class.values()) / len(by_class)
    over = f"{len(rows)} rows of {len(by_class)} classes, exact match"
    return mean_score("accuracy", by_row, over, {"mean_per_class_recall": recall})
