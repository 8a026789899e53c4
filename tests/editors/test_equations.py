"""Regression heads, edited exactly: equations and balls, against independent solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import All, Classified, Constraint, Piece, Within
from weightpatch.editing import Result
from weightpatch.editors import MinimumNorm, Preconditioned
from weightpatch.editors._dual import Ball, least_norm
from weightpatch.editors.base import Solution
from weightpatch.errors import ConflictingConstraints
from weightpatch.network import Network
from weightpatch.problem import Problem
from weightpatch.statistics import second_moments


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(outputs: int = 3, width: int = 6) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, outputs).double()


def solved(model: nn.Module, constraint: Constraint, editor: MinimumNorm, parameters: str = "*") -> Solution:
    network = Network(model, parameters)
    return editor.run(Problem(network.start, network.at, constraint))


def change(model: nn.Linear, found: Solution) -> Tensor:
    """Return Δ with the bias as its last column."""
    weight, bias = (found.params[n] - getattr(model, n).detach() for n in ("weight", "bias"))
    return torch.cat([weight, bias[:, None]], 1)


def least(model: nn.Linear, C: Tensor, within: Within, classified: Classified | None = None) -> float:
    """Return the least tr(Δ C Δᵀ) by a solver for general problems."""
    outputs, width = model.weight.shape
    root = np.linalg.cholesky(C.numpy())

    def keys(inputs: Tensor) -> np.ndarray:
        return np.linalg.solve(root, torch.cat([inputs, torch.ones(len(inputs), 1)], 1).numpy().T).T

    seen, targets = keys(within.inputs), (within.targets - model(within.inputs)).detach().numpy()

    def rest(z: np.ndarray) -> np.ndarray:
        return seen @ z.reshape(outputs, -1).T - targets

    demands = []
    size = outputs * (width + 1)
    if within.tolerance == 0:
        slope = np.stack([np.kron(np.eye(outputs)[j], seen[i]) for i in range(len(seen)) for j in range(outputs)])
        demands.append({"type": "eq", "fun": lambda z: rest(z).reshape(-1), "jac": lambda z: slope})
    else:
        demands += [
            {
                "type": "ineq",
                "fun": lambda z, i=i: within.tolerance - float(rest(z)[i] @ rest(z)[i]),
                "jac": lambda z, i=i: -2 * np.kron(rest(z)[i], seen[i]),
            }
            for i in range(len(seen))
        ]
    if classified is not None:
        logits, own = model(classified.inputs).detach().numpy(), keys(classified.inputs)
        for i, label in enumerate(classified.labels.tolist()):
            for rival in set(range(outputs)) - {label}:
                row = np.kron(np.eye(outputs)[rival] - np.eye(outputs)[label], own[i])
                b = logits[i, rival] - logits[i, label] + classified.margin
                demands.append(
                    {"type": "ineq", "fun": lambda z, row=row, b=b: -(row @ z + b), "jac": lambda z, row=row: -row}
                )
    found = minimize(
        lambda z: 0.5 * z @ z,
        np.zeros(size),
        jac=lambda z: z,
        constraints=demands,
        options={"maxiter": 2000, "ftol": 1e-14},
        method="SLSQP",
    )
    assert found.status in (0, 8), found.message  # 8: no way is down any more
    for demand in demands:
        missed = np.abs(demand["fun"](found.x)) if demand["type"] == "eq" else -demand["fun"](found.x)
        assert np.max(missed) < 1e-8
    return 2 * float(found.fun)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([0.0, 1e-6, 0.01, 0.3]), st.booleans())
def test_at_a_readout_targets_are_met_by_the_least_change(seed: int, n: int, tolerance: float, rivals: bool):
    model, reference = head(), drawn(60, 6, seed=1)
    metric = second_moments(model, reference).metric(0.05)
    x = drawn(n, 6, seed=seed)
    within = Within(x, model(x).detach() + drawn(n, 3, seed=seed + 1), tolerance)
    other = drawn(1, 6, seed=seed + 2)
    classified = Classified(other, (model(other).argmax(1) + 1) % 3, 0.2) if rivals else None
    found = solved(model, within if classified is None else within & classified, MinimumNorm(metric=metric))
    certificate = found.certificate
    assert certificate is not None
    assert certificate.affine
    assert certificate.gap < 1e-7
    assert (certificate.multipliers >= 0).all()
    assert certificate.infeasible == ()
    second = metric.layers["weight"].second[0]
    C = second + 0.05 * second.trace() / 7 * torch.eye(7, dtype=torch.float64)
    delta = change(model, found)
    reached = torch.func.functional_call(model, found.params, x)
    assert float((reached - within.targets).norm(dim=1).max()) <= math.sqrt(tolerance) + 1e-9
    assert float((delta @ C * delta).sum()) == pytest.approx(least(model, C, within, classified), rel=1e-6, abs=1e-10)


def test_equations_have_a_closed_form():
    model, x = head(3, 8), drawn(4, 8, seed=5)
    y = model(x).detach() + drawn(4, 3, seed=6)
    found = solved(model, Within(x, y, 0.0), MinimumNorm())
    keys = torch.cat([x, torch.ones(4, 1)], 1)
    expected = torch.linalg.pinv(keys) @ (y - model(x).detach())  # the least-norm solution of keys Δᵀ = what is missing
    assert torch.allclose(change(model, found), expected.T, rtol=1e-9, atol=1e-12)
    assert found.steps <= 2


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.0, 1e-4, 0.5])
)
def test_the_dual_meets_a_general_solver_or_shows_a_contradiction(seed: int, m: int, count: int, k: int, radius: float):
    width = 2 + seed % 8
    J, b = drawn(m + count * k, width, seed=seed), 3 * drawn(m + count * k, seed=seed + 1)
    balls = [Ball(torch.arange(m + i * k, m + (i + 1) * k), radius * (1 + i)) for i in range(count)]
    found = least_norm(J @ J.T, b, balls)
    part = found.multipliers
    assert (part[:m] >= 0).all()
    if not found.feasible:  # no Δ that is not absurdly long meets all: Σ λ (b + J Δ) - Σ ρ ||λ|| stays above 0
        beyond = float(b @ part) - sum(r * float(part[places].norm()) for places, r in balls)
        assert float((J.T @ part).norm()) < 1e-3 * beyond
        return
    delta = -J.T @ part
    rest = J @ delta + b
    beyond = [float(rest[:m].max())] if m else []
    beyond += [float(rest[places].norm()) - r for places, r in balls]
    if max(beyond) > 1e-6:  # on the edge of a contradiction, where nothing is claimed
        assert max(beyond) < 0.1
        return
    Jn, bn = J.numpy(), b.numpy()
    demands = [{"type": "ineq", "fun": lambda d: -(Jn[:m] @ d + bn[:m]), "jac": lambda d: -Jn[:m]}] if m else []
    for places, r in balls:
        rows, right = Jn[places.numpy()], bn[places.numpy()]
        if r == 0:
            fun = {"type": "eq", "fun": lambda d, R=rows, c=right: R @ d + c, "jac": lambda d, R=rows: R}
        else:
            fun = {
                "type": "ineq",
                "fun": lambda d, R=rows, c=right, r=r: r * r - float((R @ d + c) @ (R @ d + c)),
                "jac": lambda d, R=rows, c=right: -2 * (R @ d + c) @ R,
            }
        demands.append(fun)
    other = minimize(
        lambda d: 0.5 * d @ d,
        delta.numpy() * 1.1,
        jac=lambda d: d,
        constraints=demands,
        options={"maxiter": 2000, "ftol": 1e-16},
        method="SLSQP",
    )
    if other.success:
        assert 0.5 * float(delta @ delta) == pytest.approx(other.fun, rel=1e-6, abs=1e-7)


class Numbered(nn.Module):
    """Items have a number that nothing looks at: the same features may be asked for two targets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs[:, :-1])


