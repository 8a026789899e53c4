"""Newton's method for the demands: against the exact editor, the textbook derivative and finite differences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import weightpatch as wp
from weightpatch.constraints import All, Classified, Constraint, Within
from weightpatch.editors import Bounded, GaussNewton, GradientDescent, Metric, MinimumNorm
from weightpatch.editors.base import direction
from weightpatch.errors import InvalidInput, NotEditable
from weightpatch.likelihoods import Categorical
from weightpatch.problem import Problem
from weightpatch.statistics import second_moments
from weightpatch.training import EditableObjective, Episode
from weightpatch.training.config import read_config
from weightpatch.training.unrolling import Adjoint, Unrolled

READOUT, INNER = ("4.weight", "4.bias"), ("2.weight", "2.bias")
EXACT = GaussNewton(max_steps=1, overshoot=0.0, damping=1e-10)


def network(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, classes))
    return nn.Sequential(*layers).double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(model: nn.Module, names: Sequence[str], *, two_sided: bool = False) -> Metric:
    x = drawn(80, 4, seed=9)
    moments = second_moments(model, x, parameters=tuple(names), likelihood=Categorical() if two_sided else None)
    return moments.metric(0.05, output_shrinkage=0.1 if two_sided else None)


def asked(model: nn.Module, n: int = 3, margin: float = 0.3, *, holding: bool = True) -> Classified:
    """Ask for the classes that come third, and of one more item for the class that it has."""
    x = drawn(n + 1, 4, seed=5)
    order = model(x).detach().argsort(1, descending=True)
    labels = torch.cat([order[:n, 2], order[n:, 0]])
    return Classified(x, labels, margin) if holding else Classified(x[:n], labels[:n], margin)


def problem_of(model: nn.Module, names: Sequence[str], fix: Constraint, leaves: dict[str, Tensor]) -> Problem:
    def at(params: dict[str, Tensor]):
        return lambda *x: functional_call(model, {**leaves, **params}, x)

    return Problem({name: leaves[name] for name in names}, at, fix)


def plain(model: nn.Module, names: Sequence[str], fix: Constraint) -> Problem:
    return problem_of(model, names, fix, {name: p.detach() for name, p in model.named_parameters()})


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.mark.parametrize("kind", ["no metric", "inputs", "both sides"])
@pytest.mark.parametrize("seed", range(4))
def test_at_a_readout_one_step_is_the_least_change(seed: int, kind: str):
    model = network(seed, classes=6)
    metric = None if kind == "no metric" else metric_of(model, READOUT, two_sided=kind == "both sides")
    problem = plain(model, READOUT, asked(model, margin=0.5))
    exact = MinimumNorm(metric=metric).run(problem)
    found = replace(EXACT, metric=metric).run(problem)
    assert exact.certificate is not None
    assert exact.certificate.affine
    assert found.steps == 1
    assert distance(exact.params, problem.start) > 1e-2
    assert distance(found.params, exact.params) < 1e-6
    assert problem.worst(found.params) < 1e-8  # what damping leaves
    assert problem.solved(GaussNewton(metric=metric).run(problem).params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_with_its_own_settings_it_is_as_long_as_the_least_change(seed: int, measured: bool, dtype: torch.dtype):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)
    x = torch.randn((1, 3, 8)[seed % 3], 8).to(dtype) * (100 if seed > 5 else 1)
    fix = Classified(x, (model(x).argmax(1) + torch.randint(1, 10, (len(x),))) % 10, 0.1)
    metric = second_moments(model, torch.randn(80, 8).to(dtype), parameters="2.*").metric(0.05) if measured else None
    problem = plain(model, ("2.weight", "2.bias"), fix)
    least = MinimumNorm(metric=metric).run(problem)
    assert least.certificate is not None and least.certificate.affine
    found = GaussNewton(metric=metric).run(problem)
    assert problem.solved(found.params)

    def size(params: dict[str, Tensor]) -> float:
        moved = {name: (value - problem.start[name]).double() for name, value in params.items()}
        squares = {n: v.square().sum() for n, v in moved.items()} if metric is None else metric.spreads(moved)
        return float(sum(squares.values())) ** 0.5

    assert size(found.params) == pytest.approx(size(least.params), rel=1e-4)


@pytest.mark.parametrize("metric", [False, True], ids=["no metric", "metric"])
def test_of_a_tall_readout_only_some_rows_move(metric: bool):
    torch.manual_seed(0)
    model = nn.Linear(5, 2000).double()
    fix = Classified(drawn(2, 5), torch.tensor([7, 1234]), 0.2)
    measured = second_moments(model, drawn(40, 5, seed=2)).metric(0.05) if metric else None
    problem = plain(model, ("weight", "bias"), fix)
    # Thousands of rivals: those of MinimumNorm's rounds join within the eight of a step, or in the next one.
    found = GaussNewton(metric=measured, max_steps=5, overshoot=0.0, damping=1e-10).run(problem)
    assert problem.solved(found.params)
    moved = (found.params["weight"] != problem.start["weight"]).any(1)
    assert 2 <= int(moved.sum()) < 200
    exact = MinimumNorm(metric=measured).run(problem)
    assert distance(found.params, exact.params) < 1e-6
    leaves = {name: value.clone().requires_grad_() for name, value in problem.start.items()}
    step = direction(EXACT, problem_of(model, leaves, fix, leaves), leaves, create_graph=True)
    assert step is not None
    assert distance({n: v.detach() for n, v in step.items()}, direction(EXACT, problem, leaves) or {}) < 1e-9


def textbook(editor: GaussNewton, problem: Problem, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Return θ + Δ of one step by the closed form over all rows that are active, with autograd through all of it."""
    rivals = torch.cat(
        [p.rivals.flatten() for p in problem.constraint.pieces(problem.at(params)) if p.rivals is not None]
    )
    rows, values = [], []
    for value in rivals[rivals.isfinite()]:
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        rows.append(dict(zip(params, grads, strict=True)))
        values.append(value + editor.overshoot * value.relu())
    flat = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
    applied = rows if editor.metric is None else [editor.metric.applied(row)[0] for row in rows]
    moves = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in applied])
    gram, right = flat @ moves.mT, torch.stack(values)
    multipliers = torch.zeros(len(right)).double()
    for _ in range(200_000):  # projected Gauss-Seidel on the dual
        before = multipliers.clone()
        for i in range(len(right)):
            rest = (right - gram @ multipliers).detach()[i] + gram.detach()[i, i] * multipliers[i]
            multipliers[i] = (rest / gram.detach()[i, i]).clamp_min(0)
        if float((before - multipliers).abs().max()) < 1e-14:
            break
    active = multipliers > 0
    weights = torch.linalg.solve(gram[active][:, active], right[active])
    change, found, first = weights @ moves[active], {}, 0
    for name, p in params.items():
        found[name] = p - change[first : first + p.numel()].view_as(p)
        first += p.numel()
    return found, int(active.sum())


