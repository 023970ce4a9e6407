"""Paired bootstrap, means over seeds and Holm's correction, against scipy, enumeration and simulated truth."""

import itertools

import numpy as np
import pytest
import scipy.stats

from tasks import statistics
from tasks.metrics.score import Score, check_lengths, mean_score
from tasks.statistics import holm, mean_sd, paired_bootstrap


def by_row(answers, rows):
    """The answers are the scores."""
    check_lengths(answers, rows)
    return mean_score("mean", [float(answer) for answer in answers], "all")


def whole(answers, rows):
    """The same value, of the set as a whole."""
    return Score("mean", sum(map(float, answers)) / len(rows), "all")


def f1(answers, rows):
    """F1 of "yes"; not a mean of rows."""
    hits = sum(answer == row["answer"] == "yes" for answer, row in zip(answers, rows, strict=True))
    said, true = answers.count("yes"), sum(row["answer"] == "yes" for row in rows)
    return Score("f1", 2 * hits / (said + true) if said + true else 0.0, "all")


def rows_of(number):
    return [{"id": str(n)} for n in range(number)]


def draw(seed, size):
    return np.random.default_rng(seed).normal(size=size).tolist()


# --- paired bootstrap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differences", [(1.0, 0.0), (1.0, 1.0, 0.0), (2.0, -1.0, 0.5, 0.0), (3.0, 1.0, -0.5, 0.25)])
def test_it_approaches_what_all_resamples_of_a_small_set_say(differences):
    size = len(differences)
    means = np.array([np.mean(drawn) for drawn in itertools.product(differences, repeat=size)])
    observed = np.mean(differences)
    exact = np.mean(np.abs(means - observed) >= abs(observed) - 1e-12)
    found = paired_bootstrap(by_row, differences, [0.0] * size, rows_of(size), num_samples=200_000)
    assert found.difference == pytest.approx(observed)
    assert found.p_value == pytest.approx(exact, abs=0.005)
    step = 1 / size  # neighbouring values of the few there are
    assert found.interval == pytest.approx(np.quantile(means, [0.025, 0.975], method="inverted_cdf"), abs=step)


def test_interval_is_scipys():
    a, b = np.array(draw(0, 300)) + 0.2, np.array(draw(1, 300))
    theirs = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = paired_bootstrap(by_row, a.tolist(), b.tolist(), rows_of(300), num_samples=20_000)
    assert found.interval == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert found.difference == pytest.approx(np.mean(a - b))
    assert (found.value_a, found.value_b) == pytest.approx((a.mean(), b.mean()))


@pytest.mark.parametrize("shift", [0.0, 0.06, 0.12, -0.12])
def test_p_value_is_near_the_t_tests_and_the_sign_flips(shift):
    difference = np.array(draw(3, 500)) + shift
    found = paired_bootstrap(by_row, difference.tolist(), [0.0] * 500, rows_of(500), num_samples=20_000)
    t_test = scipy.stats.ttest_1samp(difference, 0).pvalue
    flips = scipy.stats.permutation_test(
        (difference, np.zeros(500)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=5_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).pvalue
    assert found.p_value == pytest.approx(t_test, abs=0.015)
    assert found.p_value == pytest.approx(flips, abs=0.025)


@pytest.fixture(scope="module")
def simulated():
    """400 experiments of 120 rows that are right or wrong, A better by 0.1, and 400 with no difference."""
    generator = np.random.default_rng(11)
    found = {}
    for gain in (0.1, 0.0):
        results = []
        for seed in range(400):
            hard = generator.random(120)  # the rows' own difficulty pairs the answers
            b = (generator.random(120) < 0.2 + 0.5 * hard).astype(float)
            a = (generator.random(120) < 0.2 + gain + 0.5 * hard).astype(float)
            results.append(paired_bootstrap(by_row, a.tolist(), b.tolist(), rows_of(120), num_samples=500, seed=seed))
        found[gain] = results
    return found


@pytest.mark.parametrize("gain", [0.1, 0.0])
def test_interval_covers_the_truth_in_about_95_of_100_experiments(simulated, gain):
    covered = np.mean([c.interval[0] <= gain <= c.interval[1] for c in simulated[gain]])
    assert 0.915 <= covered <= 0.975  # three standard errors


def test_p_is_uniform_without_a_difference_and_small_with_one(simulated):
    p_null, p_real = ([c.p_value for c in simulated[gain]] for gain in (0.0, 0.1))
    assert np.mean(np.array(p_null) < 0.05) == pytest.approx(0.05, abs=0.033)
    assert scipy.stats.kstest(p_null, "uniform").statistic < 0.1  # right or wrong: p has steps
    assert np.mean(np.array(p_real) < 0.05) > 0.3


def test_equal_answers_have_difference_0_and_p_1():
    answers = draw(0, 40)
    for metric in (by_row, whole):
        found = paired_bootstrap(metric, answers, list(answers), rows_of(40), num_samples=200)
        assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_p_is_never_0():
    found = paired_bootstrap(by_row, [1.0] * 30, [0.0] * 30, rows_of(30), num_samples=99)
    assert found.interval == (1.0, 1.0)
    assert found.p_value == 0.01


def test_a_and_b_change_places():
    a, b, rows = draw(0, 50), draw(1, 50), rows_of(50)
    one, other = paired_bootstrap(by_row, a, b, rows), paired_bootstrap(by_row, b, a, rows)
    assert one.difference == -other.difference
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=1e-12)
    assert one.p_value == other.p_value


