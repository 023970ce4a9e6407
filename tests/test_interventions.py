"""Each intervention against its formula in NumPy; starts, dtypes, dropout, and R's orthonormal rows."""

import math

import numpy as np
import pytest
import torch
from tiny import llama

import vlreft
from vlreft.edit import ACTIVATIONS, orthonormal_rows
from vlreft.interventions import INTERVENTIONS

WIDTH, RANK = 24, 3

NUMPY_ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def length(x):
    return np.linalg.norm(x, axis=-1, keepdims=True)


def unit(x):
    return x / length(x)


FORMULAS = {
    "loreft": lambda h, p, act: h + (act(h @ p["weight"].T + p["bias"]) - h @ p["R"].T) @ p["R"],
    "direft": lambda h, p, act: h + act(h @ p["weight"].T + p["bias"]) @ p["R"],
    "noreft": lambda h, p, act: h + (act(h @ p["weight"].T + p["bias"]) - h @ p["projection"].T) @ p["projection"],
    "nodireft": lambda h, p, act: h + act(h @ p["weight"].T + p["bias"]) @ p["projection"],
    "consreft": lambda h, p, _: h + (p["bias"] - h @ p["R"].T) @ p["R"],
    "lobireft": lambda h, p, _: h + p["bias"] @ p["R"],
    "red": lambda h, p, _: p["gain"] * h + p["bias"],
    "vector": lambda h, p, _: h + p["vector"],
    "vti": lambda h, p, _: length(h) * unit(unit(h) + p["vector"]),
}

SHAPES = {
    "loreft": {"rotation": (RANK, WIDTH), "weight": (RANK, WIDTH), "bias": (RANK,)},
    "direft": {"rotation": (RANK, WIDTH), "weight": (RANK, WIDTH), "bias": (RANK,)},
    "noreft": {"projection": (RANK, WIDTH), "weight": (RANK, WIDTH), "bias": (RANK,)},
    "nodireft": {"projection": (RANK, WIDTH), "weight": (RANK, WIDTH), "bias": (RANK,)},
    "consreft": {"rotation": (RANK, WIDTH), "bias": (RANK,)},
    "lobireft": {"rotation": (RANK, WIDTH), "bias": (RANK,)},
    "red": {"gain": (WIDTH,), "bias": (WIDTH,)},
    "vector": {"vector": (WIDTH,)},
    "vti": {"vector": (WIDTH,)},
}

# Those that put in a source's states are in test_interchange.py.
METHODS = [method for method, cls in INTERVENTIONS.items() if not cls.uses_source]
ADDING = [method for method in METHODS if method != "vti"]  # h plus something of its own length
ROTATED = [method for method, shapes in SHAPES.items() if "rotation" in shapes]
WITH_SOURCE = [method for method in METHODS if INTERVENTIONS[method].uses_activation]
WITH_IDENTITY = [method for method in METHODS if INTERVENTIONS[method].has_identity]
METHODS_AND_ACTIVATIONS = [
    (method, activation) for method in METHODS for activation in [None, *(ACTIVATIONS if method in WITH_SOURCE else [])]
]


def make(method, *, seed=0, trained=True, width=WIDTH, **settings):
    """Build an intervention; `trained` moves every parameter away from its start."""
    torch.manual_seed(seed)
    cls = INTERVENTIONS[method]
    edit = cls(width, RANK if cls.uses_rank else None, **{"init": "reference", **settings})
    if trained:
        with torch.no_grad():
            for parameter in edit.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return edit