@pytest.mark.parametrize("metric", [None, "inputs", "both sides"])
@pytest.mark.parametrize("names", [READOUT, INNER], ids=["readout", "inner"])
def test_the_derivative_is_that_of_the_closed_form(names: Sequence[str], metric: str | None):
    model = network()
    measured = None if metric is None else metric_of(model, names, two_sided=metric == "both sides")
    editor = replace(EXACT, metric=measured, overshoot=0.05)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    problem = problem_of(model, names, asked(model), leaves)
    probe = {name: drawn(*leaves[name].shape, seed=3) for name in names}
    bent = editor if names == INNER else EXACT  # at a readout no more than the demands is asked for
    expected, active = textbook(replace(bent, metric=measured), problem, problem.start)
    assert active >= 3
    total = torch.stack([(expected[name] * probe[name]).sum() for name in names]).sum()
    theirs = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)

    def outer(params: dict[str, Tensor]) -> Tensor:
        return torch.stack([(params[name] * probe[name]).sum() for name in names]).sum()

    for way in (Unrolled(), Adjoint()):
        found = way.gradient(editor, problem, outer, list(leaves.values()))
        assert found.steps == 1
        assert float(found.loss) == pytest.approx(float(total.detach()), rel=1e-7)
        for ours, other in zip(found.grads, theirs, strict=True):
            if other is not None:
                assert ours is not None
                assert torch.allclose(ours, other, rtol=1e-6, atol=1e-7)


