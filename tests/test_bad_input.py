"""Everything wrong that a caller can hand over: the error says what, and the model is bit for bit what it was."""

from __future__ import annotations

import re

import pytest
import torch
import zoo
from test_contract import mistake
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept, Within
from weightpatch.editing import Result
from weightpatch.editors import GradientDescent, RMSProp
from weightpatch.errors import (
    ConflictingConstraints,
    InvalidInput,
    NonFinite,
    NotEditable,
    NothingToEdit,
    ShapeMismatch,
)

RESNET = zoo.CASES[1]
LABEL = torch.tensor([0])


def x(n: int = 1) -> Tensor:
    return RESNET.inputs(n)


def refuses(model: nn.Module, error: type[BaseException], says: str, fix, parameters="fc.*", editor=None) -> None:
    untouched = zoo.digest(model)
    with pytest.raises(error) as caught:
        wp.edit(
            model,
            fix() if callable(fix) and not isinstance(fix, wp.constraints.Constraint) else fix,
            editor,
            parameters=parameters,
        )
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search(says, text), text
    assert zoo.digest(model) == untouched


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_inputs_targets_and_weights(bad: float):
    model = RESNET.model()
    refuses(model, NonFinite, "inputs of Classified", lambda: Classified(x() * bad, LABEL))
    refuses(model, NonFinite, "targets of Within", lambda: Within(x(), torch.full((1, 5), bad), 1.0))
    refuses(model, NonFinite, "inputs of Kept", lambda: Kept(x() * bad))
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 0, 0] = bad
    refuses(model, NonFinite, "layer1.0.conv1.weight", Classified(x(), LABEL))
    model = RESNET.model()
    model.layer1[0].bn1.running_var[0] = bad
    # -inf in a buffer can be a mask; there the answers tell
    refuses(model, NonFinite, "outputs" if bad == -torch.inf else "layer1.0.bn1.running_var", Classified(x(), LABEL))


def test_outputs_that_are_not_finite():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / 0

    refuses(Broken(), NonFinite, "outputs", Classified(torch.ones(1, 6), LABEL))


def test_wrong_shape_dtype_and_device():
    model = RESNET.model()
    refuses(
        model,
        RuntimeError,
        r"\(1, 4, 8, 8\) float32.*first weight is conv1.weight \(8, 3, 3, 3\)",
        Classified(torch.ones(1, 4, 8, 8), LABEL),
    )
    refuses(model, RuntimeError, "float64.*Check the shape, dtype and device", Classified(x().double(), LABEL))
    refuses(model, InvalidInput, "on meta", lambda: Classified(x().to("meta"), LABEL))
    refuses(
        model,
        ShapeMismatch,
        r"targets of shape \(1, 4\); the model returns \(1, 5\)",
        Within(x(), torch.zeros(1, 4), 1.0),
    )
    refuses(model, ShapeMismatch, "one target per input", lambda: Within(x(2), torch.zeros(1, 5), 1.0))


@pytest.mark.parametrize("label", [-1, 5, 10**9])
def test_labels_out_of_range(label: int):
    refuses(RESNET.model(), InvalidInput, "expected 0 to 4", Classified(x(), torch.tensor([label])))


def test_empty_constraints():
    model = RESNET.model()
    refuses(model, InvalidInput, "empty batch", lambda: Classified(x(2)[:0], LABEL[:0]))
    refuses(model, InvalidInput, "no constraint", lambda: wp.constraints.All(()))


def test_no_parameter_matches_and_near_ones_are_named():
    refuses(RESNET.model(), NothingToEdit, "layer2", Classified(x(), LABEL), parameters="layr2.*")
    refuses(RESNET.model(), InvalidInput, "expected globs of names", Classified(x(), LABEL), parameters=())


def test_frozen_parameters():
    model = RESNET.model()
    model.fc.requires_grad_(False)
    refuses(model, NotEditable, "fc.weight.*(frozen|requires_grad)", Classified(x(), LABEL))
    model.requires_grad_(False)  # a deployed model is frozen as a whole: it can be edited
    assert wp.edit(model, mistake(model, x()), parameters="fc.*").result is Result.satisfied


