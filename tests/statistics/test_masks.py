from __future__ import annotations

import pytest
import torch
from torch import nn

from weightpatch import Locality
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Categorical, Likelihood
from weightpatch.statistics import second_moments


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.out = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(self.embed(ids)).relu())


def test_padding_does_not_count():
    model, rows = Tokens(), [[1, 2, 3], [4], [5, 6], [7, 8, 1]]
    padded = torch.tensor([[*row, *[0] * (3 - len(row))] for row in rows])
    found = second_moments(model, Locality(padded, padded > 0), batch_size=2)
    alone = second_moments(model, [torch.tensor([row]) for row in rows])
    whole = second_moments(model, padded)
    for name, layer in alone.layers.items():
        torch.testing.assert_close(found.layers[name].total, layer.total)
        assert (found.layers[name].count, found.layers[name].power) == (9, pytest.approx(layer.power))
        assert whole.layers[name].count == 12
    assert torch.equal(
        second_moments(model, Locality(padded)).layers["out.weight"].total, whole.layers["out.weight"].total
    )


class Squares(Likelihood):
    """A likelihood of one's own, without chance."""

    def divergence(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return (after - before).square().sum(-1)

    def answer(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs

    def sample(self, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros_like(outputs)

    def log_prob(self, outputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return -(outputs - answers).square().sum(-1)


def test_gradients_at_padding_do_not_count():
    model, rows = Tokens(), [[1, 2, 3], [4], [5, 6], [7, 8, 1]]
    padded = torch.tensor([[*row, *[0] * (3 - len(row))] for row in rows])
    found = second_moments(model, Locality(padded, padded > 0), batch_size=2, likelihood=Squares())
    alone = second_moments(model, [torch.tensor([row]) for row in rows], likelihood=Squares())
    whole = second_moments(model, padded, likelihood=Squares())
    for name, layer in alone.layers.items():
        torch.testing.assert_close(found.layers[name].fisher, layer.fisher)
        assert not torch.allclose(found.layers[name].fisher, whole.layers[name].fisher)
    assert second_moments(model, Locality(padded, padded > 0), likelihood=Categorical()).two_sided
    pooled = nn.Sequential(model, nn.Flatten(), nn.Linear(18, 6))
    with pytest.raises(InvalidInput, match=r"mask of shape \([1-4], 3\).*predictions have shape \([1-4], 6\)"):
        second_moments(pooled, Locality(padded, padded > 0), likelihood=Categorical())


@pytest.mark.parametrize("dim", [None, 1])
def test_pixels_that_do_not_count(dim: int | None):
    """Classes on dimension 1, and as many classes as rows and columns: the mask must not be read as one of classes."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 1), torch.randn(200, 2, 3, 3)
    mask = torch.zeros(200, 3, 3, dtype=torch.bool)
    mask[:, 0, 1:] = True
    found = second_moments(model, Locality(x, mask), likelihood=Categorical(dim=dim)).layers["weight"]
    p = model(x).detach().softmax(1).movedim(1, -1)[mask].double()
    expected = p.sum(0).diag() - p.T @ p
    assert torch.allclose(found.fisher[0], expected, atol=0.15 * float(expected.diagonal().mean()))