CASES = {
    "readout": (READOUT, False, EXACT),
    "readout, metric": (READOUT, True, EXACT),
    "readout, damped": (READOUT, True, replace(EXACT, damping=0.1, overshoot=0.2)),
    "inner": (INNER, False, replace(EXACT, overshoot=0.1)),
    "inner, two steps": (INNER, False, replace(EXACT, max_steps=2, lr=0.6)),
    "inner, two steps, metric": (INNER, True, replace(EXACT, max_steps=2, lr=0.6)),
    "three layers": (("0.weight", *INNER, "4.weight"), False, replace(EXACT, max_steps=2, lr=0.7)),
}


@pytest.mark.parametrize(("names", "metric", "editor"), CASES.values(), ids=CASES)
def test_gradients_meet_finite_differences_both_ways(names: Sequence[str], metric: bool, editor: GaussNewton):
    model = network(seed=1)
    editor = replace(editor, metric=metric_of(model, names) if metric else None)
    fix, keep = asked(model), drawn(7, 4, seed=11)
    reference = model(keep).detach()

    def found(values: dict[str, Tensor], way: Unrolled | Adjoint):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        problem = problem_of(model, names, fix, leaves)

        def outer(params: dict[str, Tensor]) -> Tensor:
            after = problem.at(params)
            return (after(keep) - reference).square().sum() + problem.constraint.violation(after).square().sum()

        return way.gradient(editor, problem, outer, list(leaves.values()))

    start = {name: p.detach() for name, p in model.named_parameters()}
    one, two = found(start, Unrolled()), found(start, Adjoint())
    assert one.steps == two.steps == editor.max_steps
    for a, b in zip(one.grads, two.grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-8)
    for seed in (1, 2):
        way = {name: drawn(*value.shape, seed=seed + 20) for name, value in start.items()}
        pairs = zip(one.grads, way.values(), strict=True)
        along = sum(float((grad * way).sum()) for grad, way in pairs if grad is not None)
        step = 1e-6
        ends = [found({n: v + t * way[n] for n, v in start.items()}, Adjoint()).loss for t in (step, -step)]
        assert along == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=2e-5, abs=1e-7)


def test_a_demand_that_the_step_leaves_alone_has_no_part_in_it():
    model = network()
    x = drawn(2, 4, seed=5)
    order = model(x).detach().argsort(1, descending=True)
    fix, more = Classified(x[:1], order[:1, 1], 0.1), Classified(x[1:], order[1:, 0])
    found, without = (EXACT.run(plain(model, READOUT, f)) for f in (All((fix, more)), fix))
    assert distance(found.params, without.params) == 0
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    outcomes = []
    for some in (All((fix, more)), fix):
        problem = problem_of(model, READOUT, some, leaves)
        outcomes.append(
            Unrolled().gradient(EXACT, problem, lambda p: p["4.weight"].square().sum(), [leaves["4.weight"]])
        )
    assert torch.equal(outcomes[0].grads[0], outcomes[1].grads[0])


def test_a_demand_that_holds_joins_where_the_step_would_break_it():
    model = network()
    x = drawn(1, 4, seed=5)
    order = model(x).argsort(1, descending=True)[0]
    near = x + 0.3 * drawn(1, 4, seed=6)
    fix = All((Classified(x, order[1:2], 0.01), Classified(near, order[:1])))
    alone = EXACT.run(plain(model, READOUT, fix.parts[0]))
    both = EXACT.run(problem := plain(model, READOUT, fix))
    assert problem.worst(problem.start) == problem.violation(problem.start)[0]
    assert problem.violation(problem.start)[1] < 0 < problem.violation(alone.params)[1]
    assert problem.worst(both.params) < 1e-8
    assert distance(both.params, MinimumNorm().run(problem).params) < 1e-6


