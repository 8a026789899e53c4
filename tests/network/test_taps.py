"""Taps: inputs and outputs are seen, outputs can be moved, and nothing else is different."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

from weightpatch.errors import InvalidInput
from weightpatch.network import Network, Seen, moved, tapped, with_taps


def test_a_tapped_model_is_the_same_model():
    for case in zoo.CASES:
        model = case.model().eval()
        before, x = zoo.digest(model), case.inputs(4)
        names = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
        clone = with_taps(model, names)
        assert zoo.digest(model) == before
        assert clone.state_dict().keys() == model.state_dict().keys()
        with torch.enable_grad():  # with the fused kernels of eval mode a layer is not called
            model.requires_grad_(True)
            clone.requires_grad_(True)
            expected = model(x)
            assert torch.equal(clone(x), expected)
            with tapped(Seen()) as _:
                assert torch.equal(clone(x), expected)


def test_inputs_and_outputs_are_seen_call_by_call():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    model = with_taps(nn.Sequential(shared, nn.Tanh(), shared), ["0"])
    x, seen = torch.randn(2, 5, 3), Seen()
    moved(model, seen)(x)
    assert [tuple(part.shape) for part in seen.given["0"]] == [(2, 5, 3)] * 2
    hidden = shared(x)
    assert torch.equal(seen.inputs("0"), torch.cat([x.view(-1, 3), hidden.tanh().view(-1, 3)]))
    assert torch.equal(seen.outputs("0"), torch.cat([hidden.view(-1, 3), shared(hidden.tanh()).view(-1, 3)]))
    model(x)
    assert len(seen.given["0"]) == 2  # nothing is noted outside


class Pair(nn.Module):
    """Answers a tuple, and is given its input by name."""

    def forward(self, *, hidden: Tensor, scale: float = 2.0) -> tuple[Tensor, float]:
        return hidden * scale, scale


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pair()
        self.tokens = nn.Embedding(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(hidden=self.tokens(tokens))[0]


def test_outputs_are_moved_in_tuples_too_and_gradients_flow():
    model, tokens = with_taps(Outer(), ["inner", "tokens"]), torch.tensor([[0, 1], [2, 3]])
    added = torch.randn(4, 3).requires_grad_()
    seen = Seen({"inner": added})
    answer = moved(model, seen)(tokens)
    torch.testing.assert_close(answer, model(tokens) + added.view(2, 2, 3))
    (grad,) = torch.autograd.grad(answer.sum(), added)
    assert torch.equal(grad, torch.ones(4, 3))
    assert torch.equal(seen.outputs("inner"), model(tokens).view(4, 3))  # as it was before it gained
    assert "tokens" not in seen.given  # integers are no keys
    assert len(seen.inputs("tokens")) == 0


def test_replayed_passes_are_seen_and_moved_as_full_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    network, x = Network(with_taps(model, ["2", "4"]), "2.*"), torch.randn(5, 3)
    added = torch.randn(5, 4)
    network.at(network.start)(x)
    params = {name: value + 0.1 for name, value in network.start.items()}
    answers = []
    for at in (network.at, network.full):
        seen = Seen({"2": added})
        answers.append((moved(at(params), seen)(x), seen.inputs("2"), seen.outputs("2"), seen.inputs("4")))
    assert not network.full_passes_because
    for replayed, full in zip(*answers, strict=True):
        assert torch.equal(replayed, full)


def test_more_rows_than_before_are_refused():
    model = with_taps(nn.Sequential(nn.Linear(3, 2)), ["0"])
    with pytest.raises(InvalidInput, match="otherwise from pass to pass"):
        moved(model, Seen({"0": torch.zeros(4, 2)}))(torch.randn(5, 3))


@pytest.mark.parametrize("name", ["", "9", "fc"])
def test_a_module_that_is_not_there_is_named(name: str):
    with pytest.raises(InvalidInput, match="the model has"):
        with_taps(nn.Sequential(nn.Linear(3, 2)), [name])


def test_a_module_that_answers_no_numbers_is_refused():
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    model = with_taps(nn.Sequential(nn.Linear(3, 2), Counts()), ["1"])
    with pytest.raises(InvalidInput, match="torch.int64"):
        moved(model, Seen())(torch.randn(5, 3))
