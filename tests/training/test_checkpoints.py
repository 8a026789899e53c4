"""A run that is killed ends where an uninterrupted one does, bit for bit; a torn or foreign checkpoint is not used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from weightpatch.editors import RMSProp
from weightpatch.errors import InvalidInput
from weightpatch.training import (
    EditableObjective,
    Items,
    Mistakes,
    Ramp,
    Trained,
    TrainSettings,
    Validation,
    checkpoints,
    train,
)

pytest.importorskip("accelerate")
STEPS = 12
SETTINGS = TrainSettings(
    steps=STEPS, batch_size=8, edits=2, accumulate=2, k=Ramp(1, 3, 8), log_every=1, validate_every=5, checkpoint_every=3
)


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def build(kind: str = "mlp") -> tuple[EditableObjective, Tensor, Tensor]:
    case = next(case for case in zoo.CASES if case.name == kind)
    model, x = case.model(), case.inputs(40)
    y = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))
    editor = RMSProp(lr=1e-2, max_steps=3)
    return EditableObjective(model, editor, parameters=case.parameters, learn=["lr"]), x, y


def go(
    folder: Path, kind: str = "mlp", settings: TrainSettings = SETTINGS, **changes: Any
) -> tuple[Trained, nn.Module]:
    objective, x, y = build(kind)
    options: dict[str, Any] = {
        "sampler": Mistakes(x, y),
        "optimiser": lambda o: torch.optim.Adam(o.parameters(), lr=1e-2),
        "schedule": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS),
        "validation": Validation(x, y, Mistakes(x, y), edits=3),
        **changes,
    }
    data = Items(x, y, noisy)
    return train(objective, data, settings=settings, folder=folder, trackers=(), **options), objective


def killed(folder: Path, kind: str, step: int) -> None:
    """Run in another process that is killed by SIGKILL in the middle of a step."""
    code = f"""
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import test_checkpoints as t
from weightpatch.training.stepping import Stepper
update = Stepper._backward
def deadly(self, step):
    found = update(self, step)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Stepper._backward = deadly
t.go(Path({str(folder)!r}), {kind!r})
"""
    sources = Path(checkpoints.__file__).parents[2]
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1], sources)))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def last_weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / f"step-{STEPS:09d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained, nn.Module]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, *go(folder)


@pytest.mark.parametrize("step", [1, 7])
def test_a_killed_run_ends_at_the_same_bits(step: int, whole: tuple[Path, Trained, nn.Module], tmp_path: Path):
    folder, expected, objective = whole
    killed(tmp_path, "mlp", step)
    found, resumed = go(tmp_path)
    assert last_weights(tmp_path) == last_weights(folder)
    for (name, one), two in zip(resumed.state_dict().items(), objective.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert (tmp_path / "history.jsonl").read_text() == (folder / "history.jsonl").read_text()


def test_a_network_with_batch_statistics_goes_on_exactly(tmp_path: Path):
    short = replace(SETTINGS, accumulate=1, validate_every=100)
    go(tmp_path / "whole", "resnet", short, validation=None)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{STEPS:09d}")
    go(tmp_path / "part", "resnet", short, validation=None)
    assert last_weights(tmp_path / "part") == last_weights(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(whole: tuple[Path, Trained, nn.Module], tmp_path: Path):
    folder, expected, objective = whole
    shutil.copytree(folder, tmp_path / "copy")
    found, again = go(tmp_path / "copy", optimiser=lambda o: torch.optim.Adam(o.parameters(), lr=1e-2))
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), objective.parameters(), strict=True))


@pytest.mark.parametrize("harm", ["cut", "changed", "no manifest", "partial"])
def test_a_torn_checkpoint_is_left_out(harm: str, whole: tuple[Path, Trained, nn.Module], tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    last = folder / "checkpoints" / f"step-{STEPS:09d}"
    if harm == "cut":
        os.truncate(last / "optimizer.bin", 100)
    elif harm == "changed":
        content = bytearray((last / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (last / "model.safetensors").write_bytes(content)
    elif harm == "no manifest":
        (last / "manifest.json").unlink()
    else:
        last.rename(last.with_name(f".partial-{STEPS:09d}"))
    if harm == "partial":
        found, _ = go(folder)
    else:
        with pytest.warns(UserWarning, match="is damaged and is left out"):
            found, _ = go(folder)
    assert replace(found, seconds=0) == replace(whole[1], seconds=0)
    assert last_weights(folder) == last_weights(whole[0])
    assert not list(folder.glob("checkpoints/.partial*"))


def test_the_last_two_are_kept_and_only_the_best_weights(whole: tuple[Path, Trained, nn.Module]):
    folder, found, _ = whole
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000009", "step-000000012"]
    assert found.best is not None
    assert [path.name for path in (folder / "weights").iterdir()] == [f"step-{found.best.step:09d}.safetensors"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"settings": replace(SETTINGS, seed=1)}, "settings.seed is 0 there and 1 now"),
        ({"settings": replace(SETTINGS, k=Ramp(1, 2, 8))}, "settings.k.end is 3 there and 2 now"),
        (
            {"optimiser": lambda o: torch.optim.SGD(o.parameters(), lr=1e-2, momentum=0.9)},
            r"optimiser.is is .Adam. there and .SGD. now",
        ),
        ({"schedule": None}, r"schedule is OneCycleLR\(...\) there and None"),
        ({"validation": None}, r"validation is Validation\(...\) there and None"),
        ({"kind": "resnet", "schedule": None}, "model is '.*' there and 'TinyResNet"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], names: str, whole: tuple[Path, Trained, nn.Module]
):
    with pytest.raises(InvalidInput, match=f"(?s)is a checkpoint of another run.*{names}"):
        go(whole[0], **changes)


def test_another_function_of_a_schedule_or_sampler_is_another_run(tmp_path: Path):
    def options(rate: float, shift: float) -> dict[str, Any]:
        schedule = torch.optim.lr_scheduler.LambdaLR
        _, x, y = build()
        sampler = Mistakes(x, y, lambda inputs, generator: inputs + shift)
        return {"sampler": sampler, "schedule": lambda o: schedule(o, lambda step: rate), "validation": None}

    settings = replace(SETTINGS, steps=3)
    go(tmp_path, settings=settings, **options(0.5, 0.1))
    for rate, shift, says in ((0.6, 0.1, r"schedule.functions\[0\] is"), (0.5, 0.2, "sampler.altered is")):
        with pytest.raises(InvalidInput, match=says):
            go(tmp_path, settings=settings, **options(rate, shift))
    go(tmp_path, settings=settings, **options(0.5, 0.1))


def test_other_data_is_another_run(whole: tuple[Path, Trained, nn.Module]):
    objective, x, y = build()
    with pytest.raises(InvalidInput, match="data.inputs is .*there"):
        train(
            objective,
            (x + 1, y),
            sampler=Mistakes(x, y),
            settings=SETTINGS,
            folder=whole[0],
            optimiser=lambda o: torch.optim.Adam(o.parameters()),
            trackers=(),
        )


def test_the_history_has_every_step_once(whole: tuple[Path, Trained, nn.Module]):
    lines = [json.loads(line) for line in (whole[0] / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation" in line] == [5, 10, 12]
    assert [line["k"] for line in lines if "loss" in line] == [Ramp(1, 3, 8)(step) for step in range(STEPS)]
