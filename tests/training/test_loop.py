"""The loop: what is skipped, what stops it, what it chooses, and that the objective works in other people's loops."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor, nn

from weightpatch.constraints import Classified
from weightpatch.editors import RMSProp
from weightpatch.errors import InvalidInput, MissingExtra, NonFinite
from weightpatch.training import (
    Accurate,
    EditableObjective,
    Figures,
    Frugal,
    Items,
    Listed,
    Ramp,
    RandomLabels,
    Sampler,
    TrainingData,
    TrainSettings,
    Validation,
    train,
)

SETTINGS = TrainSettings(steps=4, batch_size=8, edits=2, log_every=1, validate_every=1, checkpoint_every=100)


def adam(objective: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(objective.parameters(), lr=1e-2)


def parts(kind: str = "mlp") -> tuple[EditableObjective, Tensor, Tensor]:
    case = next(case for case in zoo.CASES if case.name == kind)
    model, x = case.model(), case.inputs(40)
    y = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))
    return EditableObjective(model, RMSProp(lr=1e-2, max_steps=3), parameters=case.parameters), x, y


def go(folder: Path, objective: EditableObjective, data: Any, x: Tensor, settings=SETTINGS, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    options = {"optimiser": adam, "sampler": RandomLabels(x, 5), "trackers": (), **options}
    return train(objective, data, settings=settings, folder=folder, **options)


class Poisoned(TrainingData):
    """NaN in the inputs of some batches."""

    def __init__(self, x: Tensor, y: Tensor, bad: set[int]) -> None:
        self.items, self.bad, self.number = Items(x, y), bad, itertools.count()

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Any, Any]:
        x, y = self.items.batch(index, generator)
        return (x * torch.nan if next(self.number) in self.bad else x), y


def test_it_trains(tmp_path: Path):
    objective, x, y = parts()
    before = torch.get_rng_state()
    found = go(tmp_path, objective, (x, y), x, replace(SETTINGS, steps=60, edits=1))
    assert torch.equal(torch.get_rng_state(), before)
    lines = [json.loads(line)["base"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert sum(lines[-5:]) < 0.9 * sum(lines[:5])
    assert (found.step, found.skipped, found.best, found.history) == (60, 0, None, ())


def test_a_step_is_clipped(tmp_path: Path):
    objective, x, y = parts()
    before = [p.detach().clone() for p in objective.parameters()]
    settings = replace(SETTINGS, steps=1, clip=1e-3)
    go(tmp_path, objective, (x, y), x, settings, optimiser=lambda o: torch.optim.SGD(o.parameters(), lr=1.0))
    moved = torch.cat([(p.cpu() - b).flatten() for p, b in zip(objective.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_parts_of_a_step_are_averaged(tmp_path: Path):
    moved = []
    for settings in (
        replace(SETTINGS, steps=1, batch_size=20, accumulate=2),
        replace(SETTINGS, steps=1, batch_size=40),
    ):
        objective, x, y = parts("resnet")
        objective = EditableObjective(objective.model, objective.editor, c_edit=0.0, c_loc=0.0)
        for module in objective.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
                module.forward = lambda x, m=module: nn.functional.batch_norm(  # type: ignore[method-assign]
                    x, m.running_mean, m.running_var, m.weight, m.bias
                )
        folder = tmp_path / str(settings.accumulate)
        go(folder, objective, (x, y), x, settings, optimiser=lambda o: torch.optim.SGD(o.parameters(), lr=0.1))
        moved.append(torch.cat([p.detach().flatten() for p in objective.parameters()]))
    assert torch.allclose(*moved, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_a_step_that_is_not_finite_is_skipped(kind: str, tmp_path: Path):
    objective, x, y = parts(kind)
    found = go(tmp_path, objective, Poisoned(x, y, {1, 2}), x)
    assert found.skipped == 2
    assert all(bool(torch.isfinite(value).all()) for value in objective.state_dict().values())


def test_a_loss_of_nan_leaves_weights_and_statistics(tmp_path: Path):
    objective, x, y = parts("resnet")
    objective.base_loss = lambda logits, targets: logits.sum() * torch.nan
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with pytest.raises(NonFinite, match="NaN or infinite 2 times in a row"):
        go(tmp_path, objective, (x, y), x, replace(SETTINGS, bad_steps=2))
    assert all(torch.equal(value.cpu(), before[name]) for name, value in objective.state_dict().items())
    saved = load_file(tmp_path / "bad-batch.safetensors")
    assert saved["0.0"].shape == (8, *x.shape[1:])
    assert saved["1.0.constraint.labels"].shape == (1,)


def test_few_bad_steps_apart_do_not_stop_it(tmp_path: Path):
    objective, x, y = parts()
    found = go(tmp_path, objective, Poisoned(x, y, {0, 2}), x, replace(SETTINGS, bad_steps=2))
    assert found.skipped == 2


def test_the_best_is_chosen_by_the_criterion_and_patience_ends_it(tmp_path: Path):
    objective, x, y = parts()
    validation = Validation(x, y, RandomLabels(x, 5), edits=3)
    settings = replace(SETTINGS, steps=20, patience=2)
    found = go(tmp_path, objective, (x, y), x, settings, validation=validation, criterion=lambda history: 0)
    assert found.step == 3
    assert found.best == found.history[0]
    assert found.best.step == 1
    with torch.no_grad():
        objective.model.cpu().eval()
        error = 100 * float((objective.model(x).argmax(1) != y).double().mean())
    assert error == pytest.approx(found.best.base_error)  # the model has the weights that were chosen
    again, x, y = parts()
    assert go(tmp_path, again, (x, y), x, settings, validation=validation, criterion=lambda history: 0).step == 3


def test_frugal_wants_success_first_then_few_errors():
    def figures(success: float, error: float, drawdown: float) -> Figures:
        return Figures(0, error, success, drawdown, 0.0, 1.0)

    history = [figures(0.5, 1.0, 0.0), figures(0.995, 10.0, 1.0), figures(1.0, 10.0, 2.0), figures(0.98, 5.0, 0.0)]
    assert Frugal()(history) == 1
    assert Frugal(slack=0.05)(history) == 3
    assert Frugal(slack=0.0)(history) == 2
    assert Accurate()(history) == 0
    assert Frugal()([figures(1.0, 1.0, float("nan")), figures(1.0, 50.0, 0.0)]) == 1


def test_the_curriculum_reaches_the_editor_and_is_taken_back(tmp_path: Path):
    objective, x, y = parts()
    go(tmp_path, objective, (x, y), x, replace(SETTINGS, k=Ramp(1, 6, 3)))
    lines = [json.loads(line)["k"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == [1, 3, 4, 6]
    assert objective.editor.max_steps == 3


def test_the_editor_may_be_made_anew_before_every_step(tmp_path: Path):
    objective, x, y = parts()
    first, seen, used = objective.editor, list[int](), list[Any]()

    def before(given: EditableObjective, step: int) -> None:
        assert given is objective
        seen.append(step)
        given.editor = replace(first, lr=0.0 if step == 1 else 1e-2)
        given.register_forward_hook(lambda module, args, out: used.append(module.editor.lr)) if step == 0 else None

    go(tmp_path, objective, (x, y), x, replace(SETTINGS, validate_every=100), before=before)
    assert seen == [0, 1, 2, 3]
    assert used == [1e-2, 0.0, 1e-2, 1e-2]
    assert objective.editor == first


def test_augmentation_sees_a_generator_of_the_step(tmp_path: Path):
    seen: list[float] = []

    def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(float(torch.rand(1, generator=generator)))
        return inputs

    for folder in ("one", "two"):
        objective, x, y = parts()
        go(tmp_path / folder, objective, Items(x, y, augment), x)
    assert seen[:4] == seen[4:]
    assert len(set(seen)) == 4


class Noting(Sampler):
    """Random labels, noted; asks the network about the items, which has to be in evaluation mode."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.drawn = x, []

    def draw(self, count: int, function: Any, generator: torch.Generator) -> Any:
        assert torch.equal(function(self.x), function(self.x))  # dropout would show
        assert not function(self.x).requires_grad
        found = RandomLabels(self.x, 5).draw(count, function, generator)
        self.drawn.append([(float(e.constraint.inputs.sum()), int(e.constraint.labels)) for e in found])
        return found