@pytest.mark.parametrize("way", [Unrolled(), Adjoint()], ids=["graph", "adjoint"])
def test_an_edit_that_holds_does_not_move(way: Unrolled | Adjoint):
    model = network()
    x = drawn(3, 4)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    problem = problem_of(model, READOUT, Classified(x, model(x).argmax(1)), leaves)
    found = way.gradient(GaussNewton(), problem, lambda params: params["4.bias"].sum(), [leaves["4.bias"]])
    assert found.steps == 0
    assert torch.equal(found.grads[0], torch.ones(4).double())


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "graph"])
def test_demands_that_contradict_each_other_are_met_half_way(create_graph: bool):
    model = nn.Linear(4, 2).double()
    x = drawn(1, 4)
    fix = All((Classified(x, torch.tensor([0]), 1.0), Classified(x, torch.tensor([1]), 1.0)))
    problem = plain(model, ("weight", "bias"), fix)
    params = {name: value.clone().requires_grad_() for name, value in problem.start.items()}
    for damping in (1e-6, 1e-15):
        step = direction(replace(EXACT, damping=damping), problem, params, create_graph=create_graph)
        assert step is not None
        moved = {name: value - step[name] for name, value in params.items()}
        assert torch.allclose(problem.violation(moved), torch.ones(2).double(), atol=1e-3)
        assert distance(moved, params) < 2


def test_demands_that_nearly_contradict_do_not_ask_for_absurd_steps():
    model = network()
    x = drawn(1, 4)
    near = x + 1e-9 * drawn(1, 4, seed=1)
    fix = All((Classified(x, torch.tensor([0]), 1.0), Classified(near, torch.tensor([1]), 1.0)))
    alone = [EXACT.run(p := plain(model, READOUT, part)) for part in fix.parts]
    size = max(distance(found.params, p.start) for found in alone)
    found = GaussNewton(max_steps=1).run(p := plain(model, READOUT, fix))
    assert 0 < distance(found.params, p.start) < 3 * size
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    p = problem_of(model, READOUT, fix, leaves)
    one = Unrolled().gradient(
        GaussNewton(max_steps=1), p, lambda params: params["4.weight"].sum(), list(leaves.values())
    )
    assert all(grad is None or float(grad.abs().max()) < 1e3 for grad in one.grads)


def test_a_demand_that_no_edit_changes_has_no_say():
    model = nn.Linear(4, 3, bias=False).double()
    x, zero = drawn(1, 4), torch.zeros(1, 4).double()
    wanted = model(x).argmin(1)
    problem = plain(model, ("weight",), Classified(torch.cat([x, zero]), torch.cat([wanted, wanted]), 0.5))
    found = EXACT.run(problem)
    violation = problem.violation(found.params)
    assert float(violation[0]) <= 0
    assert float(violation[1]) == 0.5
    stuck = EXACT.run(problem := plain(model, ("weight",), Classified(zero, wanted, 0.5)))
    assert distance(stuck.params, problem.start) == 0


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "graph"])
def test_an_infinite_gradient_ends_the_search(create_graph: bool):
    start = {"weight": torch.zeros(2, dtype=torch.float64, requires_grad=True)}

    def at(params: dict[str, Tensor]):
        return lambda x: torch.stack([params["weight"].abs().sqrt().sum() + x, x + 1]).T

    problem = Problem(start, at, Classified(torch.ones(1).double(), torch.tensor([0])))
    step = direction(EXACT, problem, start, create_graph=create_graph)
    assert step is not None
    assert step["weight"].isnan().all()
    assert GaussNewton().run(problem).steps == 1


def test_steps_converge_in_an_inner_layer_and_meet_distances():
    model = network()
    x = drawn(3, 4, seed=5)
    fix = Classified(x, model(x).argsort(1, descending=True)[:, 1], 0.3)
    found = GaussNewton(max_steps=20).run(problem := plain(model, INNER, fix))
    assert problem.solved(found.params)
    assert 1 < found.steps < 20
    x = drawn(2, 4, seed=3)
    targets = Within(x, model(x).detach() + 0.3, tolerance=1e-4)
    near = GaussNewton(max_steps=20).run(problem := plain(model, READOUT, targets))
    assert problem.solved(near.params)


