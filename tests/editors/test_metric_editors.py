"""The editors that measure a change by what it does to a layer's outputs: against independent solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept, Within
from weightpatch.editing import Result
from weightpatch.editors import Metric, MinimumNorm, Preconditioned
from weightpatch.editors._dual import least_norm
from weightpatch.errors import InvalidInput
from weightpatch.statistics import second_moments


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(classes: int = 5, width: int = 6, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, classes, bias=bias).double()


def hand_made(model: nn.Linear, x: Tensor, shrinkage: float = 0.05) -> Metric:
    return second_moments(model, x).metric(shrinkage)


def oracle(model: nn.Linear, metric: Metric, fix: Classified) -> float:
    """Return the least ||Δ||² by a solver for general problems, with every rival as a constraint."""
    layer = metric.layers["weight"]
    width = layer.second.shape[-1]
    mean = layer.second[0].diagonal().mean()
    C = (layer.second[0] + layer.shrinkage * mean * torch.eye(width)).numpy()
    keys = torch.cat([fix.inputs, torch.ones(len(fix.inputs), 1)], 1).numpy()
    logits = model(fix.inputs).detach().numpy()
    n, classes = logits.shape
    rows, right = [], []
    for i in range(n):
        for rival in set(range(classes)) - {int(fix.labels[i])}:
            row = np.zeros((classes, width))
            row[rival] += keys[i]
            row[int(fix.labels[i])] -= keys[i]
            rows.append(row.reshape(-1))
            right.append(logits[i, rival] - logits[i, int(fix.labels[i])] + fix.margin)
    J, b = np.stack(rows), np.array(right)
    root = np.linalg.cholesky(np.kron(np.eye(classes), C))
    G = np.linalg.solve(root, -J.T).T  # Δ = root⁻ᵀ z: min ||z||² s.t. G z >= b, by Lawson and Hanson's transformation
    E = np.vstack([G.T, b])
    u, _ = nnls(E, np.concatenate([np.zeros(G.shape[1]), [1.0]]), maxiter=10000)
    r = E @ u - np.concatenate([np.zeros(G.shape[1]), [1.0]])
    z = -r[:-1] / r[-1]
    assert (G @ z - b).min() > -1e-8
    return float(z @ z)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 2))
def test_at_a_readout_it_is_the_least_change(seed: int, n: int, margin: float):
    model, reference = head(), drawn(60, 6, seed=1)
    metric = hand_made(model, reference)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    fix = Classified(x, torch.randint(5, (n,), generator=generator), margin)
    found = wp.edit(model, fix, MinimumNorm(metric=metric))
    if found.result is Result.already_satisfied:
        return
    assert found.result is Result.satisfied
    assert found.certificate is not None
    assert found.certificate.affine
    assert found.certificate.gap < 1e-7
    assert (found.certificate.multipliers >= 0).all()
    weight = {name: model.get_parameter(name).detach().clone() for name in ("weight", "bias")}
    with found.patch.applied(model):
        change = {name: model.get_parameter(name).detach() - weight[name] for name in weight}
    inverse = metric.layers["weight"].inverse(x)[0]
    delta = torch.cat([change["weight"], change["bias"][:, None]], 1)
    ours = float((delta @ torch.linalg.inv(inverse) * delta).sum())
    assert ours == pytest.approx(oracle(model, metric, fix), rel=1e-6, abs=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 8))
def test_the_dual_meets_a_general_solver_or_shows_a_contradiction(seed: int, m: int, width: int):
    J, b = drawn(m, width, seed=seed), drawn(m, seed=seed + 1)
    found = least_norm(J @ J.T, b)
    if found.feasible:
        delta = -J.T @ found.multipliers
        assert float((J @ delta + b).max()) < 1e-7 * (1 + float(delta.norm()) + float(b.abs().max()))
        rest = minimize(
            lambda d: 0.5 * d @ d,
            np.zeros(width),
            jac=lambda d: d,
            constraints={"type": "ineq", "fun": lambda d: -(J.numpy() @ d + b.numpy()), "jac": lambda d: -J.numpy()},
            options={"maxiter": 500, "ftol": 1e-14},
        )
        if rest.success:
            assert 0.5 * float(delta @ delta) == pytest.approx(rest.fun, rel=1e-5, abs=1e-9)
    else:
        assert (found.multipliers >= 0).all()
        assert float((J.T @ found.multipliers).norm()) < 1e-4 * float(found.multipliers.norm() * J.norm())
        assert float(b @ found.multipliers) > 0


def test_contradicting_demands_are_named():
    model = head(bias=False)
    x = drawn(1, 6)
    inputs = torch.cat([drawn(1, 6, seed=5), x, -2 * x])
    top = model(inputs).argmax(1)
    fix = Classified(inputs, torch.stack([top[0], (top[1] + 1) % 5, (top[1] + 1) % 5]), margin=0.5)
    found = wp.edit(model, fix, MinimumNorm())  # without a bias, x and -2 x cannot have one class
    assert found.result is Result.infeasible
    assert found.certificate is not None
    assert found.certificate.infeasible == (1, 2)
    with pytest.raises(wp.errors.EditFailed, match="certificate"):
        found.raise_for_result()


def test_a_contradiction_of_linearised_demands_alone_is_not_called_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = drawn(1, 3)
    inputs = torch.cat([x, -2 * x])
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        top = model(inputs).argmax(1)
        fix = Classified(inputs, torch.stack([(top[0] + 1) % 3] * 2), margin=3.0)
        found = wp.edit(model, fix, MinimumNorm(max_steps=5), parameters="0.weight")
        assert found.result is not Result.infeasible
        if found.certificate is not None and found.certificate.infeasible:
            assert not found.certificate.affine
            return
    raise AssertionError("no case was found that shows anything")


def test_where_nothing_meets_the_demands_the_best_place_is_returned(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = drawn(6, 3)
    fix = Classified(x, (model(x).argmax(1) + 1) % 3, margin=100.0)  # more than the readout can tell apart
    network = wp.network.Network(model, "0.*")
    problem = wp.problem.Problem(network.start, network.at, fix)
    seen: list[float] = []
    note = wp.editors.minimum_norm._Search._note

    def noted(search: object, violation: float) -> None:
        seen.append(violation)
        note(search, violation)

    monkeypatch.setattr(wp.editors.minimum_norm._Search, "_note", noted)
    found = MinimumNorm(radius=50.0, max_steps=200).run(problem)  # wide: rounds make things worse, too
    assert float(problem.violation(found.params).clamp_min(0).sum()) == pytest.approx(min(seen), rel=1e-12)
    assert seen[-1] > min(seen)
    assert found.steps < 200


def test_kept_samples_join_when_they_matter():
    model, x = head(), drawn(30, 6)
    top = model(x).argmax(1)
    fix = Classified(x[:1], (top[:1] + 1) % 5, margin=0.1)
    alone = wp.edit(model, fix, MinimumNorm())
    both = wp.edit(model, fix & Kept(x[1:]), MinimumNorm()).raise_for_result()
    assert both.certificate is not None
    assert both.certificate.affine
    with both.patch.applied(model):
        assert torch.equal(model(x[1:]).argmax(1), top[1:])
    with alone.patch.applied(model):
        assert not torch.equal(model(x[1:]).argmax(1), top[1:])  # else this test shows nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_demands_hold_after_rounding(dtype: torch.dtype):
    for seed in range(10):
        model, x = head(8, 20).to(dtype), drawn(4, 20, seed=seed).to(dtype)
        fix = Classified(x, (model(x).float().argmax(1) + 1) % 8)
        assert wp.edit(model, fix, MinimumNorm()).result is Result.satisfied


@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_inner_layers_are_repaired_jointly(name: str):
    case = next(case for case in zoo.CASES if case.name == name)
    model, x = case.model().eval(), case.inputs(24)
    metric = second_moments(model, x).metric()
    top = model(x).argsort(1, descending=True)
    fix = Classified(x[:3], top[:3, 1], margin=0.05) & Kept(x[3:])
    weights = [n for n in metric.layers if n.startswith(case.parameters.rstrip("*"))]
    for editor in (MinimumNorm(metric=metric), Preconditioned(metric=metric, max_steps=200)):
        found = wp.edit(model, fix, editor, parameters=weights)
        assert found.result is Result.satisfied, (editor, found)
    assert wp.edit(model, fix, MinimumNorm(metric=metric), parameters=weights).certificate.affine is False


def test_a_polyak_step_solves_one_affine_demand():
    model, x = head(2), drawn(40, 6)
    metric = hand_made(model, x)
    fix = Classified(x[:1], 1 - model(x[:1]).argmax(1), margin=0.2)
    violation = float(fix.violation(model).detach())
    found = wp.edit(model, fix, Preconditioned(lr=1.0, metric=metric, radius=1e9, max_steps=1))
    assert abs(found.violation) < 1e-12 < violation
    least = wp.edit(model, fix, MinimumNorm(metric=metric))  # with one rival, the step is the least change
    for name, value in found.patch.result(model.state_dict()).items():
        assert torch.allclose(value, least.patch.result(model.state_dict())[name], atol=1e-9)


def test_the_trust_region_bounds_what_a_step_adds():
    model, x = head(), drawn(40, 6)
    metric = second_moments(model, x).metric(1e-9)
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 5, margin=50.0)
    before = model(x).detach()
    for radius in (0.01, 0.1):
        found = wp.edit(model, fix, Preconditioned(lr=1.0, metric=metric, radius=radius, max_steps=1))
        with found.patch.applied(model):
            added = (model(x) - before).square().sum(1).mean().sqrt()
        assert float(added) == pytest.approx(radius * float(before.square().sum(1).mean().sqrt()), rel=1e-6)


def test_a_layer_that_adds_nothing_yet_is_not_held_at_nothing():
    model, x = head(), drawn(40, 6)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    found = wp.edit(model, Classified(x[:1], torch.tensor([2]), margin=0.1), Preconditioned(metric=hand_made(model, x)))
    assert found.result is Result.satisfied


def test_a_drift_budget_refuses():
    model, x = head(), drawn(40, 6)
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 5, margin=5.0)
    found = wp.edit(model, fix, MinimumNorm(), keep=wp.Locality(x), max_drift=1e-6)
    assert found.result is Result.over_budget
    assert found.violation <= 0
    assert found.drift > 1e-6
    with pytest.raises(wp.errors.EditFailed, match="max_drift"):
        found.raise_for_result()
    assert wp.edit(model, fix, MinimumNorm(), keep=wp.Locality(x), max_drift=100.0).result is Result.satisfied
    for bad in ({"max_drift": 1.0}, {"max_drift": -1.0, "keep": wp.Locality(x)}):
        with pytest.raises(InvalidInput, match="max_drift"):
            wp.edit(model, fix, MinimumNorm(), **bad)


@pytest.mark.parametrize("way", [{}, {"graph_bytes": 0.0}], ids=["graph", "adjoint"])
def test_editable_training_goes_through_the_metric(way: dict):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = drawn(12, 4), torch.arange(12) % 3
    metric = second_moments(model, x, parameters="2.*").metric(0.1)
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 3, margin=0.5)
    editor = Preconditioned(lr=0.4, metric=metric, max_steps=3, radius=0.3)
    objective = wp.EditableObjective(model, editor, parameters="2.*", c_edit=0.7, c_loc=0.0, **way)

    def value() -> Tensor:
        return objective(fix, batch=(x, y))

    loss = value()
    assert loss.item() > F.cross_entropy(model(x), y).item()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), 5):
            kept, ends = float(flat[i]), []
            for step in (1e-6, -1e-6):
                flat[i] = kept + step
                ends.append(value().item())
            flat[i] = kept
            assert float(grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_regression_heads_are_solved_too():
    model, x = head(3), drawn(10, 6)
    fix = Within(x[:2], model(x[:2]).detach() + 1.0, tolerance=1e-4)
    assert wp.edit(model, fix, MinimumNorm()).result is Result.satisfied


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MinimumNorm(metric="C"), "expected a Metric or None"),
        (lambda: MinimumNorm(max_steps=0), "at least 1"),
        (lambda: MinimumNorm(radius=0.0), "above 0"),
        (lambda: Preconditioned(metric=None), "second_moments"),
        (lambda: Preconditioned(metric=hand_made(head(), drawn(9, 6)), radius=-1.0), "above 0"),
    ],
)
def test_bad_settings_are_refused(make, said: str):
    with pytest.raises(InvalidInput, match=said):
        make()
