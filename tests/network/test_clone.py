"""The structural clone: shared weights, own everything else, and the model as it was."""

from __future__ import annotations

import copy
import functools
import random
import threading
import weakref
from typing import Any

import network_cases as cases
import numpy as np
import pytest
import torch
import zoo
from network_cases import NETS, made, tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from weightpatch.errors import InvalidInput, NotEditable
from weightpatch.network import preserved_rng, structural_clone


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_the_clone_answers_as_the_model_does_in_eval_mode(net: cases.Net):
    model = made(net).train()
    before = zoo.digest(model)
    clone = structural_clone(model)
    assert zoo.digest(model) == before
    args, kwargs = net.inputs(3)
    if net.name == "max-norm":  # its passes write to the shared weight, which `Network` prevents and a clone does not
        return
    expected = cases.oracle(model, {}, args, kwargs)
    with torch.no_grad():
        for a, b in zip(tensors(clone(*copy.deepcopy(args), **kwargs)), tensors(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert zoo.digest(model) == before


def test_weights_are_shared_and_buffers_are_not():
    model = zoo.TinyResNet()
    clone = structural_clone(model)
    pairs = list(zip(model.named_parameters(), clone.named_parameters(), strict=True))
    assert all(a == b and p is not q and p.data_ptr() == q.data_ptr() for (a, p), (b, q) in pairs)
    assert not any(q.requires_grad for _, (_, q) in pairs)
    for (a, p), (b, q) in zip(model.named_buffers(), clone.named_buffers(), strict=True):
        assert a == b
        assert p.data_ptr() != q.data_ptr()
        assert torch.equal(p, q)
    assert not {id(m) for m in model.modules()} & {id(m) for m in clone.modules()}
    assert model.training
    assert not any(m.training for m in clone.modules())


def test_ties_stay_ties():
    clone = structural_clone(zoo.Tied())
    assert clone.head.weight is clone.embed.weight


def test_persistent_and_other_buffers_and_plain_tensors_are_copied():
    model = nn.Module()
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("passing", torch.ones(2), persistent=False)
    model.plain, model.several = torch.ones(2), [torch.ones(2), {"deep": (torch.ones(2, requires_grad=True) * 2,)}]
    clone = structural_clone(model)
    for tensor in (clone.kept, clone.passing, clone.plain, clone.several[0]):
        tensor.zero_()
    assert not clone.several[1]["deep"][0].requires_grad
    assert all(torch.equal(t, torch.ones(2)) for t in (model.kept, model.passing, model.plain, model.several[0]))


class Hooked(nn.Module):
    """Everything that refers to modules in ways that a copy has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed, self.named = [self.lin], {"other": self.other}
        self.ref, self.bound = weakref.ref(self.lin), self.lin.forward
        self.lock, self.lines = threading.Lock(), (line for line in "ab")
        self.context = Context(self, self.lock)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.listed[0](x) + self.bound(x) + self.ref()(x) + self.named["other"](x) + self.context.owner[0].other(x)
        )


class Context:
    def __init__(self, owner: nn.Module, lock: Any) -> None:
        self.owner, self.lock = (owner,), lock


def test_everything_that_refers_to_modules_refers_to_the_copies():
    model = Hooked()
    first = model.other.forward
    model.other.forward = lambda x: first(x) * model.lin.weight.sum()  # type: ignore[method-assign]
    model.lin.forward = functools.partial(scaled, model.lin)  # type: ignore[method-assign]
    model.register_forward_hook(lambda module, args, output: output + model.lin.bias)
    clone = structural_clone(model)
    x = cases.floats(2, 4)
    expected = model(x)
    torch.testing.assert_close(clone(x), expected)
    for parameter in clone.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert not clone(x).any()
    assert torch.equal(model(x), expected)
    assert clone.lock is model.lock
    assert clone.lines is model.lines
    assert clone.context.lock is model.lock
    assert clone.context.owner[0] is clone


def scaled(module: nn.Linear, x: Tensor) -> Tensor:
    return 2 * nn.functional.linear(x, module.weight, module.bias)


def test_forward_hooks_stay_and_backward_hooks_go():
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    x = cases.floats(2, 4).requires_grad_()
    structural_clone(model)(x).sum().backward()
    assert seen == ["forward"]
    model(x).sum().backward()
    assert seen == ["forward", "forward", "backward"]


class MergesOnEval(nn.Module):
    """As low-rank adapters do: changes its weight in place when the mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def train(self, mode: bool = True) -> MergesOnEval:
        self.weight.data += 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_no_modules_own_train_is_called():
    model = MergesOnEval()
    structural_clone(model)
    assert torch.equal(model.weight, torch.ones(3))


def test_parametrised_and_old_style_norms():
    for normed in (
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        torch.nn.utils.weight_norm(nn.Linear(4, 4)),
        torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    ):
        model = nn.Sequential(normed)
        model(cases.floats(2, 4))
        model.eval()
        x = cases.floats(2, 4)
        torch.testing.assert_close(structural_clone(model)(x), model(x))


def test_graph_modules_and_recurrent_nets():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = cases.floats(2, 4)
    clone = structural_clone(traced)
    torch.testing.assert_close(clone(x), traced(x))
    assert next(clone.parameters()).data_ptr() == next(traced.parameters()).data_ptr()
    lstm = nn.LSTM(4, 4)
    twin = structural_clone(lstm)
    assert all(p is q for p, q in zip(twin._flat_weights, twin.parameters(), strict=True))
    torch.testing.assert_close(twin(x)[0], lstm(x)[0])


def test_inference_tensors_become_normal_ones():
    with torch.inference_mode():
        model = nn.Linear(4, 4)
        clone = structural_clone(model)
    assert model.weight.is_inference()
    assert not clone.weight.is_inference()


def wrapped(name: str) -> nn.Module:
    return type(name, (nn.Module,), {"__module__": "torch.nn.parallel"})()


@pytest.mark.parametrize(
    ("build", "advice"),
    [
        (lambda: torch.jit.script(nn.Linear(2, 2)), "eager module"),
        (
            lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
            "its part '0' is TopLevelTracedModule",
        ),
        (lambda: torch.compile(nn.Linear(2, 2)), "_orig_mod"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "model.module"),
        (lambda: wrapped("DistributedDataParallel"), "model.module"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (lambda: nn.LazyLinear(2), "run the lazy model once"),
    ],
)
def test_what_cannot_be_edited_is_refused_with_advice(build: Any, advice: str):
    with pytest.raises(NotEditable, match=advice):
        structural_clone(build())


def test_fake_tensors_are_refused():
    with torch._subclasses.FakeTensorMode():
        model = nn.Linear(2, 2)
    with pytest.raises(NotEditable, match="fake tensor"):
        structural_clone(model)


def test_a_module_compiled_in_place_is_cloned_eagerly():
    model = nn.Linear(4, 4)
    model.compile(backend="eager")
    assert structural_clone(model)._compiled_call_impl is None


def test_not_a_module():
    with pytest.raises(InvalidInput, match=r"expected a torch\.nn\.Module"):
        structural_clone(torch.relu)  # type: ignore[arg-type]


def test_random_generators_are_put_back_also_after_an_exception():
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].sum()

    def draw_and_fail() -> None:
        with preserved_rng(torch.device("cpu")):
            torch.rand(3), random.random(), np.random.rand(3)
            assert states() != before
            raise ZeroDivisionError

    before = states()
    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert states() == before