def test_contradicting_targets_are_named():
    model, x = Numbered(head()), drawn(2, 6, seed=4)
    inputs = torch.cat([drawn(1, 6, seed=9), x[:1], x[:1], x[1:]])
    inputs = torch.cat([inputs, torch.arange(4).to(inputs)[:, None]], 1)
    targets = model(inputs).detach() + 0.1 * drawn(4, 3, seed=8)
    targets[2] = targets[1] + 1.0  # one input, two targets
    for tolerance in (1e-12, 1e-4):
        found = wp.edit(model, Within(inputs, targets, tolerance), MinimumNorm())
        assert found.result is Result.infeasible
        assert found.certificate is not None
        assert found.certificate.infeasible == (1, 2)
    wide = wp.edit(model, Within(inputs, targets, 0.8), MinimumNorm())  # √0.8 > √3 / 2: the balls meet
    assert wide.result is Result.satisfied
    with pytest.raises(ConflictingConstraints, match="demands 0 and 1 ask the same input to be within"):
        wp.edit(model, Within(inputs[[1, 1]], targets[1:3], 0.1), MinimumNorm())


def test_a_class_that_the_targets_deny_is_named():
    model, x = head(), drawn(2, 6, seed=4)
    targets = model(x).detach() + drawn(2, 3, seed=8)
    denied = Classified(x[1:], targets[1:].argmin(1), 0.1)
    found = wp.edit(model, Within(x, targets, 1e-12) & denied, MinimumNorm())
    assert found.result is Result.infeasible
    assert found.certificate is not None
    assert found.certificate.infeasible == (1, 2)
    granted = Classified(x[1:], targets[1:].argmax(1))
    assert wp.edit(model, Within(x, targets, 1e-12) & granted, MinimumNorm()).result is Result.satisfied