def test_every_step_has_edits_of_its_own_and_the_same_ones_in_every_run(tmp_path: Path):
    drawn = []
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        objective, x, y = parts()
        sampler = Noting(x)
        go(tmp_path / folder, objective, (x, y), x, replace(SETTINGS, seed=seed), sampler=sampler)
        assert objective.model.training
        drawn.append(sampler.drawn)
    one, two, three = drawn
    assert one == two
    assert len({str(step) for step in one + three}) == 8


def test_mixed_precision_trains(tmp_path: Path):
    objective, x, y = parts()
    found = go(tmp_path, objective, (x, y), x, replace(SETTINGS, precision=torch.bfloat16))
    assert found.skipped == 0
    assert {p.dtype for p in objective.parameters()} == {torch.float32}


def test_tensorboard_is_told(tmp_path: Path):
    pytest.importorskip("tensorboard")
    objective, x, y = parts()
    go(tmp_path, objective, (x, y), x, trackers=None)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_without_accelerate_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    objective, x, y = parts()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r'pip install "weightpatch\[train\]"'):
        train(objective, (x, y), sampler=RandomLabels(x, 5), settings=SETTINGS, folder=tmp_path, optimiser=adam)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainSettings(steps=0), "steps=0"),
        (lambda: TrainSettings(steps=1, edits=2.5), "edits=2.5"),  # type: ignore[arg-type]
        (lambda: TrainSettings(steps=1, clip=0.0), "clip=0"),
        (lambda: TrainSettings(steps=1, precision=torch.float64), "precision=torch.float64"),
        (lambda: TrainSettings(steps=1, patience=0), "patience=0"),
        (lambda: Ramp(0, 3, 10), "start=0"),
        (lambda: Ramp(1, 3, 0), "steps=0"),
        (lambda: Items(torch.zeros(3), torch.zeros(2)), "3 inputs and 2 targets"),
        (lambda: Validation(torch.zeros(3, 1), torch.zeros(2), Listed([1])), "labels of shape"),  # type: ignore[list-item]
    ],
)
def test_settings_out_of_range_are_refused(make, message: str):
    with pytest.raises(InvalidInput, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(SETTINGS, batch_size=41)}, "batch_size=41 and 40 items"),
        ({"settings": replace(SETTINGS, k=lambda step: 0)}, "k=0"),
        ({"sampler": "random"}, "sampler='random'"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(change: dict[str, Any], message: str, tmp_path: Path):
    objective, x, y = parts()
    with pytest.raises(InvalidInput, match=message):
        go(tmp_path, objective, (x, y), x, **change)


def test_the_recipe_of_a_plain_loop():
    objective, x, y = parts()
    optimiser = adam(objective)
    for number in range(2):
        loss = objective(Classified(x[:1], y[:1] + number - y[:1]), batch=(x, y))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert objective.terms is not None


def test_the_recipe_of_lightning_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu")
    objective, x, y = parts()
    wrapped, optimiser = fabric.setup(objective, adam(objective))
    fabric.backward(wrapped([Classified(x[:1], y[:1])], batch=(x, y)))
    optimiser.step()


def test_the_recipe_of_the_transformers_trainer(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    objective, x, y = parts()

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model([Classified(x[:1], y[:1])], batch=(inputs["x"], inputs["y"]))

    items = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no"
    )
    assert Trainer(objective, arguments, train_dataset=items).train().global_step == 2