def test_seed_decides_the_result():
    a, b, rows = draw(0, 50), draw(1, 50), rows_of(50)
    assert paired_bootstrap(by_row, a, b, rows, seed=3) == paired_bootstrap(by_row, a, b, rows, seed=3)
    assert paired_bootstrap(by_row, a, b, rows, seed=3) != paired_bootstrap(by_row, a, b, rows, seed=4)


def test_both_routes_draw_the_same_resamples(monkeypatch):
    a, b, rows = draw(0, 60), draw(1, 60), rows_of(60)
    fast = paired_bootstrap(by_row, a, b, rows, num_samples=300, seed=2)
    slow = paired_bootstrap(whole, a, b, rows, num_samples=300, seed=2)
    assert (fast.route, slow.route) == ("rows", "metric")
    assert fast.interval == pytest.approx(slow.interval, abs=1e-12)
    assert fast.p_value == slow.p_value
    monkeypatch.setattr(statistics, "NUM_HELD", 60 * 7)  # 7 resamples at a time, the last chunk with 6
    assert paired_bootstrap(by_row, a, b, rows, num_samples=300, seed=2) == fast


def test_one_run_without_row_scores_sends_both_to_the_metric():
    def mixed(answers, rows):
        return (whole if answers[0] == 7.0 else by_row)(answers, rows)

    found = paired_bootstrap(mixed, [7.0, 7.0], [0.0, 1.0], rows_of(2), num_samples=50)
    assert found.route == "metric"


def test_memory_stays_below_a_bound_with_200_000_rows():
    import tracemalloc

    size = 200_000
    a, rows = [1.0] * size, [{}] * size
    tracemalloc.start()
    paired_bootstrap(by_row, a, [0.0] * size, rows, num_samples=42)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # 42 resamples at once are 34 MB of places and 67 MB of differences, and are two chunks


def test_a_metric_of_the_whole_set_is_called_on_rows_that_go_with_their_answers():
    generator = np.random.default_rng(0)
    rows = [{"id": n, "answer": "yes" if n % 3 else "no"} for n in range(80)]
    good = [row["answer"] if generator.random() < 0.9 else "yes" for row in rows]
    poor = ["yes" if generator.random() < 0.5 else "no" for _ in rows]
    found = paired_bootstrap(f1, good, poor, rows)
    assert (found.route, found.num_samples) == ("metric", 1_000)
    assert found.difference == pytest.approx(f1(good, rows).value - f1(poor, rows).value)
    assert found.interval[0] > 0.1
    assert found.p_value < 0.01
    assert paired_bootstrap(f1, good, good, rows, num_samples=20).p_value == 1.0


def test_rows_and_metric_have_their_own_usual_numbers_of_resamples():
    assert paired_bootstrap(by_row, [1, 0], [0, 0], rows_of(2)).num_samples == 10_000
    assert paired_bootstrap(whole, [1, 0], [0, 0], rows_of(2)).num_samples == 1_000


# --- several seeds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [by_row, whole])
def test_seeds_are_averaged_within_each_resample(metric):
    seeds, base, rows = [draw(n, 40) for n in range(3)], draw(9, 40), rows_of(40)
    mean = np.mean(seeds, axis=0).tolist()
    many = paired_bootstrap(metric, seeds, base, rows, num_samples=300)
    one = paired_bootstrap(metric, mean, [base], rows, num_samples=300)
    assert (many.num_seeds, one.num_seeds) == ((3, 1), (1, 1))
    assert many.difference == pytest.approx(one.difference, abs=1e-12)
    assert many.interval == pytest.approx(one.interval, abs=1e-12)
    assert many.p_value == pytest.approx(one.p_value, abs=1e-12)