def test_one_input_may_be_asked_twice():
    model, x = head(), drawn(2, 6, seed=4)
    y = model(x).detach() + 1.0
    found = wp.edit(model, Within(torch.cat([x, x]), torch.cat([y, y]), 1e-16), MinimumNorm())
    assert found.result is Result.satisfied
    once = wp.edit(model, Within(x, y, 1e-16), MinimumNorm())
    for name, value in once.patch.result(model.state_dict()).items():
        assert torch.allclose(found.patch.result(model.state_dict())[name], value, atol=1e-9)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_what_rounding_leaves_is_what_is_said(dtype: torch.dtype, relative: float):
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Linear(256, 4).to(dtype)
        x = drawn(3, 256, seed=seed).to(dtype)
        scale = 10.0 ** (seed % 3)
        y = scale * drawn(3, 4, seed=seed + 100).float()
        size = float(y.norm(dim=1).max())
        reached = wp.edit(model, Within(x, y, (relative * size) ** 2), MinimumNorm())
        assert reached.result is Result.satisfied, (seed, reached)
    exact = wp.edit(model, Within(x, y, 0.0), MinimumNorm())
    assert exact.result is (Result.satisfied if exact.violation <= 0 else Result.unsatisfied)
    assert exact.violation <= (relative * size) ** 2


def test_a_residual_that_rounding_leaves_is_refined_away():
    """Just above what float32 can do, the first answer misses in some cases, and the rounds after it do not."""
    rounds = []
    for seed in range(30):
        torch.manual_seed(seed)
        model, x = nn.Linear(512, 2), drawn(2, 512, seed=seed).float()
        found = wp.edit(model, Within(x, drawn(2, 2, seed=seed + 50).float(), 1e-13), MinimumNorm(max_steps=30))
        assert found.result is Result.satisfied
        rounds.append(found.steps)
    assert 1 in rounds
    assert max(rounds) > 1


def test_inner_layers_are_repaired_to_targets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = drawn(5, 4)
    metric = second_moments(model, drawn(50, 4, seed=2)).metric(0.05)
    fix = Within(x, model(x).detach() + 0.3 * drawn(5, 3, seed=3), 1e-10)
    found = wp.edit(model, fix, MinimumNorm(metric=metric), parameters="0.*")
    assert found.result is Result.satisfied
    assert found.certificate is not None
    assert not found.certificate.affine
    assert found.steps < 15  # as Newton's method does; halving the distance in each round takes more


def test_many_outputs_fall_back_to_the_distance_as_one_number():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 300).double(), drawn(1, 6)
    fix = Within(x, model(x).detach() + 0.1, 0.5)
    assert float(fix.violation(model).detach()) > 0
    found = wp.edit(model, fix, MinimumNorm())
    assert found.result is Result.satisfied
    few = nn.Linear(6, 200).double()
    fix = Within(x, few(x).detach() + 0.1, 0.5)
    assert wp.edit(few, fix, MinimumNorm()).steps <= 1


def test_pieces_say_what_violation_says():
    model, x = head(), drawn(7, 6)
    top = model(x).argmax(1)
    fix = All((Within(x[:3], drawn(3, 3), 0.2), Classified(x[3:], (top[3:] + 1) % 3, 0.1)))
    pieces = fix.pieces(model)
    assert torch.equal(torch.cat([piece.violation for piece in pieces]), fix.violation(model))
    ball, classes = pieces
    assert torch.allclose(ball.residual.square().sum(1) - ball.radius**2, ball.violation)
    assert torch.allclose(classes.rivals.amax(1), classes.violation)
    tie = Classified(torch.zeros(1, 6, dtype=torch.float64), torch.tensor([0]))
    with torch.no_grad():
        flat = nn.Linear(6, 3, bias=False).double()
    assert float(tie.pieces(flat)[0].violation.detach()) > 0  # a tie is not met

    class Own(Constraint):
        def violation(self, function: object) -> Tensor:
            return torch.ones(2)

    assert [type(piece) for piece in Own().pieces(model)] == [Piece]


def test_other_editors_reach_targets_too():
    model, x = head(), drawn(3, 6)
    metric = second_moments(model, drawn(40, 6, seed=1)).metric()
    fix = Within(x, model(x).detach() + 1.0, 1e-4)
    assert wp.edit(model, fix, Preconditioned(metric=metric, max_steps=200)).result is Result.satisfied
