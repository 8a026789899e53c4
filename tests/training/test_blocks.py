"""An extra block before the head: nothing changes until it is trained, and edits of it are ordinary edits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import GradientDescent
from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.evaluation import predict
from weightpatch.tasks import images
from weightpatch.training import RandomLabels, ResidualBlock, Validation, add_block


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_a_new_block_changes_no_answer_and_only_its_parameters_are_named():
    model, x = images.fashion_classifier(), images.fashion_test().images[:50]
    before, old = model(x), dict(model.state_dict())
    assert add_block(model, "fc", hidden=32) == "fc.block.*"
    assert torch.equal(model(x), before)
    new = dict(model.state_dict())
    assert torch.equal(new["fc.head.weight"], old["fc.weight"])
    assert {name for name in new if name.startswith("fc.block.")} == {
        f"fc.block.{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")
    }
    assert not model.fc.block.training  # as the layer that it came before


def test_dtype_and_place_are_those_of_the_layer():
    model = Nested().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    before = model(x)
    assert add_block(model, "body.2", hidden=8) == "body.2.block.*"
    assert torch.equal(model(x), before)
    assert isinstance(model.body[2].block, ResidualBlock)
    assert model.body[2].block.inner.weight.shape == (8, 4)


def test_the_block_is_the_formula():
    block, x = ResidualBlock(4, 6), torch.randn(5, 4)
    nn.init.normal_(block.outer.weight)
    nn.init.normal_(block.outer.bias)
    z = x @ block.inner.weight.T + block.inner.bias
    z = torch.where(z > 0, z, z.exp() - 1)
    assert torch.allclose(block(x), x + z @ block.outer.weight.T + block.outer.bias, atol=1e-6)


def test_an_edit_of_the_block_holds():
    torch.manual_seed(0)
    model, test = images.fashion_classifier(), images.fashion_test()
    found = wp.edit(
        model,
        Classified(test.images[:1], (test.labels[:1] + 1) % 10),
        GradientDescent(lr=0.1, max_steps=50),
        parameters=add_block(model, "fc", hidden=64),
    ).raise_for_result()
    assert {name.rpartition(".block.")[0] for name in found.patch.operations} == {"fc"}


@pytest.mark.parametrize(
    ("before", "hidden", "said"),
    [
        ("fx", 8, "before='fx'; the model's linear layers are fc"),
        ("", 8, "linear layers are fc"),
        ("layer3", 8, "a Sequential; expected torch.nn.Linear"),
        ("fc", 0, "hidden=0; expected at least 1"),
    ],
)
def test_bad_input_leaves_the_model(before: str, hidden: int, said: str):
    model = images.fashion_classifier()
    names = list(model.state_dict())
    with pytest.raises(InvalidInput, match=said):
        add_block(model, before, hidden)
    assert list(model.state_dict()) == names


def test_base_drift_is_agreement_and_kl_with_the_original():
    model, test = images.fashion_classifier(), images.fashion_test()[:200]
    original = predict(model, test.images)
    sampler = RandomLabels(test.images, 10)
    validation = Validation(test.images, test.labels, sampler, edits=2, reference=original)
    editor = GradientDescent(lr=0.01, max_steps=5)
    same = validation.measure(model, editor, ("fc.bias",))
    assert (same.agreement, same.base_drift) == (1.0, 0.0)
    with torch.no_grad():
        model.fc.bias[3] += 2
    moved = validation.measure(model, editor, ("fc.bias",))
    now = predict(model, test.images)
    p, q = original.double().log_softmax(1), now.double().log_softmax(1)
    assert moved.agreement == pytest.approx(float((original.argmax(1) == now.argmax(1)).double().mean()))
    assert moved.base_drift == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert moved.agreement < 1
    plain = Validation(test.images, test.labels, sampler, edits=2).measure(model, editor, ("fc.bias",))
    assert (plain.agreement, plain.base_drift) == (None, None)
    with pytest.raises((InvalidInput, ShapeMismatch), match="expected logits"):
        Validation(test.images, test.labels, sampler, reference=original[:3])
