"""One step of Editable Training by each of those that are compared: the same objective, the gradient, no update.

The objective is ``CE(f(x), y) + C_LOC * softCE(f(x) detached, f(x; edited)) + C_EDIT * l_e(edited)``, where k steps of
gradient descent on the sum of ``margin + max_{c != y} z_c - z_y`` make the edit; base, edit and locality run in the
modes that `Task.batch_norm` asks for. The gradient of the soft cross-entropy is that of the KL divergence. Every loop
tests whether the edit holds already, as the method says; the margin is out of reach.

A step is called without arguments, leaves the gradient in the parameters' `grad`, and touches nothing else.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from weightpatch.constraints import Classified
from weightpatch.editors import GradientDescent
from weightpatch.training import EditableObjective

C_EDIT, C_LOC, MARGIN = 0.1, 0.3, 1e4
Step = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        edited: the name of the edited block; empty for the whole model.
        steps: k.
        lr: of the editor, for the sum over rows.
        batch_norm: whether the base pass normalises by batch statistics; the other passes never do.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    x_edit: Tensor
    y_edit: Tensor
    edited: str
    steps: int
    lr: float
    batch_norm: bool

    def moved(self) -> dict[str, Tensor]:
        inside = f"{self.edited}." if self.edited else ""
        return {name: p for name, p in self.model.named_parameters() if name.startswith(inside)}

    def block(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.edited)

    def base(self) -> Tensor:
        """Return the logits of the base pass; the model is in evaluation mode afterwards."""
        if not self.batch_norm:
            return self.model(self.x)  # type: ignore[no-any-return]
        self.model.train()
        logits = self.model(self.x)
        self.model.eval()
        return logits  # type: ignore[no-any-return]

    def reference(self, logits: Tensor) -> Tensor:
        """Return what predictions should stay like: by the evaluation mode's pass, as the edited side's are."""
        with torch.no_grad():
            return self.model(self.x) if self.batch_norm else logits.detach()

    def violation(self, logits: Tensor) -> Tensor:
        """Return the editor's loss, a scalar: the sum over rows."""
        index = self.y_edit[:, None]
        gap = logits.scatter(1, index, -torch.inf).amax(1) - logits.gather(1, index).squeeze(1)
        return (gap + MARGIN).relu().sum()

    def loss(self, base: Tensor, reference: Tensor, edited: Tensor, violation: Tensor) -> Tensor:
        locality = -(reference.softmax(1) * edited.log_softmax(1)).sum(1).mean()
        edit = C_EDIT / len(self.y_edit) * violation
        return F.cross_entropy(base, self.y) + C_LOC * locality + edit


def plain(task: Task) -> Step:
    """One step of ordinary training."""

    def step() -> None:
        F.cross_entropy(task.base(), task.y).backward()

    return step


def ours(task: Task, *, graph_bytes: float = 256e6) -> Step:
    """EditableObjective."""
    parameters = f"{task.edited}.*" if task.edited else "*"
    editor = GradientDescent(lr=task.lr, max_steps=task.steps)
    objective = EditableObjective(
        task.model, editor, parameters=parameters, c_edit=C_EDIT, c_loc=C_LOC, graph_bytes=graph_bytes
    )

    def step() -> None:
        if task.batch_norm:
            task.model.train()
        objective(Classified(task.x_edit, task.y_edit, MARGIN), batch=(task.x, task.y)).backward()
        if task.batch_norm:
            task.model.eval()

    return step


def naive(task: Task) -> Step:
    """torch.func as the formulas say."""

    def step() -> None:
        base = task.base()
        reference = task.reference(base)
        everything, params = dict(task.model.named_parameters()), task.moved()
        for _ in range(task.steps):
            loss = task.violation(functional_call(task.model, {**everything, **params}, (task.x_edit,)))
            if loss.item() <= 0:
                break
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - task.lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
        edited = {**everything, **params}
        violation = task.violation(functional_call(task.model, edited, (task.x_edit,)))
        task.loss(base, reference, functional_call(task.model, edited, (task.x,)), violation).backward()

    return step


def higher(task: Task) -> Step:
    """higher 0.2.1 (Grefenstette et al.)."""
    import higher as library

    optimiser = torch.optim.SGD(task.block(task.model).parameters(), task.lr)

    def step() -> None:
        base = task.base()
        reference = task.reference(base)
        with library.innerloop_ctx(task.model, optimiser, copy_initial_weights=False) as (edited, inner):
            for _ in range(task.steps):
                loss = task.violation(edited(task.x_edit))
                if loss.item() <= 0:
                    break
                inner.step(loss)
            task.loss(base, reference, edited(task.x), task.violation(edited(task.x_edit))).backward()

    return step


def torchopt(task: Task) -> Step:
    """torchopt 0.7.3."""
    import torchopt as library

    def step() -> None:
        base = task.base()
        reference = task.reference(base)
        before = library.extract_state_dict(task.model, by="reference")
        inner = library.MetaSGD(task.block(task.model), lr=task.lr)
        for _ in range(task.steps):
            loss = task.violation(task.model(task.x_edit))
            if loss.item() <= 0:
                break
            inner.step(loss)
        loss = task.loss(base, reference, task.model(task.x), task.violation(task.model(task.x_edit)))
        library.recover_state_dict(task.model, before)
        loss.backward()

    return step


def official(task: Task, folder: Path, *, published: bool = True) -> Step:
    """The published code (editable-ICLR2020/editable): its `Editable`, in a step as that of its `EditableTrainer`.

    Published, the predictions that should stay are those of the base pass, batch statistics or not, which saves a pass
    and is not the objective of the others where there are batch statistics.
    """
    editable, descent = _published(folder)
    model = editable.Editable(
        task.model,
        lambda logits, _: task.violation(logits),
        optimizer=descent(task.lr),
        max_steps=task.steps,
        get_editable_parameters=lambda module: task.block(module).parameters(),
    )
    return _official_step(task, model, published=published)


def official_sequential(task: Task, folder: Path) -> Step:
    """The published code's way to run the layers before the last block once an edit: not the true gradient."""
    editable, descent = _published(folder)
    m = task.model
    assert task.edited == "layer4.1"
    block = editable.Editable(
        m.layer4[1], lambda logits, _: task.violation(logits), optimizer=descent(task.lr), max_steps=task.steps
    )
    before = (m.conv1, m.bn1, m.relu, m.layer1, m.layer2, m.layer3, m.layer4[0])
    model = editable.SequentialWithEditable(*before, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.fc)
    return _official_step(task, model, published=True)


def _official_step(task: Task, model: nn.Module, *, published: bool) -> Step:
    def step() -> None:
        base = task.base()
        reference = base.detach() if published else task.reference(base)
        edited = model.edit(task.x_edit, task.y_edit)
        task.loss(base, reference, edited.model(task.x), edited.loss).backward()

    return step


def _published(folder: Path) -> tuple[Any, Any]:
    """Import `lib.editable` without what the package imports beside it: trainers, data sets, requests."""
    for name, path in (("lib", folder / "lib"), ("lib.utils", folder / "lib" / "utils")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    descent = importlib.import_module("lib.utils.ingraph_update").IngraphGradientDescent
    return importlib.import_module("lib.editable"), descent