def test_ranked_ids_are_answers_and_not_seeds():
    rows = [{"id": str(n)} for n in range(4)]

    def recall(answers, rows):
        hits = [float(ranked[0] == row["id"]) for ranked, row in zip(answers, rows, strict=True)]
        return mean_score("recall@1", hits, "all")

    right = [[row["id"], *(other["id"] for other in rows if other != row)] for row in rows]
    wrong = [ranked[::-1] for ranked in right]
    assert paired_bootstrap(recall, right, wrong, rows).difference == 1.0  # as many ranks as rows: still one seed
    assert paired_bootstrap(recall, [right, wrong], wrong, rows).difference == 0.5


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "num_rows", "says"),
    [
        ([], [], 0, "`rows` is empty"),
        ([1, 2], [1, 2, 3], 3, "`answers_a` has 2 items for 3 rows"),
        ([1, 2, 3], [1, 2, 3, 4], 3, "`answers_b` has 4 items for 3 rows"),
        ([[1, 2, 3], [1, 2]], [1, 2, 3], 3, r"`answers_a` has lists of \[3, 2\] for 3 rows"),
        ([], [1], 1, "`answers_a` has 0 items for 1 rows"),
        ("yes", ["a", "b", "c"], 3, "`answers_a` has one text for 3 rows"),
        (["yes", "nay"], ["a", "b", "c"], 3, "`answers_a` has 2 items for 3 rows"),
    ],
)
def test_answers_that_do_not_fit_the_rows_are_refused(a, b, num_rows, says):
    with pytest.raises(ValueError, match=says):
        paired_bootstrap(by_row, a, b, rows_of(num_rows))


def test_no_resamples_are_refused():
    with pytest.raises(ValueError, match="`num_samples`"):
        paired_bootstrap(by_row, [1], [0], rows_of(1), num_samples=0)


def test_a_metric_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="'mean' is nan on 2 rows"):
        paired_bootstrap(whole, [float("nan"), 1], [0, 0], rows_of(2))


@pytest.mark.parametrize("raises", [True, False])
def test_resamples_without_a_value_are_left_out_and_told(raises):
    def spread(answers, rows):
        if raises and len(set(answers)) < 2:
            raise ValueError("all alike")
        return Score("spread", 1.0 if len(set(answers)) > 1 else float("nan"), f"{len(rows)} rows")

    found = paired_bootstrap(spread, [1, 1, 2], [1, 2, 3], rows_of(3))
    assert found.num_samples == pytest.approx(1000 * 18 / 27, abs=60)  # of 27 draws 9 have all of A's alike
    with pytest.raises(ValueError, match=r"the metric has a value on \d+ of 1000 resamples only"):
        paired_bootstrap(spread, [1] * 8 + [2], [2] + [1] * 8, rows_of(9))


def test_row_scores_whose_mean_is_not_the_value_are_refused():
    def odd(answers, rows):
        return Score("odd", 0.9, f"{len(rows)} rows", tuple(answers))

    with pytest.raises(ValueError, match="is not the mean of its 2 `by_row`"):
        paired_bootstrap(odd, [0.0, 1.0], [0.0, 1.0], rows_of(2))


# --- mean_sd, holm --------------------------------------------------------------------------------------------------


def test_mean_and_sample_sd_are_numpys():
    values = draw(4, 5)
    assert mean_sd(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_sd([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))


def test_one_value_has_no_sd_and_equal_ones_have_none_to_speak_of():
    assert mean_sd([0.7]) == (0.7, None)
    assert mean_sd([0.1, 0.1, 0.1]) == (0.1, 0.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_no_values_or_no_numbers_are_refused(values):
    with pytest.raises(ValueError, match="finite numbers"):
        mean_sd(values)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closure_of_bonferroni(seed):
    p_values = (np.random.default_rng(seed).random(6) ** 3).tolist()
    places = range(len(p_values))
    families = [f for size in range(1, 7) for f in itertools.combinations(places, size)]
    closed = [max(min(1.0, len(f) * min(p_values[i] for i in f)) for f in families if place in f) for place in places]
    assert holm(p_values) == pytest.approx(closed)


def test_holm_keeps_order_and_ties():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, 0.2]) == [0.4, 0.4]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        holm([0.5, p])
