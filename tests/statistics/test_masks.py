from __future__ import annotations

import pytest
import torch
from torch import nn

from weightpatch import Locality
from weightpatch.errors import InvalidInput
from weightpatch.statistics import categorical, second_moments


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


def squares(answers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return -answers.square().reshape(len(answers), -1).sum(1)


def test_gradients_at_padding_do_not_count():
    model, rows = Tokens(), [[1, 2, 3], [4], [5, 6], [7, 8, 1]]
    padded = torch.tensor([[*row, *[0] * (3 - len(row))] for row in rows])
    found = second_moments(model, Locality(padded, padded > 0), batch_size=2, likelihood=squares)
    alone = second_moments(model, [torch.tensor([row]) for row in rows], likelihood=squares)
    whole = second_moments(model, padded, likelihood=squares)
    for name, layer in alone.layers.items():
        torch.testing.assert_close(found.layers[name].fisher, layer.fisher)
        assert not torch.allclose(found.layers[name].fisher, whole.layers[name].fisher)
    assert second_moments(model, Locality(padded, padded > 0), likelihood=categorical).two_sided
    pooled = nn.Sequential(model, nn.Flatten(), nn.Linear(18, 6))
    with pytest.raises(InvalidInput, match=r"mask of shape \(4, 3\).*answers with shape \(4, 6\)"):
        second_moments(pooled, Locality(padded, padded > 0), likelihood=categorical)
