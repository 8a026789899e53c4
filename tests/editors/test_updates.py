"""Every update rule against torch.optim where that is the same rule, else against the formula written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightpatch.editors import Adam, GradientDescent, Momentum, RMSProp, RProp, ScaledGradientDescent
from weightpatch.editors.base import IterativeEditor
from weightpatch.errors import InvalidInput

SHAPES = {"a": (3, 2), "b": (4,)}
steps_strategy = st.integers(1, 5)
seeds = st.integers(0, 10**6)


def draws(seed: int, n: int) -> tuple[dict, list[dict]]:
    g = torch.Generator().manual_seed(seed)
    make = lambda: {k: torch.randn(*s, generator=g, dtype=torch.float64) for k, s in SHAPES.items()}  # noqa: E731
    return make(), [make() for _ in range(n)]


def walk(editor: IterativeEditor, params: dict, gradients: list[dict]) -> dict:
    state = editor.init(params)
    for grads in gradients:
        params, state = editor.step(params, grads, state)
    return params


def optim(cls, params: dict, gradients: list[dict], **settings) -> dict:
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimiser = cls(leaves.values(), **settings)
    for grads in gradients:
        for k, p in leaves.items():
            p.grad = grads[k].clone()
        optimiser.step()
    return {k: p.detach() for k, p in leaves.items()}


def same(a: dict, b: dict) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=1e-10, atol=1e-12) for k in a)


@settings(max_examples=25)
@given(seeds, steps_strategy)
def test_gradient_descent_momentum_and_adam_are_those_of_torch(seed: int, n: int):
    params, grads = draws(seed, n)
    assert same(walk(GradientDescent(lr=0.1), params, grads), optim(torch.optim.SGD, params, grads, lr=0.1))
    assert same(
        walk(Momentum(lr=0.1, momentum=0.8), params, grads), optim(torch.optim.SGD, params, grads, lr=0.1, momentum=0.8)
    )
    adam = Adam(lr=0.1, betas=(0.8, 0.95))
    assert same(walk(adam, params, grads), optim(torch.optim.Adam, params, grads, lr=0.1, betas=(0.8, 0.95)))


@settings(max_examples=25)
@given(seeds, steps_strategy)
def test_the_others_are_their_formulas(seed: int, n: int):
    params, grads = draws(seed, n)
    p, r = {k: v.clone() for k, v in params.items()}, None
    sign, scaled = {k: v.clone() for k, v in params.items()}, {k: v.clone() for k, v in params.items()}
    norm = sum(float((g**2).sum()) for g in grads[0].values()) ** 0.5
    for g in grads:
        r = {k: g[k] ** 2 if r is None else 0.5 * r[k] + 0.5 * g[k] ** 2 for k in g}
        p = {k: p[k] - 0.1 * g[k] / (r[k] + 1e-6) ** 0.5 for k in g}
        sign = {k: sign[k] - 0.1 * g[k].sign() for k in g}
        scaled = {k: scaled[k] - 0.1 * g[k] / norm for k in g}
    assert same(walk(RMSProp(lr=0.1), params, grads), p)
    assert same(walk(RProp(lr=0.1), params, grads), sign)
    assert same(walk(ScaledGradientDescent(lr=0.1), params, grads), scaled)


def test_a_zero_first_gradient_moves_nothing_and_makes_no_nan():
    params, _ = draws(0, 0)
    zero = {k: torch.zeros_like(p) for k, p in params.items()}
    for editor in (GradientDescent(), ScaledGradientDescent(), RProp(), RMSProp(), Momentum(), Adam()):
        assert same(walk(editor, params, [zero]), params)


@pytest.mark.parametrize("editor", [GradientDescent, ScaledGradientDescent, RProp, RMSProp, Momentum, Adam])
def test_steps_are_pure_differentiable_and_meet_finite_differences(editor):
    params, grads = draws(1, 3)

    def last(scale: torch.Tensor) -> torch.Tensor:
        moved = walk(
            editor(lr=0.1),
            {k: p * scale for k, p in params.items()},
            [{k: g * scale for k, g in d.items()} for d in grads],
        )
        return torch.cat([p.reshape(-1) for p in moved.values()])

    kept = {k: p.clone() for k, p in params.items()}
    assert torch.autograd.gradcheck(last, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))
    assert all(torch.equal(kept[k], params[k]) for k in params)


@pytest.mark.parametrize(
    "settings", [{"lr": -1}, {"lr": float("nan")}, {"max_steps": -1}, {"max_steps": 1.5}, {"keep_weight": -1.0}]
)
def test_bad_settings_are_refused(settings: dict):
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        RMSProp(**settings)


def test_reprs_can_be_pasted_back():
    for editor in (GradientDescent(lr=0.5), Adam(betas=(0.5, 0.6)), RMSProp(keep_weight=2.0)):
        assert eval(repr(editor)) == editor