def test_tied_parameters_warn_and_are_edited_once():
    case = zoo.CASES[3]
    model = case.model()
    fix = mistake(model, case.inputs(1))
    with pytest.warns(UserWarning, match=r"embed\.weight"):
        found = wp.edit(model, fix, parameters="head.weight")
    assert list(found.patch.operations) == ["embed.weight"]


def test_meta_quantised_and_scripted_models():
    refuses(nn.Linear(6, 5, device="meta"), NotEditable, "meta", Classified(torch.ones(1, 6), LABEL), parameters="*")

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.float().T

    refuses(Quantised(), NotEditable, "int8", Classified(torch.ones(1, 6), LABEL), parameters="*")
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Linear(6, 5))
    with pytest.raises(NotEditable, match=r"[Ss]cript"):
        wp.edit(scripted, Classified(torch.ones(1, 6), LABEL))


def test_contradictory_constraints_name_the_demands():
    model = RESNET.model()
    fix = Classified(x(), LABEL) & Classified(x(), LABEL + 1)
    refuses(model, ConflictingConstraints, "class 0 and class 1", fix)


def test_an_unreachable_constraint_ends_unsatisfied():
    model = RESNET.model()
    untouched = zoo.digest(model)
    same = torch.cat([x(), x() + 1e-7])  # two inputs that no late layer can tell apart
    found = wp.edit(
        model, Classified(same, torch.tensor([0, 1])), GradientDescent(lr=0.1, max_steps=20), parameters="fc.*"
    )
    assert found.result is Result.unsatisfied
    assert found.violation > 0
    assert zoo.digest(model) == untouched


def test_parameters_that_the_answer_does_not_depend_on():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    torch.manual_seed(0)
    model = Spare()
    refuses(model, NotEditable, "does not depend on", mistake(model, torch.ones(1, 6)), parameters="spare.*")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
@pytest.mark.parametrize("call", range(1, 7))
def test_an_exception_inside_the_forward_pass(error: type[BaseException], call: int):
    class Interrupted(nn.Module):
        calls = -100

        def __init__(self) -> None:
            super().__init__()
            self.body, self.bn, self.fc = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            Interrupted.calls += 1
            if Interrupted.calls >= call:
                raise error("stop")
            return self.fc(self.bn(self.body(x)))

    torch.manual_seed(0)
    model = Interrupted()
    second = model.eval()(torch.ones(1, 6)).argsort(1)[:, -2]
    model.train()
    Interrupted.calls = 0
    refuses(model, error, "stop", Classified(torch.ones(1, 6), second, 5.0), editor=RMSProp(max_steps=20))


def test_wrong_kinds_of_arguments():
    model = RESNET.model()
    for arguments, says in (
        (("model", Classified(x(), LABEL)), "expected a torch module"),
        ((model, LABEL), "expected a constraint"),
        ((model, Classified(x(), LABEL), "RMSProp"), "expected an editor"),
    ):
        with pytest.raises(InvalidInput, match=says):
            wp.edit(*arguments)
    with pytest.raises(InvalidInput, match="weightpatch.Locality"):
        wp.edit(model, Classified(x(), LABEL), keep=x())


def test_a_model_that_returns_something_odd():
    class Odd(nn.Module):
        def __init__(self, answer) -> None:
            super().__init__()
            self.fc, self.answer = nn.Linear(6, 5), answer

        def forward(self, x: Tensor):
            return self.answer(self.fc(x))

    fix = Classified(torch.ones(1, 6), LABEL)
    refuses(Odd(lambda z: "yes"), InvalidInput, "returned str", fix)
    refuses(Odd(lambda z: z[:, :1]), ShapeMismatch, "at least 2 classes", fix)
    refuses(Odd(lambda z: z[None]), ShapeMismatch, "expected one label for each", fix)
    torch.manual_seed(0)
    for wrap in (lambda z: {"logits": z}, lambda z: (z, None), lambda z: type("Out", (), {"logits": z})()):
        model = Odd(wrap)
        with torch.no_grad():
            second = model.fc(torch.ones(1, 6)).argsort(1)[:, -2]
        assert wp.edit(model, Classified(torch.ones(1, 6), second), parameters="fc.*").result is Result.satisfied