def test_the_objective_goes_through_it_with_every_unrolling():
    model = network(seed=1)
    keep, also = wp.Locality(drawn(6, 4, seed=2)), drawn(3, 4, seed=7)
    fix = asked(model)
    x = drawn(1, 4, seed=8)
    episodes = [
        Episode(fix, Classified(also, fix.labels[:3])),
        Episode(Classified(x, model(x).argmax(1))),  # holds
    ]
    editor = GaussNewton(max_steps=2, lr=0.6, metric=metric_of(model, INNER))
    losses, grads = [], []
    for way in ({}, {"graph_bytes": 0.0}, {"replay": False}):
        objective = EditableObjective(model, editor, parameters="2.*", c_edit=0.3, c_loc=5.0, c_gen=0.2, **way)
        loss = objective(episodes, keep)
        losses.append(float(loss.detach()))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        assert objective.terms is not None
        assert objective.terms.steps == 1.0  # two, and none
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-9)
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert float(a.abs().max()) > 0
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_training_through_it_makes_edits_more_local():
    torch.manual_seed(0)
    layers = OrderedDict(code=nn.Linear(6, 24), act=nn.ReLU(), head=nn.Linear(24, 3))
    model = nn.Sequential(layers).double()
    x = drawn(64, 6, seed=1)
    objective = EditableObjective(
        model,
        GaussNewton(max_steps=1),
        parameters="head.weight",
        c_edit=1.0,
        c_loc=10.0,
        learn=("lr",),
        share_locality=False,
    )
    objective.rates.double()
    optimiser = torch.optim.Adam(model.code.parameters(), lr=2e-2)
    before = model(x).detach()

    def edits(step: int) -> list[Classified]:
        return [Classified(x[i : i + 1], torch.tensor([(i + step) % 3]), 0.1) for i in range(step % 8, 64, 8)]

    def drift() -> float:
        with torch.no_grad():
            objective([edit for step in (0, 1) for edit in edits(step)], wp.Locality(x))
        assert objective.terms is not None
        return objective.terms.locality

    untrained = drift()
    for step in range(40):
        optimiser.zero_grad()
        (objective(edits(step), wp.Locality(x)) + 10 * (model(x) - before).square().mean()).backward()
        optimiser.step()
    assert drift() < 0.85 * untrained
    assert all(rate.grad is not None and float(rate.grad.abs().max()) > 0 for rate in objective.rates.parameters())


def test_bounded_keeps_its_steps_near_the_start():
    model = network()
    problem = plain(model, READOUT, asked(model))
    found = Bounded(EXACT, radius=1e-3).run(problem)
    assert 0 < distance(found.params, problem.start) <= 1e-3 * (1 + 1e-12)
    free, gentle = Bounded(EXACT, radius=10.0).run(problem), Bounded(GradientDescent(lr=0.1), radius=10.0).run(problem)
    assert distance(free.params, EXACT.run(problem).params) == 0
    assert distance(gentle.params, GradientDescent(lr=0.1).run(problem).params) == 0


def test_a_config_names_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "a:b"\nsteps = 3\n[editor]\nname = "GaussNewton"\nmax_steps = 1\novershoot = 0.1\n')
    assert read_config(path).editor == GaussNewton(max_steps=1, overshoot=0.1)
    path.write_text('model = "a:b"\nsteps = 3\n[editor]\nname = "GaussNewton"\nkeep_weight = 1\n')
    with pytest.raises(InvalidInput, match="have no penalty: leave it out"):
        read_config(path)


def test_misuse_is_told():
    for settings, said in (
        ({"metric": 1.0}, "expected a Metric or None"),
        ({"overshoot": -0.1}, "expected a finite number, at least 0"),
        ({"damping": 0.0}, "expected a finite number above 0"),
        ({"weight_decay": 0.1}, "have no penalty"),
        ({"lr": -1.0}, "at least 0"),
    ):
        with pytest.raises(InvalidInput, match=said):
            GaussNewton(**settings)
    model = network()
    unread = plain(model, ("0.bias",), asked(model))
    unread = replace(unread, at=lambda params: lambda *x: model(*x).detach())
    with pytest.raises(NotEditable, match=r"does not depend on \['0.bias'\]"):
        GaussNewton().run(unread)
