"""Readouts of tens of thousands of classes: few rivals matter, few rows change, nothing of that size is solved."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Within
from weightpatch.editing import Result
from weightpatch.editors import Metric, MinimumNorm, _cuts
from weightpatch.editors._vectors import Space
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Categorical
from weightpatch.patches.operations import Full, LowRank
from weightpatch.statistics import second_moments

CLASSES, WIDTH, DEMANDS = 20_000, 24, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Reader(nn.Module):
    """A made-up language model's end: hidden states, and a readout over a vocabulary."""

    def __init__(self, classes: int = CLASSES, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(10, WIDTH), nn.Linear(WIDTH, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).tanh())


def demands(model: nn.Module, classes: int = CLASSES) -> Classified:
    labels = torch.randint(classes, (DEMANDS,), generator=torch.Generator().manual_seed(7))
    return Classified(drawn(DEMANDS, 10, seed=3), labels, margin=0.2)


def measured(model: nn.Module) -> Metric:
    return second_moments(model, drawn(500, 10, seed=1), parameters="head.*").metric(0.02)


def reduced(model: Reader, fix: Classified, C: Tensor, rivals: int) -> tuple[float, Tensor]:
    """Return the least norm's square and the logits there, with the `rivals` nearest rivals of each demand alone."""
    with torch.no_grad():
        hidden, logits = model.hidden(fix.inputs).tanh(), model(fix.inputs)
    keys = torch.cat([hidden, torch.ones(DEMANDS, 1)], 1)
    inner = (keys @ torch.linalg.solve(C, keys.T)).numpy()
    pairs = [
        (i, rival, label)
        for i, label in enumerate(fix.labels.tolist())
        for rival in logits[i].topk(rivals).indices.tolist()
        if rival != label
    ]
    signs = np.zeros((len(pairs), CLASSES))
    for row, (_, rival, label) in enumerate(pairs):
        signs[row, rival], signs[row, label] = 1.0, -1.0
    where = [i for i, _, _ in pairs]
    A = inner[np.ix_(where, where)] * (signs @ signs.T)  # J C⁻¹ Jᵀ, of rows (e_rival - e_label) keyᵀ
    b = np.array([float(logits[i, rival] - logits[i, label]) + fix.margin for i, rival, label in pairs])
    factor = np.linalg.cholesky(A + 1e-13 * np.trace(A) * np.eye(len(A)))
    u, _ = nnls(np.vstack([factor.T, b]), np.concatenate([np.zeros(len(A)), [1.0]]), maxiter=100_000)
    multipliers = u / (1 - b @ u)
    moved = torch.zeros(DEMANDS, CLASSES, dtype=torch.float64)
    for (i, rival, label), weight in zip(pairs, multipliers, strict=True):
        step = weight * torch.from_numpy(inner[:, i])
        moved[:, rival] -= step
        moved[:, label] += step
    return float(multipliers @ A @ multipliers), logits + moved


def test_of_twenty_thousand_classes_few_rivals_are_added_and_few_rows_change(monkeypatch: pytest.MonkeyPatch):
    model = Reader().double()
    fix, metric = demands(model), measured(model)
    sizes: list[int] = []
    solve = _cuts.least_norm

    def noted(A: Tensor, b: Tensor, balls: object = ()) -> object:
        sizes.append(len(b))
        return solve(A, b, balls)

    monkeypatch.setattr(_cuts, "least_norm", noted)
    found = wp.edit(model, fix, MinimumNorm(metric=metric), parameters="head.*")
    assert found.result is Result.satisfied
    assert found.certificate is not None
    assert found.certificate.affine
    assert found.certificate.gap < 1e-8
    assert max(sizes) < 30 * DEMANDS  # of 6 · 19,999 that there are

    second = metric.layers["head.weight"].second[0]
    C = second + 0.02 * second.trace() / len(second) * torch.eye(len(second), dtype=torch.float64)
    expected, logits = reduced(model, fix, C, rivals=60)
    rivals = logits.scatter(1, fix.labels[:, None], -torch.inf).amax(1)
    assert float((rivals - logits.gather(1, fix.labels[:, None])[:, 0]).max()) <= -0.2 + 1e-7  # none was left out
    new = found.patch.result(model.state_dict())
    delta = torch.cat(
        [new["head.weight"] - model.head.weight, (new["head.bias"] - model.head.bias)[:, None]], 1
    ).detach()
    assert float((delta @ C * delta).sum()) == pytest.approx(expected, rel=1e-6)

    touched = delta.any(1)
    assert int(touched.sum()) < 20 * DEMANDS
    assert found.patch.nbytes < 20 * DEMANDS * (WIDTH + 1) * 9 < 0.01 * model.head.weight.nbytes
    assert torch.linalg.matrix_rank(delta[touched]) <= DEMANDS


