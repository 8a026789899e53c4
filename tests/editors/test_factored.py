"""Vectors that hold gradients of low rank as factors are those that hold every number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Constraint, Within
from weightpatch.editors import MinimumNorm, minimum_norm
from weightpatch.editors._factors import Factors, factors_of
from weightpatch.editors._vectors import Space
from weightpatch.editors.metric import Metric
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Categorical
from weightpatch.statistics import second_moments

OUT, IN, TALL = 64, 300, 1100
KINDS = {"nothing": None, "zero": 0, "one": 1, "three": 3, "all": OUT}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, rows: int = OUT, columns: int = IN, seed: int = 0) -> Tensor:
    return drawn(rows, rank, seed=seed) @ drawn(rank, columns, seed=seed + 1)


def readout(rows: Tensor | None, seed: int) -> Tensor:
    """Return the gradient of a tall weight: some rows of it, or a product with all."""
    if rows is None:
        return of_rank(1, TALL, 40, seed)
    return torch.zeros(TALL, 40, dtype=torch.float64).index_copy(0, rows, drawn(len(rows), 40, seed=seed))


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1).double() for part in parts.values()])


def moments(two_sided: bool = False, bias: bool = True) -> Metric:
    model = nn.Linear(IN, OUT, bias=bias).double()
    return second_moments(model, drawn(50, IN), likelihood=Categorical() if two_sided else None).metric(
        0.01, output_shrinkage=0.1 if two_sided else None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 8])
def test_a_matrix_of_low_rank_is_found_to_be_one(rank: int, dtype: torch.dtype):
    matrix = of_rank(rank).to(dtype)
    found = factors_of(matrix)
    assert found is not None
    assert found.left.shape == (rank, OUT)
    assert found.right.shape == (rank, IN)
    assert found.left.dtype == torch.float64
    distance = float((found.whole() - matrix.double()).norm())
    assert distance <= 8 * torch.finfo(dtype).eps * float(matrix.norm())
    assert found.square == pytest.approx(float(matrix.double().square().sum()), rel=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_matrices_are_not(dtype: torch.dtype):
    assert factors_of(of_rank(9).to(dtype)) is None
    assert factors_of(of_rank(OUT).to(dtype)) is None
    assert factors_of((of_rank(1) + 1e-4 * of_rank(OUT, seed=7)).to(dtype)) is None
    for value in (torch.nan, torch.inf):
        odd = of_rank(1).to(dtype)
        odd[3, 5] = value
        assert factors_of(odd) is None


def test_what_rounds_coarsely_is_held_whole():
    assert factors_of(of_rank(1).bfloat16()) is None


def test_a_weak_second_direction_is_kept():
    matrix = of_rank(1) + 1e-9 * of_rank(1, seed=5)
    found = factors_of(matrix)
    assert found is not None
    assert len(found.left) == 2
    assert torch.allclose(found.whole(), matrix, rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(list(KINDS)), min_size=3, max_size=3),
    st.lists(st.sampled_from(["nothing", "rows", "low"]), min_size=3, max_size=3),
)
def test_vectors_of_factors_are_those_of_numbers(seed: int, kinds: list[str], tall: list[str]):
    start = {"w": drawn(OUT, IN), "b": drawn(OUT), "head": drawn(TALL, 40), "conv": drawn(3, 2, 2, 2)}
    start = {name: value.float() for name, value in start.items()}
    space, plain = Space(start, factored=True), Space(start)
    vectors, numbers = [], []
    for place, (kind, other) in enumerate(zip(kinds, tall, strict=True)):
        at, rank = seed + 100 * place, KINDS[kind]
        grads: list[Tensor | None] = [None if rank is None else of_rank(rank, seed=at)]
        grads.append(None if rank is None else drawn(OUT, seed=at + 2))
        rows = torch.arange(place, TALL, 50) if other == "rows" else None
        grads.append(None if other == "nothing" else readout(rows, at + 3))
        grads.append(drawn(3, 2, 2, 2, seed=at + 4))
        vectors.append(space.vector(grads))
        numbers.append(plain.vector(grads))
        assert (0 in vectors[-1].factors) == (rank is not None and rank <= 8)
        assert (2 in vectors[-1].factors) == (other == "low")
        assert vectors[-1].nbytes <= numbers[-1].nbytes
        assert torch.allclose(flat(space.shaped(vectors[-1])), flat(plain.shaped(numbers[-1])), atol=1e-11)
        assert vectors[-1].square == pytest.approx(numbers[-1].square, rel=1e-12)
    expected = plain.dots(numbers, numbers)
    size = float(expected.diagonal().max())
    assert torch.allclose(space.dots(vectors, vectors), expected, rtol=0, atol=1e-12 * size)
    assert torch.allclose(space.dots(vectors, numbers), expected, rtol=0, atol=1e-12 * size)
    assert torch.allclose(space.dots(numbers, vectors[:1]), expected[:, :1], rtol=0, atol=1e-12 * size)
    assert float(space.dot(vectors[0], vectors[2])) == pytest.approx(float(expected[0, 2]), abs=1e-12 * size)
    weights = (0.5, -2.0, 3.0, 1.0)
    total = space.combined(weights, [*vectors, space.zero()])
    whole = plain.combined(weights, [*numbers, plain.zero()])
    assert not total.factors
    assert torch.allclose(flat(space.shaped(total)), flat(plain.shaped(whole)), rtol=0, atol=1e-11)
    for delta in (total, vectors[0]):
        moved = flat(space.moved(delta))
        assert torch.allclose(moved, flat(start) + flat(space.shaped(delta)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("names", [("weight",), ("weight", "bias"), ("bias", "weight")])
@pytest.mark.parametrize("bias", ["given", "none"])
def test_the_dual_metric_of_factors(two_sided: bool, names: tuple[str, ...], bias: str):
    metric = moments(two_sided)
    layer = nn.Linear(IN, OUT).double()
    start = {name: getattr(layer, name).detach() for name in names}
    space, plain = Space(start, factored=True), Space(start)
    rows = []
    for seed, rank in enumerate((1, 3, 0, OUT, 2)):
        grads = {"weight": of_rank(rank, seed=seed), "bias": drawn(OUT, seed=seed + 9) if bias == "given" else None}
        rows.append([grads[name] for name in names])
    given = [space.vector(row) for row in rows]
    assert [bool(vector.factors) for vector in given] == [True, True, True, False, True]
    found = space.all_applied(metric, given, 1e-16)
    assert [bool(vector.factors) for vector in found] == [True, True, True, False, True]
    for vector, row, one in zip(found, rows, given, strict=True):
        expected = plain.shaped(plain.applied(metric, plain.vector(row), 1e-16))
        alone = space.shaped(space.applied(metric, one, 1e-16))
        for name, value in space.shaped(vector).items():
            scale = float(expected[name].abs().max())
            assert torch.allclose(value, expected[name], rtol=0, atol=1e-11 * scale)
            assert torch.allclose(value, alone[name], rtol=0, atol=1e-13 * scale)


def test_a_tall_weight_of_low_rank_and_the_rows_of_its_bias():
    layer = nn.Linear(40, TALL).double()
    metric = second_moments(layer, drawn(50, 40)).metric()
    start = {name: value.detach() for name, value in layer.named_parameters()}
    space, plain = Space(start, factored=True), Space(start)
    bias = torch.zeros(TALL, dtype=torch.float64)
    bias[[3, 700]] = 2.0
    for weight in (readout(None, 3), readout(torch.tensor([3, 9]), 4), None):
        row, other = space.vector([weight, bias]), plain.vector([weight, bias])
        found, expected = space.applied(metric, row, 1e-16), plain.applied(metric, other, 1e-16)
        assert bool(row.factors) == (weight is not None and bool(weight.any(1).all()))
        assert torch.allclose(flat(space.shaped(found)), flat(plain.shaped(expected)), rtol=0, atol=1e-10)


def test_parameters_without_statistics_are_still_an_error():
    start = {"weight": drawn(OUT, IN), "other": drawn(OUT, IN)}
    space = Space(start, factored=True)
    with pytest.raises(InvalidInput, match="no statistics for other"):
        space.applied(moments(bias=False), space.vector([of_rank(1), of_rank(1)]), 1e-16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(IN, 100), nn.Linear(100, 200)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x).relu())
        return out


# What is edited, and whether the metric is two-sided, if there is one.
CASES: dict[str, tuple[tuple[str, ...], bool | None]] = {
    "readout": (("head.*",), None),
    "readout, in the metric": (("head.*",), False),
    "its weight, two-sided": (("head.weight",), True),
    "inner": (("inner.*",), False),
    "all": (("*",), None),
}


@pytest.mark.parametrize(
    ("case", "distance"), [*((case, False) for case in CASES), *((case, True) for case in list(CASES)[:3])]
)
def test_an_edit_with_factors_is_one_without(case: str, distance: bool, monkeypatch: pytest.MonkeyPatch):
    names, two_sided = CASES[case]
    model, x = Net().double(), drawn(6, IN, seed=3)
    metric = None
    if two_sided is not None:
        found = second_moments(model, drawn(200, IN), parameters=names, likelihood=Categorical() if two_sided else None)
        metric = found.metric(0.01, output_shrinkage=0.1 if two_sided else None)
    editor = MinimumNorm(metric=metric)
    fix: Constraint = Classified(x, torch.arange(6), margin=0.1)
    if distance:
        fix = Within(x[:1], model(x[:1]).detach() + drawn(1, 200, seed=4), 1.0)
        fix = fix & Classified(x[1:], torch.arange(5), margin=0.1)
    results, seen = [], []

    def noted(matrix: Tensor) -> Factors | None:
        seen.append(factors_of(matrix))
        return seen[-1]

    monkeypatch.setattr("weightpatch.editors._vectors.factors_of", noted)
    for factored in (True, False):
        monkeypatch.setattr(minimum_norm, "Space", lambda start, *, flag=factored, **_: Space(start, factored=flag))
        results.append(wp.edit(model, fix, editor, parameters=names))
    assert any(factors is not None for factors in seen)
    one, two = results
    assert one.result == two.result == wp.Result.satisfied
    assert abs(one.steps - two.steps) <= 1  # rounding may cost one of them a round
    assert one.certificate is not None
    assert two.certificate is not None
    assert one.certificate.affine == two.certificate.affine == (case not in ("inner", "all"))
    assert torch.allclose(one.certificate.multipliers, two.certificate.multipliers, rtol=1e-6, atol=1e-9)
    if one.certificate.affine:
        assert one.certificate.gap < 1e-9
    assert one.patch is not None
    assert two.patch is not None
    state = model.state_dict()
    for name, value in one.patch.result(state).items():
        assert torch.allclose(value, two.patch.result(state)[name], rtol=1e-7, atol=1e-9)
