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
from weightpatch.locality import Locality
from weightpatch.tasks import images
from weightpatch.training import RandomLabels, ResidualBlock, SparseBlock, Validation, add_block


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


def _features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    copy = images.fashion_classifier()
    copy.load_state_dict(model.state_dict())
    copy.fc = nn.Identity()
    return copy(x)


def test_a_sparse_block_is_fitted_to_whitened_features():
    torch.manual_seed(0)
    model, x = images.fashion_classifier(), images.fashion_test().images[:600]
    features, before = _features(model, x).detach(), model(x)
    model.layer1.train()
    assert add_block(model, "fc", 512, kind=SparseBlock, reference=x) == "fc.block.outer.weight"
    assert [module.training for module in (model, model.layer1, model.layer2)] == [False, True, False]
    model.eval()
    assert torch.equal(model(x), before)
    answers = model.fc.block.inner(features).detach()
    assert answers.mean(0).sub(-1).abs().max() < 0.02  # each unit is centred, and 1 standard deviation is subtracted
    assert float(answers.std(0).mean()) == pytest.approx(1, abs=0.1)
    assert 0.1 < float((answers > 0).float().mean()) < 0.2


def test_of_a_locality_the_positions_that_count_are_the_reference():
    model, x = images.fashion_classifier(), images.fashion_test().images[:200]
    counts = torch.arange(200) % 3 > 0
    fitted = []
    for reference in (Locality(x, counts), x[counts]):
        copied = images.fashion_classifier()
        torch.manual_seed(0)
        add_block(copied, "fc", 64, kind=SparseBlock, reference=reference)
        fitted.append(copied.fc.block.inner)
    torch.testing.assert_close(fitted[0].weight, fitted[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted[0].bias, fitted[1].bias, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInput, match=r"a mask of \(200, 2\), and the layer has 200 inputs"):
        add_block(model, "fc", 64, kind=SparseBlock, reference=Locality(x, torch.ones(200, 2, dtype=torch.bool)))


def test_a_gradient_step_moves_others_by_the_cosine_of_their_codes():
    torch.manual_seed(0)
    block, x = SparseBlock(4, 32), torch.randn(3, 4)
    block.fit(torch.randn(200, 4))
    s = torch.relu(x @ block.inner.weight.T + block.inner.bias)
    assert (s.norm(dim=1) > 0).all()  # an item may be too ordinary to have a code
    code = s / s.norm(dim=1, keepdim=True)
    assert torch.equal(block(x), x)
    block(x)[0, 2].backward()
    with torch.no_grad():
        block.outer.weight -= block.outer.weight.grad
    moved = (block(x) - x)[:, 2]
    assert torch.allclose(moved, -(code @ code[0]), atol=1e-6)


def test_an_item_without_a_code_has_finite_gradients_of_both_orders():
    block = SparseBlock(3, 5)
    with torch.no_grad():
        block.inner.bias.fill_(-100.0)
    x = torch.ones(2, 3, requires_grad=True)
    weight = block.outer.weight.detach().requires_grad_()
    params = {**dict(block.named_parameters()), "outer.weight": weight}
    (first,) = torch.autograd.grad(
        torch.func.functional_call(block, params, x).square().sum(), weight, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum() + (weight * first).sum(), x)
    assert bool(first.isfinite().all())
    assert bool(second.isfinite().all())


def test_edits_of_a_sparse_block_are_local():
    torch.manual_seed(0)
    test = images.fashion_test()
    x, y = test.images[:1000], test.labels[:1000]
    editor = GradientDescent(lr=0.5, max_steps=10)
    drifts = {}
    for kind, options in ((ResidualBlock, {}), (SparseBlock, {"reference": test.images[1000:3000]})):
        model = images.fashion_classifier()
        parameters = add_block(model, "fc", 512, kind=kind, **options)
        validation = Validation(x, y, RandomLabels(x, 10), edits=10)
        found = validation.measure(model, editor, (parameters,) if kind is SparseBlock else ("fc.block.outer.weight",))
        drifts[kind] = found.drift
        assert found.success == 1
    assert drifts[SparseBlock] < drifts[ResidualBlock] / 10


def test_a_reference_is_for_a_sparse_block_and_must_vary():
    model, x = images.fashion_classifier(), torch.zeros(20, 1, 28, 28)
    for kind, said in ((ResidualBlock, "only a SparseBlock is fitted"), (SparseBlock, "do not vary")):
        with pytest.raises(InvalidInput, match=said):
            add_block(model, "fc", 8, kind=kind, reference=x)
    assert isinstance(model.fc, nn.Linear)
