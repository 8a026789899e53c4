"""The objective and its gradients, against the formulas computed naively and against finite differences."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_training import edit_terms, violation
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Constraint
from weightpatch.editors import Adam, GradientDescent, IterativeEditor, Momentum, RMSProp, RProp, ScaledGradientDescent
from weightpatch.errors import InvalidInput, NotEditable
from weightpatch.training import EditableObjective, Episode

EDITORS = (
    GradientDescent(lr=0.05, max_steps=3),
    ScaledGradientDescent(lr=0.1, max_steps=3),
    RProp(lr=0.002, max_steps=3),
    RMSProp(lr=0.002, max_steps=3),
    Momentum(lr=0.02, max_steps=3),
    Adam(lr=0.002, max_steps=3),
)
WAYS = {"graph": {}, "adjoint": {"graph_bytes": 0.0}, "full passes": {"replay": False}}
DOUBLE = [case for case in zoo.CASES if case.name != "bf16"]


def item(scalar: Tensor) -> float:
    return float(scalar.detach())


def as_double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def model_of(case: zoo.Case) -> nn.Module:
    return case.model().double().train()


def edits_of(case: zoo.Case, model: nn.Module, count: int, rows: int = 1, margin: float = 0.5) -> list[Episode]:
    """Ask for the class that comes last, so that the edits take several steps; and for one that holds already."""
    inputs = as_double(case.inputs(count * rows))
    with torch.no_grad():
        order = type(model).eval(model)(inputs).argsort(1, descending=True)
    model.train()
    labels = order[:, -1].clone()
    labels[:rows] = order[:rows, 0]
    parts = [slice(i * rows, (i + 1) * rows) for i in range(count)]
    made = []
    for number, part in enumerate(parts):
        also = as_double(case.inputs(2 * count * rows + 1))[part] if number % 2 else None
        demand = None if also is None else Classified(also, labels[part])
        made.append(Episode(Classified(inputs[part], labels[part], 0.0 if number == 0 else margin), demand))
    return made


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return list(found)


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    """Relative to the largest component of each tensor's gradient, and of all."""
    largest = max(float(t.abs().max()) for t in theirs)
    assert largest > 0
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-6 * largest)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: type(editor).__name__)
@pytest.mark.parametrize("case", DOUBLE, ids=lambda case: case.name)
def test_value_and_gradient_are_those_of_the_formulas(case: zoo.Case, editor: IterativeEditor, way: dict):
    model = model_of(case)
    episodes, keep = edits_of(case, model, 3), as_double(case.inputs(7))
    objective = EditableObjective(
        model, editor, parameters=case.parameters, c_edit=0.3, c_loc=0.7, c_gen=0.2, share_locality=False, **way
    )
    loss = objective(episodes, wp.Locality(keep))
    expected = edit_terms(model, objective.names, editor, episodes, keep, (0.3, 0.7, 0.2), share=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    close(gradients(loss, model), gradients(expected, model))
    assert objective.terms.steps > 0.5


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("case", DOUBLE, ids=lambda case: case.name)
def test_joint_edits_and_shared_locality(case: zoo.Case, way: dict):
    model, editor = model_of(case), RMSProp(lr=1e-3, max_steps=4)
    episodes, keep = edits_of(case, model, 2, rows=5), as_double(case.inputs(9))
    objective = EditableObjective(model, editor, parameters=case.parameters, c_edit=1.0, c_loc=1.0, c_gen=1.0, **way)
    for _ in range(2):  # the second time everything is known
        loss = objective(episodes, wp.Locality(keep))
        expected = edit_terms(model, objective.names, editor, episodes, keep, (1.0, 1.0, 1.0), share=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        close(gradients(loss, model), gradients(expected, model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(EDITORS), st.sampled_from([256e6, 0.0]), st.integers(1, 4))
def test_gradients_meet_finite_differences(seed: int, editor: IterativeEditor, graph_bytes: float, edits: int):
    torch.manual_seed(seed)
    layers = OrderedDict(a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(6, 6), act2=nn.Tanh(), c=nn.Linear(6, 2))
    model = nn.Sequential(layers).double()
    x, y = torch.randn(edits, 4).double(), torch.randint(0, 2, (edits,))
    episodes = [Episode(Classified(x[i : i + 1], y[i : i + 1], margin=50.0)) for i in range(edits)]  # never met: smooth
    keep = torch.randn(8, 4).double()
    objective = EditableObjective(model, editor, parameters="b.*", c_edit=0.1, c_loc=1.0, graph_bytes=graph_bytes)
    found = gradients(objective(episodes, wp.Locality(keep)), model)
    direction = [torch.randn_like(p) for p in model.parameters()]
    along = sum(item((g * d).sum()) for g, d in zip(found, direction, strict=True))
    reference = model(keep).detach()

    def at(t: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(d, alpha=t)
        weights = (0.1, 1.0, 0.0)
        return item(
            edit_terms(moved, objective.names, editor, episodes, keep, weights, share=True, reference=reference)
        )

    step = 1e-5
    assert along == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-3, abs=1e-6)


def test_every_learned_hyperparameter_meets_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    fix, keep = Classified(torch.randn(1, 4).double(), torch.tensor([1]), margin=9.0), torch.randn(8, 4).double()
    for editor, learn in (
        (RMSProp(lr=0.03, max_steps=3), ("lr", "beta", "epsilon")),
        (Momentum(lr=0.03, max_steps=3), ("lr", "momentum")),
        (Adam(lr=0.03, max_steps=3, epsilon=1e-2), ("lr", "epsilon")),
    ):
        for graph_bytes in (256e6, 0.0):
            objective = EditableObjective(model, editor, learn=learn, c_loc=1.0, graph_bytes=graph_bytes)
            objective.rates.double()
            for raw in objective.rates.parameters():
                (grad,) = torch.autograd.grad(objective(fix, wp.Locality(keep)), raw)
                for i in range(len(raw)):
                    values = []
                    for step in (1e-5, -1e-5):
                        with torch.no_grad():
                            raw[i] += step
                            values.append(item(objective(fix, wp.Locality(keep))))
                            raw[i] -= step
                    assert float(grad[i]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_learned_rates_start_at_the_editors_and_settle_as_numbers():
    model = nn.Linear(3, 2)
    objective = EditableObjective(model, RMSProp(lr=1e-3, beta=0.4), learn=("lr", "beta"))
    settled = objective.settled_editor()
    assert settled.lr == pytest.approx({"weight": 1e-3, "bias": 1e-3}, rel=1e-5)
    assert settled.beta == pytest.approx({"weight": 0.4, "bias": 0.4}, rel=1e-5)
    assert eval(repr(settled)) == settled
    found = wp.edit(model, Classified(torch.ones(1, 3), torch.tensor([0])), settled)
    assert found.result in wp.Result


def test_with_batch_statistics_the_base_pass_alone_touches_the_model():
    case = next(case for case in DOUBLE if case.name == "resnet")
    model, x = model_of(case), as_double(case.inputs(6))
    y, episodes = torch.arange(6) % 5, edits_of(case, model, 2)
    editor = GradientDescent(lr=0.05, max_steps=3)
    objective = EditableObjective(model, editor, parameters="layer2.*", c_edit=0.4, c_loc=0.6)
    reference = case.model().double().train()
    reference.load_state_dict(model.state_dict())
    terms = edit_terms(reference, objective.names, editor, episodes, x, (0.4, 0.6, 0.0), share=True)
    expected = F.cross_entropy(reference(x), y) + terms
    loss = objective(episodes, batch=(x, y))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    close(gradients(loss, model), gradients(expected, reference))
    assert all(map(torch.equal, model.buffers(), reference.buffers()))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("own", [True, False], ids=["the batch is kept", "other inputs are kept"])
def test_c_eval_adds_the_base_loss_in_evaluation_mode(own: bool):
    case = next(case for case in DOUBLE if case.name == "resnet")
    model, x = model_of(case), as_double(case.inputs(8))
    y, episodes, keep = torch.arange(6) % 5, edits_of(case, model, 2), None if own else x[4:]
    x = x[:6]
    editor = GradientDescent(lr=0.05, max_steps=3)
    objective = EditableObjective(model, editor, parameters="layer2.*", c_edit=0.4, c_loc=0.6, c_eval=0.7)
    reference = case.model().double()
    reference.load_state_dict(model.state_dict())
    deployed = F.cross_entropy(reference.eval()(x), y)
    extra = gradients(deployed, reference)
    shown = x if own else keep
    terms = edit_terms(reference.train(), objective.names, editor, episodes, shown, (0.4, 0.6, 0.0), share=True)
    expected = F.cross_entropy(reference(x), y) + terms
    loss = objective(episodes, keep=None if own else wp.Locality(keep), batch=(x, y))
    assert loss.item() == pytest.approx((expected + 0.7 * deployed).item(), rel=1e-9)
    assert all(map(torch.equal, model.buffers(), reference.buffers()))
    theirs = [a + 0.7 * b for a, b in zip(gradients(expected, reference), extra, strict=True)]
    close(gradients(loss, model), theirs)


@pytest.mark.parametrize("case", DOUBLE, ids=lambda case: case.name)
def test_where_modes_agree_one_pass_serves_base_and_locality(case: zoo.Case, monkeypatch: pytest.MonkeyPatch):
    model, x = model_of(case).eval(), as_double(case.inputs(6))
    y, episodes = torch.arange(6) % 5, edits_of(case, model, 2)
    model.eval()
    passes: list[int] = []
    first = next(module for name, module in model.named_modules() if name and not list(module.children()))
    run, shape = type(first).forward, first.weight.shape

    def counted(module: nn.Module, *inputs: Tensor) -> Tensor:
        passes.extend([1] * (module.weight.shape == shape))
        return run(module, *inputs)

    monkeypatch.setattr(type(first), "forward", counted)
    objective = EditableObjective(model, EDITORS[0], parameters=case.parameters, c_edit=0.4, c_loc=0.6)
    for _ in range(2):
        passes.clear()
        loss = objective(episodes, batch=(x, y))
    if case.name in ("resnet", "encoder", "mlp"):  # what precedes the edit ran once for x, once for all edits
        assert len(passes) == 2
    terms = edit_terms(model, objective.names, EDITORS[0], episodes, x, (0.4, 0.6, 0.0), share=True)
    expected = F.cross_entropy(model(x), y) + terms
    close(gradients(loss, model), gradients(expected, model))


def test_the_model_is_as_it_was(case: zoo.Case):
    model = case.model().train()
    before = zoo.digest(model)
    fix = Classified(case.inputs(1), torch.tensor([1]), margin=1.0)
    objective = EditableObjective(model, RMSProp(max_steps=2), parameters=case.parameters)
    objective(fix, wp.Locality(case.inputs(4)))
    with torch.no_grad():
        objective(fix, wp.Locality(case.inputs(4)))
    with pytest.raises(InvalidInput):
        objective([], wp.Locality(case.inputs(4)))
    assert zoo.digest(model) == before


def test_half_precision_models_are_edited_in_float32():
    case = next(case for case in zoo.CASES if case.name == "bf16")
    model = case.model().train()
    fix = Classified(case.inputs(1), torch.tensor([2]), margin=1.0)
    tiny = GradientDescent(lr=1e-7, max_steps=3)  # a step that bfloat16 would round away
    objective = EditableObjective(model, tiny, parameters=case.parameters, c_edit=1.0)
    loss = objective(fix, wp.Locality(case.inputs(4)))
    loss.backward()
    assert math.isfinite(item(loss))
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_autocast_stays_near_the_float32_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    fix, keep = Classified(torch.randn(1, 8), torch.tensor([1]), margin=9.0), wp.Locality(torch.randn(16, 8))
    found = []
    for graph_bytes in (256e6, 0.0):
        objective = EditableObjective(
            model, GradientDescent(lr=0.1, max_steps=4), parameters="2.*", graph_bytes=graph_bytes
        )
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = objective(fix, keep)
            found.append(torch.cat([g.reshape(-1) for g in gradients(loss, model)]))
    exact, cast, exact_too, cast_too = found
    assert torch.allclose(exact, exact_too, rtol=1e-4, atol=1e-6)
    for other in (cast, cast_too):
        assert float(F.cosine_similarity(exact, other, 0)) > 0.99


def test_the_first_order_option_is_the_identity_approximation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    fix, keep = Classified(torch.randn(1, 4).double(), torch.tensor([1]), margin=9.0), torch.randn(6, 4).double()
    editor = GradientDescent(lr=0.1, max_steps=2)
    objective = EditableObjective(model, editor, c_edit=1.0, c_loc=1.0, first_order=True)
    found = gradients(objective(fix, wp.Locality(keep)), model)
    moved = wp.edit(model, fix, editor).patch.result(dict(model.state_dict()))
    after = {name: moved.get(name, p).detach().requires_grad_() for name, p in model.named_parameters()}
    run = torch.func.functional_call
    loss = fix.violation(lambda x: run(model, after, (x,))).relu().mean()
    loss = loss + wp.Locality(keep, likelihood=wp.likelihoods.Categorical()).drift(
        model, lambda x: run(model, after, (x,))
    )
    close(found, list(torch.autograd.grad(loss, list(after.values()))), 1e-3)  # the patch was rounded


class Repeated(nn.Module):
    """Applies a layer once or twice, as a constant says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, twice: bool) -> Tensor:
        x = torch.tanh(self.layer(x))
        return torch.tanh(self.layer(x)) if twice else x


class Switched(nn.Module):
    """Hands a constant of the call on to what comes before the edited layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Repeated(), nn.Linear(4, 3)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return self.second(self.first(x, twice))


class Both(Constraint):
    """Asks about the same tensor with and without the constant."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def violation(self, function: Callable[..., Tensor]) -> Tensor:
        return torch.cat([violation(function(self.inputs, **more), self.labels) + 9 for more in ({}, {"twice": True})])


def test_the_same_tensor_with_other_constants_is_another_call():
    torch.manual_seed(0)
    model = Switched().double()
    fix, keep = (
        Both(torch.randn(2, 4).double(), torch.tensor([1, 2])),
        wp.Locality(torch.randn(6, 4).double(), likelihood=wp.likelihoods.Categorical()),
    )
    found = []
    for replay in (True, False):
        objective = EditableObjective(model, GradientDescent(lr=0.1, max_steps=2), parameters="second.*", replay=replay)
        loss = objective(fix, keep)
        found.append([loss.detach(), *gradients(loss, model)])
        assert bool(objective._network.full_passes_because) != replay
    close(*found)


def test_rates_can_be_learned_for_a_frozen_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)
    fix, keep = Classified(torch.randn(1, 4), torch.tensor([1]), margin=9.0), wp.Locality(torch.randn(6, 4))
    found = []
    for graph_bytes in (256e6, 0.0):
        objective = EditableObjective(model, GradientDescent(max_steps=2), learn=("lr",), graph_bytes=graph_bytes)
        found.append(list(torch.autograd.grad(objective(fix, keep), list(objective.rates.parameters()))))
    close(*found, tolerance=1e-4)
    assert not any(p.requires_grad for p in model.parameters())


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.centres = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.first(x), self.centres)


def test_an_operation_without_a_second_derivative_is_named():
    model = Distances()
    fix, keep = Classified(torch.randn(1, 4), torch.tensor([1]), margin=9.0), wp.Locality(torch.randn(6, 4))
    before = zoo.digest(model)
    with pytest.raises(NotEditable, match=r"cdist.*no second derivative.*first_order=True"):
        EditableObjective(model, GradientDescent(max_steps=2))(fix, keep)
    assert zoo.digest(model) == before
    EditableObjective(model, GradientDescent(max_steps=2), first_order=True)(fix, keep).backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c_edit": -1.0}, "c_edit=-1.0; expected a finite number"),
        ({"c_loc": math.nan}, "c_loc=nan; expected a finite number"),
        ({"c_gen": math.inf}, "c_gen=inf; expected a finite number"),
        ({"editor": RMSProp(max_steps=0)}, "max_steps=0; expected at least 1"),
        ({"editor": wp.editors.Shrink(RMSProp())}, "expected an IterativeEditor"),
        ({"learn": ("colour",)}, "RMSProp has no 'colour' to learn; expected some of"),
        ({"editor": RMSProp(lr=0.0), "learn": ("lr",)}, "a learned lr has to start above 0"),
        ({"parameters": "nothing.*"}, "no parameter matches"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str):
    editor = settings.pop("editor", RMSProp())
    with pytest.raises(InvalidInput, match=message):
        EditableObjective(nn.Linear(3, 2), editor, **settings)


def test_bad_calls_are_refused():
    objective = EditableObjective(nn.Linear(3, 2), RMSProp())
    fix = Classified(torch.randn(1, 3), torch.tensor([1]))
    with pytest.raises(InvalidInput, match="nothing to keep"):
        objective(fix)
    with pytest.raises(InvalidInput, match="does the sampler yield any"):
        objective(iter(()), wp.Locality(torch.randn(2, 3)))
    with pytest.raises(InvalidInput, match="expected a constraint"):
        objective(["repair it"], wp.Locality(torch.randn(2, 3)))
