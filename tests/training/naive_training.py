"""Editable Training as its formulas say, one graph, full passes: what every faster way has to agree with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightpatch.editors import IterativeEditor
from weightpatch.training import Episode


def violation(logits: Tensor, labels: Tensor) -> Tensor:
    wanted = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - wanted


def kl(before: Tensor, after: Tensor) -> Tensor:
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def edit_terms(
    model: nn.Module,
    names: Sequence[str],
    editor: IterativeEditor,
    episodes: Sequence[Episode],
    keep: Tensor,
    weights: tuple[float, float, float],
    *,
    share: bool,
    reference: Tensor | None = None,
) -> Tensor:
    """c_edit L_edit + c_loc L_loc + c_gen L_gen, in evaluation mode, differentiable in the model's own parameters.

    The reference of L_loc counts as a constant; finite differences have to give it.
    """
    judge = copy.deepcopy(model).eval()  # for its modes and buffers alone
    everything = dict(model.named_parameters())

    def at(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(judge, {**everything, **params}, (x,))

    total = torch.zeros((), dtype=next(iter(everything.values())).dtype)
    for number, episode in enumerate(episodes):
        params, labels = {name: everything[name] for name in names}, episode.constraint.labels
        state = editor.init(params)
        for _ in range(editor.max_steps):
            found = violation(at(params, episode.constraint.inputs), labels) + episode.constraint.margin
            if float(found.detach().max()) <= 0:
                break
            grads = torch.autograd.grad(found.relu().sum(), list(params.values()), create_graph=True)
            params, state = editor.step(params, dict(zip(params, grads, strict=True)), state)
        n, m = len(keep), len(episodes)
        part = slice(number * n // m, (number + 1) * n // m) if share else slice(None)
        before = at({}, keep[part]).detach() if reference is None else reference[part]
        edit = (violation(at(params, episode.constraint.inputs), labels) + episode.constraint.margin).relu().mean()
        locality = kl(before, at(params, keep[part]))
        also = episode.also
        generality = 0.0 if also is None else violation(at(params, also.inputs), also.labels).relu().mean()
        total = total + (weights[0] * edit + weights[1] * locality + weights[2] * generality) / m
    return total