@pytest.mark.parametrize("bias", [True, False])
def test_in_float32_it_holds_and_is_small(bias: bool, tmp_path):
    model = Reader(bias=bias)
    fix = Classified(drawn(DEMANDS, 10, seed=3).float(), demands(model).labels, margin=0.1)
    found = wp.edit(model, fix, MinimumNorm(), parameters="head.*")
    assert found.result is Result.satisfied
    assert not any(isinstance(operation, (Full, LowRank)) for operation in found.patch.operations.values())
    found.patch.save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 60_000
    assert found.patch.nbytes < 0.02 * model.head.weight.nbytes


def test_memory_is_that_of_a_few_copies():
    """Of the readout, not of one for each demand and round."""
    model = Reader(60_000)
    fix = Classified(drawn(DEMANDS, 10, seed=3).float(), demands(model, 60_000).labels, margin=0.1)
    network = wp.network.Network(model, "head.weight")
    problem = wp.problem.Problem(network.start, network.at, fix)
    alive: list[int] = []
    linearise = wp.editors.minimum_norm._Search.linearise

    def noted(search: object, **told: bool) -> bool:
        more = linearise(search, **told)
        cuts = search._cuts
        alive.append(sum(vector.values.nbytes for vector in (*cuts._rows, *cuts._moves)))
        return more

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wp.editors.minimum_norm._Search, "linearise", noted)
        found = MinimumNorm().run(problem)
    assert problem.solved(found.params)
    assert max(alive) < 0.2 * model.head.weight.nbytes


