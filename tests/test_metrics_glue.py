"""Laws of GLUE's metrics, of accuracy and of retrieval: equal to formulas written out here, in another way."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from tasks.metrics.glue import LABELS, POSITIVE, glue_metric
from tasks.metrics.ranking import accuracy, rankings, recall_at_k

NUM_CASES = 300  # of each task
ACCURACIES = [name for name in LABELS if name != "cola"]


def truths(labels):
    return [{"answer": label} for label in labels]


def labelled_cases(labels, seed):
    """Yield answers and labels at random; some constant, some of one class only, some answers no label at all."""
    rng = np.random.default_rng(seed)
    for number in range(NUM_CASES):
        size = int(rng.integers(1, 60))
        truth, said = rng.choice(labels, size).tolist(), rng.choice(labels, size).tolist()
        keep = rng.random(size) < rng.random()
        said = [a if same else b for a, b, same in zip(truth, said, keep, strict=True)]
        if number % 10 == 0:
            said = [labels[number // 10 % len(labels)]] * size
        if number % 15 == 0:
            truth = [labels[number // 15 % len(labels)]] * size
        if number % 7 == 0:
            said[0] = "maybe"
        yield said, truth


def f1_of(said, truth, positive):
    hits = sum(a == b == positive for a, b in zip(said, truth, strict=True))
    marked = said.count(positive) + truth.count(positive)
    return 2 * hits / marked if marked else 0.0


def matthews(said, truth):
    """The correlation of the indicator vectors (R_K of Gorodkin), 0 where it is not defined."""
    labels = sorted({*said, *truth})
    X, Y = (np.array([[label == one for one in labels] for label in texts], float) for texts in (said, truth))
    X, Y = X - X.mean(0), Y - Y.mean(0)
    power = (X * X).sum() * (Y * Y).sum()
    return (X * Y).sum() / np.sqrt(power) if power > 1e-12 else 0.0


# --- GLUE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracy_and_f1_are_the_formulas(name):
    for said, truth in labelled_cases(LABELS[name], seed=1):
        score = glue_metric(name)(said, truths(truth))
        share = np.mean(np.array(said) == np.array(truth))
        assert score.value == pytest.approx(share)
        assert np.mean(score.by_row) == pytest.approx(share)
        if name in POSITIVE:
            f1 = f1_of(said, truth, POSITIVE[name])
            assert score.parts == pytest.approx({"f1": f1, "combined": (share + f1) / 2})
        else:
            assert score.parts == {}


def test_cola_is_matthews_correlation():
    for said, truth in labelled_cases(LABELS["cola"], seed=2):
        score = glue_metric("cola")(said, truths(truth))
        assert score.value == pytest.approx(matthews(said, truth), abs=1e-9)
        assert score.by_row is None


def ranks_of(numbers):
    """Return ranks from 1, those that tie sharing their mean."""
    return [sum(b < a for b in numbers) + (sum(b == a for b in numbers) + 1) / 2 for a in numbers]


def test_stsb_is_pearsons_and_spearmans_correlation():
    rng = np.random.default_rng(3)
    for number in range(NUM_CASES):
        size = int(rng.integers(3, 50))
        said, truth = rng.random(size) * 5, rng.random(size) * 5
        if number % 2:  # with ties
            said, truth = said.round(), truth.round()
        said[0], truth[0], said[1], truth[1] = 0, 5, 5, 0  # never constant
        score = glue_metric("stsb")([str(x) for x in said], truths(str(x) for x in truth))
        spearman = np.corrcoef(ranks_of(said), ranks_of(truth))[0, 1]
        pearson = np.corrcoef(said, truth)[0, 1]
        assert score.value == pytest.approx(pearson, abs=1e-9)
        assert score.parts == pytest.approx({"spearman": spearman, "combined": (pearson + spearman) / 2}, abs=1e-9)


@pytest.mark.parametrize(("said", "truth"), [("1 1 1", "0 2 4"), ("0 2 4", "1 1 1"), ("3 3 3", "3 3 3")])
def test_stsb_of_constant_numbers_is_nan_and_says_why(said, truth):
    score = glue_metric("stsb")(said.split(), truths(truth.split()))
    assert math.isnan(score.value)
    assert "not defined (NaN)" in score.over


def test_glue_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="must be one of"):
        glue_metric("wnli")
    with pytest.raises(ValueError, match="row 1: the label '1' is none of"):
        glue_metric("rte")(["entailment"] * 2, truths(["entailment", "1"]))
    with pytest.raises(ValueError, match=r"answer to row 0 \(='good'\) must be a finite number"):
        glue_metric("stsb")(["good", "1"], truths(["1", "2"]))
    with pytest.raises(ValueError, match=r"label of row 1 \(='nan'\)"):
        glue_metric("stsb")(["0", "1"], truths(["1", "nan"]))
    with pytest.raises(ValueError, match="two rows or more"):
        glue_metric("stsb")(["0"], truths(["1"]))
    with pytest.raises(ValueError, match="0 answers to 0 rows"):
        glue_metric("sst2")([], [])


# --- classification -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
@pytest.mark.filterwarnings("ignore:A single label:UserWarning")
def test_accuracy_has_scikit_learns_balanced_accuracy():
    for said, truth in labelled_cases(["cat", "dog", "eel", "fox"], seed=4):
        score = accuracy(said, truths(truth))
        assert score.value == pytest.approx(np.mean(np.array(said) == np.array(truth)))
        assert score.parts["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, said))


# --- retrieval ----------------------------------------------------------------------------------------------------


def retrieval(num_images, num_texts, seed, ties=False):
    """Make embeddings and ids; with ties, of few whole numbers, so that scores are equal and exact."""
    gen = torch.Generator().manual_seed(seed)
    shape = (num_images + num_texts, 4 if ties else 16)
    both = torch.randint(-1, 2, shape, generator=gen).float() if ties else torch.randn(shape, generator=gen)
    owner = torch.cat([torch.arange(num_images), torch.randint(num_images, (num_texts,), generator=gen)])[:num_texts]
    owner = owner[torch.randperm(num_texts, generator=gen)].tolist()
    return both[:num_images], both[num_images:], owner


def answers_of(image_IE, text_TE, owner, k=10):
    images, texts = [f"i{n}" for n in range(len(image_IE))], [f"t{n}" for n in range(len(text_TE))]
    names = [images[n] for n in owner]
    rows = [{"id": text, "image_id": name} for text, name in zip(texts, names, strict=True)]
    return rankings(image_IE, text_TE, images, texts, names, k), rows


def recalls(image_IE, text_TE, owner):
    """Count, for each query, the candidates before its best match: those that score higher, or as high and earlier."""
    score_TI, owner = (text_TE @ image_IE.T).numpy(), np.array(owner)
    parts = {}
    sides = {"text_to_image": (score_TI, lambda q: [owner[q]]), "image_to_text": (score_TI.T, lambda q: owner == q)}
    for name, (score_QK, matches) in sides.items():
        places = []
        for query, scores in enumerate(score_QK):
            keys = np.arange(len(scores))
            own = keys[matches(query)]
            places.append(min(int(((scores > scores[m]) | ((scores == scores[m]) & (keys < m))).sum()) for m in own))
        parts |= {f"{name}_r{k}": np.mean(np.array(places) < k) for k in (1, 5, 10)}
    return parts


@pytest.mark.parametrize("ties", [False, True], ids=["floats", "ties"])
@pytest.mark.parametrize(("num_images", "num_texts"), [(100, 500), (250, 260), (40, 400), (12, 12), (1, 3), (3, 200)])
def test_recall_is_the_share_of_queries_with_a_match(num_images, num_texts, ties):
    case = retrieval(num_images, num_texts, seed=num_images, ties=ties)
    score = recall_at_k(*answers_of(*case))
    wanted = recalls(*case)
    assert score.parts == pytest.approx(wanted)
    assert score.value == pytest.approx(sum(wanted.values()) / 6)
    assert score.by_row is None
    assert score.over.startswith(f"{num_texts} captions, {num_images} pictures")


def test_rankings_are_those_of_a_whole_stable_sort_however_cut(monkeypatch):
    image_IE, text_TE, owner = retrieval(30, 90, seed=5, ties=True)
    whole, _ = answers_of(image_IE, text_TE, owner, k=7)
    order = np.argsort(-(text_TE @ image_IE.T).numpy(), axis=1, kind="stable")[:, :7]
    assert [answer["images"] for answer in whole] == [[f"i{n}" for n in found] for found in order]
    monkeypatch.setattr("tasks.metrics.ranking.MOST_SCORES", 100)
    assert answers_of(image_IE, text_TE, owner, k=7)[0] == whole


def test_all_captions_of_a_picture_have_its_texts():
    answers, rows = answers_of(*retrieval(5, 20, seed=6))
    by_image = {}
    for answer, row in zip(answers, rows, strict=True):
        assert by_image.setdefault(row["image_id"], answer["texts"]) == answer["texts"]
    assert len(by_image) == 5


def test_retrieval_refuses_what_does_not_fit():
    answers, rows = answers_of(*retrieval(4, 8, seed=7))
    with pytest.raises(ValueError, match="8 rows have 7 different ids"):
        recall_at_k(answers, [rows[1], *rows[1:]])
    with pytest.raises(ValueError, match="row 0: 'images' must have 4 different ids"):
        recall_at_k([{**answers[0], "images": ["i0"]}, *answers[1:]], rows)
    with pytest.raises(ValueError, match="row 0: 'texts' must have 8 different ids"):
        recall_at_k([{**answers[0], "texts": ["t0"] * 8}, *answers[1:]], rows)
    with pytest.raises(ValueError, match="ranks 'x', which is none of the rows'"):
        recall_at_k([{**answers[0], "images": ["x", "i1", "i2", "i3"]}, *answers[1:]], rows)
    with pytest.raises(ValueError, match="row 0 has no ranking 'images'"):
        recall_at_k(["i0", *answers[1:]], rows)
    with pytest.raises(ValueError, match="must be one to each"):
        rankings(torch.ones(1, 2), torch.ones(1, 2), ["i"], ["t", "u"], ["i", "i"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        rankings(torch.full((1, 2), torch.nan), torch.ones(1, 2), ["i"], ["t"], ["i"])
    with pytest.raises(ValueError, match="belongs to 'j'"):
        rankings(torch.ones(1, 2), torch.ones(1, 2), ["i"], ["t"], ["j"])
