"""What outputs mean: against torch.distributions, and by properties."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributions

from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Of, plain, unplain

SEEDS = st.integers(0, 10**6)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_torch(kind: str, outputs: Tensor) -> distributions.Distribution:
    if kind == "categorical":
        return distributions.Categorical(logits=outputs)
    if kind == "bernoulli":
        return distributions.Independent(distributions.Bernoulli(logits=outputs), 1)
    return distributions.Independent(distributions.Normal(outputs, torch.tensor([0.5, 2.0, 1.0, 3.0]).double()), 1)


KINDS = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian((0.5, 2.0, 1.0, 3.0), 0.1),
}


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
def test_divergences_are_those_of_torch(kind: str, seed: int):
    before, after = draws(seed, 5, 4), draws(seed + 1, 5, 4)
    expected = distributions.kl_divergence(of_torch(kind, before), of_torch(kind, after))
    assert torch.allclose(KINDS[kind].divergence(before, after), expected, rtol=1e-9)
    assert torch.equal(KINDS[kind].divergence(before, before), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
def test_log_likelihoods_are_those_of_torch_up_to_a_constant(kind: str, seed: int):
    outputs, likelihood = draws(seed, 5, 4), KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    one, other = (likelihood.sample(outputs, generator) for _ in range(2))
    told = likelihood.log_prob(outputs, one) - likelihood.log_prob(outputs, other)
    true = of_torch(kind, outputs)
    one, other = (x if kind == "categorical" else x.double() for x in (one, other))
    assert torch.allclose(told, true.log_prob(one) - true.log_prob(other), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_mean_that_outputs_say(kind: str):
    outputs = draws(3, 1, 4)
    drawn = KINDS[kind].sample(outputs.expand(20_000, 4), torch.Generator().manual_seed(0))
    found = torch.nn.functional.one_hot(drawn, 4) if kind == "categorical" else drawn
    true = outputs.softmax(-1) if kind == "categorical" else outputs.sigmoid() if kind == "bernoulli" else outputs
    assert torch.allclose(found.double().mean(0), true[0], atol=0.08)


@given(SEEDS)
def test_probabilities_are_not_taken_for_logits(seed: int):
    a, b = draws(seed, 40, 4), draws(seed + 1, 40, 4)
    for kind, soft in ((Categorical(), lambda z: z.softmax(-1)), (Bernoulli(), torch.sigmoid)):
        likelihood = kind.fitted(soft(a))
        assert likelihood.of is Of.probabilities
        assert torch.allclose(likelihood.divergence(soft(a), soft(b)), kind.divergence(a, b), rtol=1e-6)
        assert torch.equal(likelihood.answer(soft(a)), kind.fitted(a).answer(a))
        assert kind.fitted(a).of is Of.logits
    logs = Categorical(of=Of.log_probabilities)
    assert torch.allclose(logs.divergence(a.log_softmax(-1), b.log_softmax(-1)), Categorical().divergence(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_of_any_dtype_are_seen(dtype: torch.dtype):
    assert Categorical().fitted(draws(0, 30, 50).softmax(-1).to(dtype).float()).of is Of.probabilities


def test_few_outputs_between_0_and_1_may_be_either():
    with pytest.raises(InvalidInput, match=r"say which: .*Of\.logits.*Of\.probabilities"):
        Bernoulli().answer(torch.tensor([[0.2, 0.7]]))
    assert Bernoulli(of=Of.probabilities).answer(torch.tensor([[0.2, 0.7]])).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("likelihood", "shape", "positions", "answer"),
    [
        (Categorical(), (3, 4), (3,), (3,)),
        (Categorical(), (3, 7, 4), (3, 7), (3, 7)),
        (Categorical(1), (3, 4, 7), (3, 7), (3, 7)),
        (Categorical(), (3, 4, 5, 6), (3, 5, 6), (3, 5, 6)),
        (Bernoulli(of=Of.logits), (3,), (3,), (3, 1)),
        (Bernoulli(of=Of.logits), (3, 1), (3,), (3, 1)),
        (Bernoulli(of=Of.logits), (3, 5), (3,), (3, 5)),
        (Bernoulli(of=Of.logits), (3, 1, 5, 6), (3, 5, 6), (3, 5, 6, 1)),
        (Gaussian(1.0, 0.1), (3,), (3,), (3, 1)),
        (Gaussian(1.0, 0.1), (3, 2), (3,), (3, 2)),
        (Gaussian(1.0, 0.1), (3, 2, 5, 6), (3, 5, 6), (3, 5, 6, 2)),
    ],
)
def test_positions_of_every_shape(likelihood: Likelihood, shape, positions, answer):
    before, after = draws(0, *shape), draws(1, *shape)
    assert likelihood.divergence(before, after).shape == positions
    assert likelihood.changed(before, after).shape == positions
    assert likelihood.answer(before).shape == answer
    assert likelihood.margin(after, before).shape == positions
    assert likelihood.reach(after - before).shape == positions
    assert likelihood.log_prob(before, likelihood.sample(before, torch.Generator().manual_seed(0))).shape == positions


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(1.0, 0.3)])
@given(SEEDS, st.floats(0.0, 1.0))
def test_an_error_within_reach_of_no_margin_changes_no_verdict(likelihood: Likelihood, seed: int, size: float):
    before, exact = draws(seed, 40, 5), draws(seed + 1, 40, 5)
    error = size * draws(seed + 2, 40, 5)
    likelihood = likelihood.fitted(before)
    safe = likelihood.margin(exact, before) > likelihood.reach(error)
    assert torch.equal(likelihood.changed(before, exact)[safe], likelihood.changed(before, exact + error)[safe])


def test_errors_have_names_and_units():
    labels = torch.tensor([0, 1, -100, 2])
    wrong = Categorical().loss(torch.eye(4)[:, :3] * 5, labels)
    assert wrong.isnan().tolist() == [False, False, True, False]
    assert (Categorical().figure(float(wrong.nanmean())), Categorical().unit) == (pytest.approx(100 / 3), "%")
    tags = Bernoulli().loss(torch.tensor([[1.0, -1.0, 2.0, -5.0]]), torch.tensor([[1, 1, 0, -100]]))
    assert tags.tolist() == [pytest.approx(2 / 3)]
    numbers = Gaussian().loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
    assert Gaussian().figure(float(numbers.mean())) == pytest.approx(math.sqrt(4.5))
    with pytest.raises(InvalidInput, match="expected 0 to 2"):
        Categorical().loss(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ShapeMismatch, match="expected"):
        Categorical().loss(torch.zeros(2, 3), torch.tensor([1]))


def test_what_a_gaussian_lacks_comes_from_the_spread_and_is_told():
    outputs = draws(0, 500, 2) * torch.tensor([3.0, 0.1])
    fitted = Gaussian().fitted(outputs)
    assert torch.allclose(torch.tensor(fitted.scale).double(), outputs.std(0, correction=0))
    assert fitted.tolerance == pytest.approx([s / 10 for s in fitted.scale])
    assert "scale=(" in fitted.name
    with pytest.raises(InvalidInput, match="no spread|spread of the outputs"):
        Gaussian().fitted(torch.ones(4, 2))
    with pytest.raises(InvalidInput, match="Gaussian.*no scale"):
        Gaussian().divergence(outputs, outputs)
    moved = outputs + torch.tensor([0.0, 0.02])
    assert Gaussian(1.0, 0.01).changed(outputs, moved).all()
    assert not Gaussian(1.0, 0.03).changed(outputs, moved).any()
    assert Gaussian(1.0, 1.0).changed(outputs, outputs * torch.nan).all()


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, (1.0, 0.0), ()])
def test_a_scale_is_positive(value):
    with pytest.raises(InvalidInput, match="scale"):
        Gaussian(value)


@pytest.mark.parametrize(
    "likelihood", [Categorical(1, Of.logits), Bernoulli(Of.probabilities), Gaussian((1.0, 2.0), 0.5)]
)
def test_they_come_back_from_plain_values(likelihood: Likelihood):
    assert unplain(plain(likelihood)) == likelihood
    with pytest.raises(InvalidInput, match="no likelihood"):
        unplain({"kind": "os.system", "dim": None})


def test_one_of_a_users_own_takes_a_few_lines():
    @dataclass(frozen=True)
    class Ordinal(Likelihood):
        def answer(self, outputs: Tensor) -> Tensor:
            return (outputs > 0).sum(-1)

        def divergence(self, before: Tensor, after: Tensor) -> Tensor:
            return Bernoulli(of=Of.logits).divergence(before, after)

    a, b = draws(0, 6, 3), draws(1, 6, 3)
    assert torch.equal(Ordinal().changed(a, b), (a > 0).sum(1) != (b > 0).sum(1))
    assert Ordinal().margin(b, a) is None
    assert plain(Ordinal()) is None
    with pytest.raises(InvalidInput, match="write its `sample"):
        Ordinal().sample(a, torch.Generator())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_peaked_probabilities_of_half_precision_are_probabilities(half: torch.dtype):
    peaked = (20 * draws(0, 200, 5)).float().softmax(-1).to(half).float()
    assert float((peaked.sum(-1) - 1).abs().max()) > 1e-4
    assert float(peaked.min()) < 1e-7
    assert Categorical().fitted(peaked).of is Of.probabilities
