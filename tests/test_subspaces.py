"""Principal angles against SciPy, by construction, and between adapters and groups; and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from tiny import llama, shake, shared_llama

import vlreft
from vlreft.causes.subspaces import angles_between, principal_angles
from vlreft.edit import orthonormal_rows

WIDTH = 16
pytestmark = pytest.mark.filterwarnings("error")


def rows(num_rows, seed, width=WIDTH):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def on():
    """Attach shaken adapters to a shared model; they go afterwards."""
    made = []

    def attach(*items, name="default", model=None, seed=1):
        reft = vlreft.attach(shared_llama() if model is None else model, vlreft.ReftConfig(items), name)
        made.append(shake(reft, seed))
        return reft

    yield attach
    for reft in made:
        reft.detach()


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_a", "num_b"), [(1, 1), (3, 3), (2, 5), (5, 2), (16, 4), (12, 12)])
def test_against_scipy(num_a, num_b):
    a_RD, b_RD = rows(num_a, 1), rows(num_b, 2)
    ours = angles_between(a_RD, b_RD)
    theirs = np.rad2deg(subspace_angles(a_RD.T.numpy(), b_RD.T.numpy()))[::-1]
    # SciPy chooses between sine and cosine by another rule, and is this far from 0 where both spans hold a direction.
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6 if num_a + num_b > WIDTH else 1e-9)
    assert ours.dtype == torch.float64
    assert ours.tolist() == sorted(ours.tolist())


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 1e-3, 30.0, 45.0, 60.0, 89.999, 90.0])
def test_an_angle_that_was_put_in_comes_out(degrees):
    """Small ones too, where an arc cosine knows half of the digits alone."""
    basis_RD = torch.linalg.qr(rows(WIDTH, 3)).Q
    turn = math.radians(degrees)
    a_RD = basis_RD[:2]
    b_RD = torch.stack([math.cos(turn) * basis_RD[0] + math.sin(turn) * basis_RD[5], basis_RD[6]])
    expected = torch.tensor([degrees, 90.0], dtype=torch.float64)
    torch.testing.assert_close(angles_between(a_RD, b_RD), expected, atol=1e-12, rtol=0)


def test_it_is_of_the_spans_whatever_rows_say_so():
    a_RD, b_RD = rows(3, 1), rows(4, 2)
    mixed_RD = rows(3, 4, width=3) @ a_RD
    expected = angles_between(a_RD, b_RD)
    torch.testing.assert_close(angles_between(mixed_RD, b_RD), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(angles_between(b_RD, 1e-6 * a_RD), expected, atol=1e-9, rtol=0)


def test_rows_that_add_no_direction_are_not_counted():
    a_RD, b_RD = rows(2, 1), rows(4, 2)
    torch.testing.assert_close(
        angles_between(torch.cat([a_RD, a_RD.sum(0, keepdim=True)]), b_RD),
        angles_between(a_RD, b_RD),
        atol=1e-9,
        rtol=0,
    )


# Adapters ------------------------------------------------------------------------------------------------------------


def test_two_adapters_place_by_place(on):
    """R of one by an independent QR, V of the other as it is; only the places that both have."""
    first = on(vlreft.Intervention("loreft", positions="f1+l1", rank=2, layers=[0, 1]), name="a")
    second = on(vlreft.Intervention("nodireft", positions="f1+l1", rank=3, layers=[1, 2]), name="b", seed=2)
    angles = principal_angles(first, second)
    assert [(a.site, a.layer, a.component, a.head, a.positions) for a in angles] == [
        ("text", 1, "output", None, "prompt:f1"),
        ("text", 1, "output", None, "prompt:l1"),
    ]
    for angle in angles:
        key = f"0:text:1:{angle.positions.removeprefix('prompt:')}"
        ours = first.edits[key].rotation.detach().double().numpy()
        theirs = second.edits[key].projection.detach().double().numpy()
        np.testing.assert_allclose(
            angle.degrees_K.numpy(), np.rad2deg(subspace_angles(ours.T, theirs.T))[::-1], atol=1e-9
        )
    assert (
        str(angles[0])
        == "site 'text' layer 1, prompt:f1: " + " ".join(f"{a:.1f}" for a in angles[0].degrees_K.tolist()) + " degrees"
    )
    torch.testing.assert_close(principal_angles(second, first)[1].degrees_K, angles[1].degrees_K)


def test_an_adapter_is_at_no_angle_to_itself_wherever_it_is(on):
    item = vlreft.Intervention("loreft", rank=4, layers=[0, 2])
    first = on(item)
    second = on(item, model=llama())
    for angle in principal_angles(first, second):
        assert float(angle.degrees_K.abs().max()) < 1e-4
    assert len(principal_angles(first, second)) == 2


@pytest.mark.parametrize("method", ["loreft", "direft", "consreft", "lobireft", "das"])
def test_groups_of_a_rotated_method_are_at_right_angles(method, on):
    init = {"init": "reference"} if method in ("consreft", "das") else {}
    reft = on(vlreft.Intervention(method, rank=6, groups=("a", "b", "c"), layers=[1], **init))
    for pair in (("a", "b"), ("a", "c"), ("b", "c")):
        (angle,) = principal_angles((reft, pair[0]), (reft, pair[1]))
        torch.testing.assert_close(angle.degrees_K, torch.tensor([90.0, 90.0]).double(), atol=1e-3, rtol=0)
    (whole,) = principal_angles(reft, (reft, "b"))
    assert float(whole.degrees_K.max()) < 1e-3


def test_groups_of_a_free_method_are_where_they_are(on):
    reft = on(vlreft.Intervention("noreft", rank=4, groups=("a", "b"), layers=[1]))
    (angle,) = principal_angles((reft, "a"), (reft, "b"))
    v_RD = reft.edits["0:text:1:l1"].projection.detach().double().numpy()
    expected = np.rad2deg(subspace_angles(v_RD[:2].T, v_RD[2:].T))[::-1]
    np.testing.assert_allclose(angle.degrees_K.numpy(), expected, atol=1e-9)
    assert angle.degrees_K[0] < 80


def test_vectors_heads_and_components(on):
    items = [
        vlreft.Intervention("vector", layers=[0], component="mlp"),
        vlreft.Intervention("loreft", layers=[2], component="heads", heads=[0, 1], rank=2),
    ]
    first, second = on(*items, name="a"), on(*items, name="b", seed=2)
    angles = principal_angles(first, second)
    assert [(a.layer, a.component, a.head, len(a.degrees_K)) for a in angles] == [
        (0, "mlp", None, 1),
        (2, "heads", 0, 2),
        (2, "heads", 1, 2),
    ]
    v, w = (reft.edits["0:text:0:mlp:l1"].vector.detach().double() for reft in (first, second))
    cosine = abs(float(v @ w) / float(v.norm() * w.norm()))
    assert float(angles[0].degrees_K[0]) == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-9)
    assert "layer 2 heads 1, prompt:l1: " in str(angles[2])


def test_interventions_at_one_place_count_together(on):
    """The number of an intervention in its config says nothing of where it is."""
    one = vlreft.Intervention("loreft", rank=2, layers=[1])
    first = on(vlreft.Intervention("loreft", rank=2, layers=[0]), one, one, name="a")
    second = on(one, name="b", seed=2)
    (angle,) = principal_angles(first, second)
    both_RD = torch.cat([first.edits[f"{number}:text:1:l1"].rotation for number in (1, 2)])
    torch.testing.assert_close(
        angle.degrees_K, angles_between(both_RD, second.edits["0:text:1:l1"].rotation), atol=1e-4, rtol=0
    )


def test_boundless_das_has_its_learned_width(on):
    reft = on(vlreft.Intervention("boundless_das", layers=[1], init="reference"))
    edit = reft.edits["0:text:1:l1"]
    with torch.no_grad():
        edit.boundary.fill_(0.25)
        basis_RD = orthonormal_rows(edit.rotation)
    other = on(vlreft.Intervention("loreft", rank=6, layers=[1]), name="b", seed=2)
    (angle,) = principal_angles(reft, other)
    assert len(angle.degrees_K) == 4
    torch.testing.assert_close(
        angle.degrees_K, angles_between(basis_RD[:4], other.edits["0:text:1:l1"].rotation), atol=1e-4, rtol=0
    )


# Refusals ------------------------------------------------------------------------------------------------------------


def test_refusals(on):
    grouped = on(vlreft.Intervention("loreft", rank=4, groups=("a", "b"), layers=[1]))
    elsewhere = on(vlreft.Intervention("loreft", rank=4, layers=[2]), name="elsewhere")
    with pytest.raises(
        ValueError, match=r"share no module and positions: site 'text' layer 1 \(prompt:l1\) against .* 2"
    ):
        principal_angles(grouped, elsewhere)
    with pytest.raises(ValueError, match=r"'default' has no group 'c'; its groups are \['a', 'b'\]"):
        principal_angles(grouped, (grouped, "c"))
    with pytest.raises(ValueError, match=r"'elsewhere' has no group 'a'; its groups are \[\]"):
        principal_angles((elsewhere, "a"), grouped)
    red = on(vlreft.Intervention("red", layers=[1]), name="red")
    with pytest.raises(ValueError, match=r"RED at site 'text' layer 1 \(prompt:l1\) moves the state in no subspace"):
        principal_angles(grouped, red)
    fresh = on(vlreft.Intervention("vector", layers=[1]), name="fresh")
    fresh.edits["0:text:1:l1"].vector.data.zero_()
    with pytest.raises(ValueError, match=r"Vector at .* has no direction yet"):
        principal_angles(grouped, fresh)
    wide = on(vlreft.Intervention("loreft", rank=4, layers=[1]), model=llama(width=32))
    with pytest.raises(ValueError, match="width 16 in one model and 32 in the other"):
        principal_angles(grouped, wide)
