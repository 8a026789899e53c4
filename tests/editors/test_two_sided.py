"""The metric of both sides, G Δ C, against dense matrices and an independent solver; and the line search along it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept
from weightpatch.editing import Result
from weightpatch.editors import Adam, Bounded, Metric, MinimumNorm, Preconditioned, Shrink
from weightpatch.editors import metric as metric_module
from weightpatch.editors.base import direction
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Categorical
from weightpatch.network import Network
from weightpatch.problem import Problem
from weightpatch.statistics import second_moments


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(classes: int = 5, width: int = 6) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, classes).double()


def both(model: nn.Module, x: Tensor, shrinkage: float = 0.05, output_shrinkage: float = 0.1) -> Metric:
    return second_moments(model, x, likelihood=Categorical()).metric(shrinkage, output_shrinkage=output_shrinkage)


def dense(metric: Metric, name: str = "weight") -> list[tuple[Tensor, Tensor]]:
    """Return G and C, shrunk, of each group, computed anew."""
    layer = metric.layers[name]
    found = []
    for fisher, second in zip(layer.fisher, layer.second, strict=True):
        pair = [(fisher, layer.output_shrinkage), (second, layer.shrinkage)]
        found.append(tuple(m + s * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype) for m, s in pair))
    return found


LAYERS = {
    "linear": (nn.Linear(5, 4), (30, 5)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2), (6, 6, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2), (6, 3, 11)),
}


class Pooled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.ndim == 2 else y.flatten(2).tanh().mean(2)


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_inverse_of_both_sides(name: str):
    layer, shape = LAYERS[name]
    model = Pooled(layer.double())
    metric = both(model, drawn(*shape))
    grads = {n: drawn(*p.shape, seed=2) for n, p in model.named_parameters()}
    moved, squares = metric.applied(grads)
    spreads = metric.spreads(moved)
    groups, rows = len(metric.layers["layer.weight"].second), len(layer.weight)

    def joined(part: dict[str, Tensor]) -> Tensor:
        parts = (part["layer.weight"].reshape(groups, rows // groups, -1), part["layer.bias"].view(groups, -1, 1))
        return torch.cat(parts, -1)

    square = spread = 0.0
    for g, d, (G, C) in zip(joined(grads), joined(moved), dense(metric, "layer.weight"), strict=True):
        assert torch.allclose(G @ d @ C, g, rtol=1e-8)
        square += float((g * d).sum())
        spread += float((d @ C * d).sum())
    assert float(squares["layer.weight"]) == pytest.approx(square, rel=1e-10)
    assert float(spreads["layer.weight"]) == pytest.approx(spread, rel=1e-10)
    alone, _ = metric.applied({"layer.weight": grads["layer.weight"]})
    assert not torch.allclose(alone["layer.weight"], moved["layer.weight"])  # without the bias, C is another one
    assert metric.two_sided
    assert "output_shrinkage=0.1" in repr(metric)


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_gradients_of_low_rank_take_the_short_way(rank: int):
    layer = nn.Linear(50, 40, bias=False).double()
    metric = both(layer, drawn(200, 50))
    gradient = drawn(40, rank, seed=1) @ drawn(rank, 50, seed=2)
    ((G, _),) = dense(metric)
    second = metric.layers["weight"].second[0, :-1, :-1]
    C = second + metric.layers["weight"].shrinkage * second.trace() / 50 * torch.eye(50, dtype=torch.float64)
    found = metric.applied({"weight": gradient})[0]["weight"]
    assert torch.allclose(found, torch.linalg.solve(G, gradient) @ torch.linalg.inv(C), rtol=1e-8)


def test_a_large_output_shrinkage_is_the_one_sided_metric():
    model, x = head(), drawn(60, 6)
    moments = second_moments(model, x, likelihood=Categorical())
    fix = Classified(x[:2], (model(x[:2]).argmax(1) + 1) % 5, margin=0.3)
    weights = []
    for metric in (moments.metric(0.05, output_shrinkage=math.inf), moments.metric(0.05, output_shrinkage=1e9)):
        patch = wp.edit(model, fix, MinimumNorm(metric=metric)).raise_for_result().patch
        weights.append(patch.result(model.state_dict())["weight"])
    assert torch.allclose(*weights, rtol=1e-7, atol=1e-10)
    two = wp.edit(model, fix, MinimumNorm(metric=moments.metric(0.05, output_shrinkage=0.01)))
    assert not torch.allclose(two.patch.result(model.state_dict())["weight"], weights[0], rtol=1e-3)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_at_a_readout_it_is_the_least_change_in_both(seed: int, n: int):
    model, x = head(4, 3), drawn(60, 3, seed=1)
    metric = both(model, x)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    fix = Classified(inputs, torch.randint(4, (n,), generator=generator), margin=0.2)
    found = wp.edit(model, fix, MinimumNorm(metric=metric))
    if found.result is not Result.satisfied:
        assert found.result in (Result.already_satisfied, Result.infeasible)
        return
    assert found.certificate is not None
    assert found.certificate.affine
    assert found.certificate.gap < 1e-7
    ((G, C),) = dense(metric)
    new = found.patch.result(model.state_dict())
    delta = torch.cat([new["weight"] - model.weight, (new["bias"] - model.bias)[:, None]], 1).detach()
    ours = float((G @ delta @ C * delta).sum())

    H = np.kron(G.numpy(), C.numpy())
    keys = torch.cat([inputs, torch.ones(n, 1)], 1).numpy()
    logits = model(inputs).detach().numpy()
    rows, right = [], []
    for i, label in enumerate(fix.labels.tolist()):
        for rival in set(range(4)) - {label}:
            row = np.zeros((4, 4))
            row[rival] += keys[i]
            row[label] -= keys[i]
            rows.append(row.reshape(-1))
            right.append(logits[i, rival] - logits[i, label] + fix.margin)
    J, b = np.stack(rows), np.array(right)
    root = np.linalg.cholesky(H)
    J = np.linalg.solve(root, J.T).T  # in z = rootᵀ δ, where the norm is Euclidean
    E = np.vstack([-J.T, b])  # min ||z||² s.t. -J z >= b, by Lawson and Hanson's transformation
    u, _ = nnls(E, np.concatenate([np.zeros(16), [1.0]]), maxiter=10000)
    r = E @ u - np.concatenate([np.zeros(16), [1.0]])
    z = -r[:-1] / r[-1]
    assert (J @ z + b).max() < 1e-8
    assert ours == pytest.approx(float(z @ z), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_inner_layers_are_repaired_jointly(name: str):
    case = next(case for case in zoo.CASES if case.name == name)
    model, x = case.model().eval(), case.inputs(24)
    metric = second_moments(model, x, likelihood=Categorical()).metric(output_shrinkage=0.1)
    top = model(x).argsort(1, descending=True)
    fix = Classified(x[:3], top[:3, 1], margin=0.05) & Kept(x[3:])
    weights = [n for n in metric.layers if n.startswith(case.parameters.rstrip("*"))]
    for editor in (MinimumNorm(metric=metric), Preconditioned(metric=metric, max_steps=200)):
        found = wp.edit(model, fix, editor, parameters=weights)
        assert found.result is Result.satisfied, (editor, found)


def test_the_trust_region_is_about_outputs():
    model, x = head(), drawn(40, 6)
    metric = both(model, x, shrinkage=1e-9)
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 5, margin=50.0)
    before = model(x).detach()
    for radius in (0.01, 0.1):
        found = wp.edit(model, fix, Preconditioned(lr=1.0, metric=metric, radius=radius, max_steps=1))
        with found.patch.applied(model):
            added = (model(x) - before).detach().square().sum(1).mean().sqrt()
        assert float(added) == pytest.approx(radius * float(before.square().sum(1).mean().sqrt()), rel=1e-6)


def steep(seed: int) -> tuple[nn.Module, Classified, Metric]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    x = drawn(40, 4, seed=seed)
    metric = second_moments(model, x, parameters="0.*").metric(0.01)
    return model, Classified(x[:3], (model(x[:3]).argmax(1) + 1) % 4, margin=0.3), metric


def losses(editor: Preconditioned, model: nn.Module, fix: Classified) -> list[float]:
    """Follow the search by hand; return the loss before each step and after the last."""
    network = Network(model, "0.*")
    problem = Problem(network.start, network.at, fix)
    params, found = network.start, []
    for _ in range(editor.max_steps):
        found.append(float(problem.violation(params).detach().relu().sum()))
        moving = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = direction(editor, problem, moving)
        if grads is None:
            break
        params, _ = editor.advanced(problem, params, grads, None)
    return found


@pytest.mark.parametrize(("lr", "least"), [(0.3, 10), (1.05, 1), (100.0, 1)], ids=["short", "Polyak", "long"])
def test_a_line_search_is_never_worse_than_the_plain_step_and_mends_bad_lengths(lr: float, least: int):
    better = 0
    for seed in range(12):
        model, fix, metric = steep(seed)
        plain = Preconditioned(lr=lr, metric=metric, radius=20.0, max_steps=2)
        first, *rest = losses(plain, model, fix)
        again, *searched = losses(replace(plain, line_search=8), model, fix)
        assert again == first
        after, found = (part[0] if part else 0.0 for part in (rest, searched))  # none where the edit is done
        assert found <= after * (1 + 1e-9)
        better += found < 0.99 * min(after, first)
        if first / 2 >= after:
            assert found == after  # long enough: it stays as it is
    assert better >= least


def test_a_line_search_tries_no_more_than_it_may_and_keeps_to_the_trust_region():
    model, fix, metric = steep(1)
    network, passes = Network(model, "0.*"), []

    def at(params: dict[str, Tensor]):
        passes.append(params)
        return network.at(params)

    problem = Problem(network.start, at, fix)
    for radius, tries in ((0.002, 8), (0.1, 2), (10.0, 5)):
        editor = Preconditioned(metric=metric, radius=radius, line_search=tries)
        grads = direction(editor, problem, {n: p.detach().requires_grad_() for n, p in network.start.items()})
        passes.clear()
        moved, _ = editor.advanced(problem, network.start, grads, None)
        assert len(passes) <= tries + 2  # where it is, the plain step, and what is tried
        plain, _ = editor.step(network.start, grads, None)
        lengths = []
        for end in (moved, plain):
            change = {n: (p - network.start[n]).detach() for n, p in end.items()}
            lengths.append(math.sqrt(sum(float(spread) for spread in metric.spreads(change).values())))
        allowed = radius * math.sqrt(metric.layers["0.weight"].power)
        assert lengths[0] <= max(allowed, lengths[1]) * (1 + 1e-9)
        ratio = math.log2(lengths[0] / lengths[1])
        assert ratio == pytest.approx(round(ratio), abs=1e-6)  # doubled or halved, some times


def test_a_line_search_expands_where_the_step_is_short():
    model, fix, metric = steep(0)
    assert len(losses(Preconditioned(lr=0.02, metric=metric, max_steps=30), model, fix)) == 30
    assert len(losses(Preconditioned(lr=0.02, metric=metric, max_steps=30, line_search=10), model, fix)) < 15


def test_without_any_better_length_the_plain_step_is_made():
    """Along a direction that leads away, every length is worse than none."""
    model, fix, metric = steep(2)
    network = Network(model, "0.*")
    problem = Problem(network.start, network.at, fix)
    editor = Preconditioned(metric=metric, line_search=4)
    grads = direction(editor, problem, {n: p.detach().requires_grad_() for n, p in network.start.items()})
    away = {name: -1e-3 * grad for name, grad in grads.items()}
    moved, _ = editor.advanced(problem, network.start, away, None)
    plain, _ = editor.step(network.start, away, None)
    assert all(torch.equal(moved[name], plain[name]) for name in plain)
    assert problem.violation(plain).relu().sum() > problem.violation(network.start).relu().sum()


def test_searched_edits_hold_and_wrap():
    model, fix, metric = steep(3)
    editor = Preconditioned(metric=metric, max_steps=60, line_search=6)
    for wrapped in (editor, Shrink(editor), Bounded(editor, radius=5.0)):
        assert wp.edit(model, fix, wrapped, parameters="0.*").result is Result.satisfied
    tight = wp.edit(model, fix, Bounded(editor, radius=1e-4), parameters="0.*")
    for name, value in tight.patch.result(model.state_dict()).items():
        assert float((value - model.get_parameter(name)).abs().max()) <= 1e-4 * (1 + 1e-9)
    again = wp.edit(model, fix, editor, parameters="0.*").patch.id
    assert wp.edit(model, fix, editor, parameters="0.*").patch.id == again


def test_training_takes_plain_steps_alone():
    model, _, metric = steep(0)
    searching = Preconditioned(metric=metric, line_search=3)
    for editor in (searching, Bounded(searching, radius=1.0)):
        with pytest.raises(InvalidInput, match="line_search=0"):
            wp.EditableObjective(model, editor, parameters="0.*")
    for editor in (Preconditioned(metric=metric), Bounded(Preconditioned(metric=metric), radius=1.0), Adam(lr=1e-3)):
        assert editor.differentiable
        wp.EditableObjective(model, editor, parameters="0.*")


@pytest.mark.parametrize("way", [{}, {"graph_bytes": 0.0}], ids=["graph", "adjoint"])
def test_editable_training_goes_through_both_sides(way: dict):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = drawn(12, 4), torch.arange(12) % 3
    metric = second_moments(model, x, parameters="2.*", likelihood=Categorical()).metric(0.1, output_shrinkage=0.2)
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 3, margin=0.5)
    editor = Preconditioned(lr=0.4, metric=metric, max_steps=3, radius=0.3)
    objective = wp.EditableObjective(model, editor, parameters="2.*", c_edit=0.7, c_loc=0.0, **way)

    def value() -> Tensor:
        return objective(fix, batch=(x, y))

    grads = torch.autograd.grad(value(), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), 5):
            kept, ends = float(flat[i]), []
            for step in (1e-6, -1e-6):
                flat[i] = kept + step
                ends.append(value().item())
            flat[i] = kept
            assert float(grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("given_", [-1, 1.5, None])
def test_bad_settings_are_refused(given_: object):
    with pytest.raises(InvalidInput, match="at least 0"):
        Preconditioned(metric=steep(0)[2], line_search=given_)  # type: ignore[arg-type]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 8, 30, 100, 160, 256])
def test_gradients_of_some_tokens_are_applied_by_a_basis_of_their_rows(rank: int, two_sided: bool):
    rows, width = 256, 1024
    seeded = torch.Generator().manual_seed(rank)
    left, right = torch.randn(rows, rank, generator=seeded), torch.randn(rank, width, generator=seeded)
    gradient, eps = (left @ right).double()[None], torch.finfo(torch.float32).eps
    inverse = torch.randn(1, width, width, generator=seeded, dtype=torch.float64)
    output = torch.randn(1, rows, rows, generator=seeded, dtype=torch.float64) if two_sided else None
    exact = gradient @ inverse if output is None else output @ gradient @ inverse
    found = metric_module._times(gradient, inverse, eps, output)
    assert float((found - exact).norm()) <= 64 * eps * float(exact.norm())
    bases = [metric_module._basis(gradient, most, eps) for most in (8, 128)]
    assert [basis is not None for basis in bases] == [rank <= 8, rank <= 128]
    assert all(basis is None or rank <= basis.shape[-1] <= max(1, 2 * rank) for basis in bases)
    if rank > 128:
        assert torch.equal(found, exact)