def states(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numpy_parameters(edit):
    """Return the parameters in float64, with R: the rows of `rotation` orthonormalised by Householder QR."""
    arrays = {name: parameter.detach().double().numpy() for name, parameter in edit.named_parameters()}
    if "rotation" in arrays:
        arrays["R"] = householder_rows(torch.tensor(arrays["rotation"])).numpy()
    return arrays


def householder_rows(a_RD):
    q_DR, r_RR = torch.linalg.qr(a_RD.mT)
    return (q_DR * r_RR.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT


def test_every_method_is_covered():
    assert set(METHODS) == set(FORMULAS) == set(SHAPES)
    assert set(ACTIVATIONS) == set(NUMPY_ACTIVATIONS) - {None}


@pytest.mark.parametrize(("method", "activation"), METHODS_AND_ACTIVATIONS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_formula(method, activation, shape):
    edit = make(method, activation=activation)
    h = states(*shape, dtype=torch.float64)
    expected = FORMULAS[method](h.numpy(), numpy_parameters(edit), NUMPY_ACTIVATIONS[activation])
    torch.testing.assert_close(edit(h), torch.from_numpy(np.asarray(expected)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("method", ADDING)
def test_scale_and_strength_multiply_the_edit(method):
    h = states(4, dtype=torch.float64)
    full, half = make(method), make(method, scale=-0.5)
    torch.testing.assert_close(half(h) - h, -0.5 * (full(h) - h), atol=1e-13, rtol=1e-13)
    assert torch.equal(full(h, -0.5), half(h))
    assert torch.equal(full(h, 0.0), h)
    strength_N1 = torch.tensor([[1.0], [0.0], [-0.5], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(full(h, strength_N1) - h, strength_N1 * (full(h) - h), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 0.3, -2.0])
def test_vti_keeps_the_length(scale):
    edit, h = make("vti", scale=scale), states(50, dtype=torch.float64)
    torch.testing.assert_close(edit(h).norm(dim=-1), h.norm(dim=-1), atol=1e-12, rtol=1e-12)
    towards = torch.nn.functional.normalize(h, dim=-1) + scale * edit.vector.double()
    torch.testing.assert_close(edit(h), h.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(towards, dim=-1))
    assert torch.equal(edit(torch.zeros(1, WIDTH)), torch.zeros(1, WIDTH))


@pytest.mark.parametrize("method", METHODS)
def test_parameters(method):
    edit = make(method)
    assert {name: tuple(p.shape) for name, p in edit.named_parameters()} == SHAPES[method]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in edit.parameters())
    assert not list(edit.buffers())
    assert set(edit.state_dict()) == set(SHAPES[method])
    assert all(f"{name}={shape}" in repr(edit) for name, shape in SHAPES[method].items())


# Starts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", WITH_IDENTITY)
def test_identity_start_changes_nothing(method, dtype):
    h = states(50, dtype=dtype)
    assert torch.equal(make(method, trained=False, init="identity")(h), h)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", ["direft", "nodireft"])
def test_identity_start_with_an_activation(method, activation):
    h = states(50)
    assert torch.equal(make(method, trained=False, init="identity", activation=activation)(h), h)


@pytest.mark.parametrize("method", WITH_IDENTITY)
def test_identity_start_in_float64_is_within_float32_rounding(method):
    h = states(50, dtype=torch.float64)
    torch.testing.assert_close(make(method, trained=False, init="identity")(h), h, atol=3e-6, rtol=0)


@pytest.mark.parametrize("init", ["identity", "reference"])
@pytest.mark.parametrize("method", WITH_IDENTITY)
def test_a_start_can_learn(method, init):
    """Some parameter has a gradient from the first step on, or the identity would be for ever."""
    edit = make(method, trained=False, init=init)
    (edit(states(8)) * states(8, seed=2)).sum().backward()
    assert max(float(p.grad.abs().max()) for p in edit.parameters()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_reference_start(method):
    width = 400
    edit = make(method, trained=False, width=width)
    values = {name: parameter.detach() for name, parameter in edit.named_parameters()}
    bound = width**-0.5
    if "rotation" in values:
        torch.testing.assert_close(values["rotation"] @ values["rotation"].mT, torch.eye(RANK), atol=1e-5, rtol=0)
    for name in {"weight", "projection"} & set(values):
        assert bound * 0.9 < values[name].abs().max() <= bound
        assert values[name].abs().mean() == pytest.approx(bound / 2, rel=0.1)
    if method in WITH_SOURCE:
        assert values["bias"].abs().max() <= bound
    if method in ("consreft", "lobireft"):
        assert values["bias"].min() >= 0
        assert values["bias"].max() < 1
    if method in ("red", "vector", "vti"):
        h = torch.randn(5, width)
        assert torch.equal(edit(h), h)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_follows_torchs_generator(method):
    one, same, other = (make(method, trained=False, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    if INTERVENTIONS[method].uses_rank:
        assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# Numbers' types, gradients, dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_states_are_edited_in_float32(method, dtype):
    edit, h = make(method), states(2, 5, dtype=dtype)
    out = edit(h)
    assert out.dtype == dtype
    assert torch.equal(out, edit(h.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(edit(h), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_and_the_state_get_a_gradient(method, dtype):
    edit, h = make(method), states(6, dtype=dtype).requires_grad_()
    (edit(h) * states(6, seed=2, dtype=dtype)).sum().backward()
    assert h.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in edit.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_match_finite_differences(method):
    edit, h = make(method).double(), states(2, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in edit.named_parameters()]

    def run(h, *values):
        return torch.func.functional_call(edit, dict(zip(names, values, strict=True)), h)

    torch.autograd.gradcheck(run, (h, *edit.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_not_written_to(method):
    h = states(4)
    before = h.clone()
    assert make(method)(h) is not h
    assert torch.equal(h, before)


@pytest.mark.parametrize("method", ADDING)
def test_dropout_touches_the_edit_and_only_in_training(method):
    h = states(200)
    plain = make(method)
    edit = make(method, dropout=0.25, scale=2.0)
    full = plain(h) - h
    torch.testing.assert_close(edit.eval()(h) - h, 2.0 * full, atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    dropped = edit.train()(h) - h
    kept = dropped != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], 2.0 / 0.75 * full[kept], atol=1e-4, rtol=1e-4)
    assert torch.equal(plain.train()(h), plain.eval()(h))


# Orthonormal rows ----------------------------------------------------------------------------------------------------


def ill_conditioned(condition, *, rank=8, width=256, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u_RR, v_RD = (torch.randn(rank, n, generator=generator, dtype=torch.float64) for n in (rank, width))
    singular_R = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    return (scale * (householder_rows(u_RR) * singular_R) @ householder_rows(v_RD)).float()


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_orthonormal_and_span_the_same_space(condition, scale, seed):
    a_RD = ill_conditioned(condition, scale=scale, seed=seed)
    r_RD = orthonormal_rows(a_RD)
    torch.testing.assert_close(r_RD @ r_RD.mT, torch.eye(len(a_RD)), atol=1e-5, rtol=0)
    # The span of a float32 matrix is itself known to condition x 6e-8 only.
    q_RD = householder_rows(a_RD.double())
    outside_RD = r_RD.double() - (r_RD.double() @ q_RD.mT) @ q_RD
    assert outside_RD.norm(dim=1).max() < 1e-5 * max(1.0, condition / 10)


@pytest.mark.parametrize("rank", [1, 2, 16, 32])
def test_rows_equal_householder_qr(rank):
    a_RD = torch.randn(rank, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    torch.testing.assert_close(orthonormal_rows(a_RD), householder_rows(a_RD), atol=1e-9, rtol=0)


def test_orthonormal_rows_stay_as_they_are():
    r_RD = torch.linalg.qr(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))[0].mT.contiguous()
    torch.testing.assert_close(orthonormal_rows(r_RD), r_RD, atol=1e-6, rtol=0)


def test_a_stack_of_matrices_is_orthonormalised_at_once():
    a_NRD = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    for several_RD, one_RD in zip(orthonormal_rows(a_NRD), a_NRD, strict=True):
        torch.testing.assert_close(several_RD, orthonormal_rows(one_RD), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rank", "width"), [(1, 4), (3, 7), (4, 4)])
def test_orthonormal_rows_gradcheck(rank, width):
    a_RD = torch.randn(rank, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.autograd.gradcheck(orthonormal_rows, a_RD.requires_grad_())
    torch.autograd.gradgradcheck(orthonormal_rows, a_RD)


@pytest.mark.parametrize("method", ROTATED)
def test_rotation_survives_weight_decay_and_reload(method):
    edit = make(method, trained=False)
    target = states(16, seed=5)
    for _ in range(2):
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.05, weight_decay=0.5)
        for _ in range(15):
            optimizer.zero_grad()
            loss = (edit(states(16)) - target).square().mean()
            loss.backward()
            optimizer.step()
        r_RD = orthonormal_rows(edit.rotation.detach())
        torch.testing.assert_close(r_RD @ r_RD.mT, torch.eye(RANK), atol=1e-5, rtol=0)
        reloaded = make(method)
        reloaded.load_state_dict(edit.state_dict())
        assert torch.equal(reloaded(target), edit(target))
        edit = reloaded


def test_lowering_the_model_leaves_the_interventions_in_float32():
    model = llama()
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=2, init="reference")))
    parameters = list(reft.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for parameter, now, value in zip(parameters, reft.parameters(), values, strict=True):
        assert now is parameter
        assert now.dtype == torch.float32
        assert now.equal(value)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
    model.to("meta")
    assert {parameter.device.type for parameter in reft.parameters()} == {"meta"}