class TiedReader(nn.Module):
    """The readout's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(2000, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens).mean(1)).tanh())


def test_a_tied_readout_is_edited_as_what_it_is_or_untied_first():
    model = TiedReader().double()
    tokens = torch.randint(2000, (3, 4), generator=torch.Generator().manual_seed(1))
    fix = Classified(tokens, torch.tensor([5, 700, 1999]), margin=0.1)
    with pytest.warns(UserWarning, match="one tied parameter: both places change"):
        tied = wp.edit(model, fix, MinimumNorm(), parameters="head.*")
    assert tied.result is Result.satisfied
    assert tied.certificate is not None
    assert not tied.certificate.affine  # what the answers depend on twice, they are not affine in
    assert [(entry.name, entry.also) for entry in tied.patch.manifest.tensors] == [("embed.weight", ("head.weight",))]
    with tied.patch.applied(model):
        assert fix.satisfied(model)
        assert model.head.weight is model.embed.weight
    assert tied.patch.nbytes < 0.1 * model.embed.weight.nbytes

    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    before = model.embed.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = wp.edit(model, fix, MinimumNorm(), parameters="head.*")
    assert free.result is Result.satisfied
    assert free.certificate is not None
    assert free.certificate.affine
    with free.patch.applied(model):
        assert torch.equal(model.embed.weight, before)
    assert free.patch.nbytes < 0.05 * model.head.weight.nbytes


def test_the_outputs_of_a_vocabulary_have_no_moments():
    with pytest.raises(InvalidInput, match="20000 outputs"):
        second_moments(Reader(), drawn(3, 10).float(), parameters="head.*", likelihood=Categorical())


def test_a_wide_regression_changes_the_rows_that_are_asked_about():
    model = Reader(2000).double()

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[:, [3, 1500]]

    some, x = Some(), drawn(2, 10, seed=3)
    found = wp.edit(some, Within(x, some(x).detach() + 1.0, 1e-16), MinimumNorm(), parameters="model.head.*")
    assert found.result is Result.satisfied
    assert found.certificate is not None
    assert found.certificate.affine
    change = found.patch.result(some.state_dict())["model.head.weight"] - model.head.weight
    assert change.detach().any(1).nonzero().squeeze(1).tolist() == [3, 1500]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from(["none", "few", "most", "all"]), min_size=6, max_size=6))
def test_vectors_with_few_rows_are_those_with_all(seed: int, kinds: list[str]):
    generator = torch.Generator().manual_seed(seed)
    start = {"w": torch.randn(1100, 3, generator=generator), "b": torch.randn(1100, generator=generator)}
    start["small"] = torch.randn(5, 2, generator=generator)
    space = Space(start)
    metric = second_moments(nn.Linear(3, 1100), torch.randn(20, 3, generator=generator)).metric()
    metric = Metric(
        {
            "w": metric.layers["weight"].__class__(
                "w", "b", *(getattr(metric.layers["weight"], n) for n in ("second", "power"))
            )
        }
    )
    shares = {"none": 0.0, "few": 0.004, "most": 0.8, "all": 1.0}

    def flat(parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1).double() for part in parts.values()])

    vectors, whole = [], []
    for one, two in zip(kinds[::2], kinds[1::2], strict=True):
        grads = {}
        for (name, value), kind in zip(start.items(), (one, two, "all"), strict=True):
            kept = torch.rand(len(value), generator=generator) < shares[kind]
            grads[name] = torch.randn(value.shape, generator=generator) * kept.view(-1, *[1] * (value.ndim - 1))
        vectors.append(
            space.vector(
                [
                    None if kind == "none" and name == "w" else grads[name]
                    for name, kind in zip(grads, (one, two, "all"), strict=True)
                ]
            )
        )
        whole.append(flat(grads))
    for a, wa in zip(vectors, whole, strict=True):
        assert torch.equal(flat(space.shaped(a)), wa)
        for b, wb in zip(vectors, whole, strict=True):
            assert float(space.dot(a, b)) == pytest.approx(float(wa @ wb), rel=1e-12, abs=1e-12)
    weights = (0.5, -2.0, 3.0)
    together = space.combined(weights, vectors)
    expected = sum(weight * part for weight, part in zip(weights, whole, strict=True))
    assert torch.allclose(flat(space.shaped(together)), expected, rtol=1e-14)
    moved = space.moved(together)
    assert torch.equal(flat(moved), (flat(start) + flat(space.shaped(together))).float().double())
    zero = space.zero()
    assert float(space.dot(zero, together)) == 0
    assert torch.allclose(flat(space.shaped(space.combined((1.0, 1.0), (zero, together)))), expected, rtol=1e-14)

    part = Space({name: start[name] for name in ("w", "b")})
    for one, two in zip(kinds[::2], kinds[1::2], strict=True):
        grads = [torch.randn(1100, 3, generator=generator), torch.randn(1100, generator=generator)]
        for grad, kind in zip(grads, (one, two), strict=True):
            grad[torch.rand(1100, generator=generator) >= shares[kind]] = 0
        row = part.vector(grads)
        found = part.shaped(part.applied(metric, row, 1e-7))
        plain, _ = metric.applied({"w": grads[0].double(), "b": grads[1].double()})
        for name in plain:
            assert torch.allclose(found[name], plain[name], rtol=1e-9, atol=1e-12)
