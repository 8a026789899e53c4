"""`weightpatch train`: a TOML file in, a model with its figures out; and what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightpatch.cli import main
from weightpatch.cli._model import load_model
from weightpatch.editors import GradientDescent, RMSProp
from weightpatch.errors import InvalidInput
from weightpatch.tasks import images
from weightpatch.training import SparseBlock, add_block
from weightpatch.training.config import Block, Curriculum, read_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion-editable.toml"
GOOD = """
model = "weightpatch.tasks.images:fashion_classifier"
data = "small.npz"
mean = 0.2860
std = 0.3530
held_out = 60
parameters = "layer3.*"
learn = ["lr"]
edits = 2
steps = 4
batch_size = 16
lr = 1e-4
validation_edits = 3
validate_every = 2
checkpoint_every = 2
"""
EDITOR = '\n[editor]\nname = "RMSProp"\nlr = 1e-3\nmax_steps = 3\n'


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    test = images.fashion_test()[:160]
    pixels = ((test.images * 0.3530 + 0.2860) * 255).round().to(torch.uint8).squeeze(1).numpy()
    np.savez("small.npz", images=pixels, labels=test.labels.numpy())


def write(text: str) -> str:
    Path("run.toml").write_text(text)
    return "run.toml"


def run(text: str, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = main(["train", write(text), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_writes_model_history_and_result(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    text = GOOD + "distil = true\naltered = true\nc_gen = 0.1\n[curriculum]\nstart = 1\nsteps = 3\n" + EDITOR
    code, facts = run(text, "--folder", "out", capsys=capsys)
    assert code == 0
    assert json.loads(Path("out/result.json").read_text()) == facts
    assert facts["validation"]["step"] in (2, 4)
    assert 0 <= facts["validation"]["generality"] <= 1
    assert facts["editor"].startswith("RMSProp(lr={'layer3.0.conv1.weight': 0.00")
    lines = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4]
    assert lines[-2]["k"] == 3
    model = images.fashion_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = load_file("out/model.safetensors")
    model.load_state_dict(after)
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    doctor = ["doctor", "--model", "weightpatch.tasks.images:fashion_classifier", "--weights", "out/model.safetensors"]
    assert main(doctor) == 0


def test_a_block_is_added_edited_and_measured_against_the_original(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    text = (
        GOOD.replace('parameters = "layer3.*"\n', "")
        + 'distil = true\n[block]\nbefore = "fc"\nhidden = 24\nkind = "sparse"\nlr = 1e-3\n'
    )
    code, facts = run(text + EDITOR, "--folder", "out", capsys=capsys)
    assert code == 0
    assert facts["editor"].startswith("RMSProp(lr={'fc.block.outer.weight': 0.00")
    assert 0 < facts["validation"]["base_drift"] < 1
    assert 0.9 < facts["validation"]["agreement"] <= 1
    model, after = images.fashion_classifier(), load_file("out/model.safetensors")
    add_block(model, "fc", 24, kind=SparseBlock)
    model.load_state_dict(after)
    assert float(after["fc.block.outer.weight"].abs().max()) > 5e-4  # lr 1e-3: four steps of Adam
    assert code == run(text + EDITOR, "--folder", "again", capsys=capsys)[0]
    assert all(torch.equal(value, after[name]) for name, value in load_file("again/model.safetensors").items())


def test_it_goes_on_where_it_stopped_and_refuses_another_run(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    text = GOOD + 'sampler = "rank-matched"\noptimiser = "sgd"\nprecision = "bfloat16"\n' + EDITOR
    code, facts = run(text, capsys=capsys)
    assert code == 0
    weights = Path("runs/run/model.safetensors").read_bytes()
    code, again = run(text, capsys=capsys)
    assert (code, again) == (0, facts)
    assert Path("runs/run/model.safetensors").read_bytes() == weights
    code, facts = run(text.replace("edits = 2", "edits = 3"), capsys=capsys)
    assert code == 2
    assert "settings.edits is 2 there and 3 now" in facts["error"]


def test_without_weights_of_the_edit_terms_it_is_plain_training(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    text = GOOD.replace("images:fashion_classifier", "images.models:FashionResNet(classes=10)")
    text = text.replace('learn = ["lr"]\n', "c_edit = 0\nc_loc = 0\nschedule = 'one-cycle'\n")
    code, facts = run(text + EDITOR, "--folder", "out", capsys=capsys)
    assert code == 0
    lines = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]
    errors = {line["step"]: line["base_error"] for line in lines if "validation" in line}
    assert facts["validation"]["step"] == min(errors, key=lambda step: errors[step])  # chosen by accuracy alone
    steps = [line for line in lines if "validation" not in line]
    assert steps
    assert all("edit" not in line for line in steps)
    assert load_file("out/model.safetensors")["fc.weight"].shape == (10, 64)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    assert main(["train", write(GOOD.replace("steps = 4", "epochs = 1") + EDITOR)]) == 0
    told = capsys.readouterr().out
    assert "of 6 steps" in told
    assert "base error" in told


@pytest.mark.parametrize("name", ["plain", "scratch", "finetuned"])
def test_the_configs_of_resnet18_can_be_read(name: str):
    found = read_config(EXAMPLE.parent / "resnet18" / f"{name}.toml")
    assert load_model(found.model, None).fc.out_features == 10
    assert (found.c_edit > 0) == (name != "plain")


def test_the_example_can_be_read():
    found = read_config(EXAMPLE)
    assert found.editor == GradientDescent(lr=0.5, max_steps=10)
    assert found.block == Block(before="fc", hidden=1024, kind="sparse", lr=1e-3)
    assert found.parameters is None


def test_a_curriculum_and_a_block_are_read():
    text = "\n[curriculum]\nstart = 2\nsteps = 300\n[block]\nbefore = 'fc'\n"
    found = read_config(write(GOOD + EDITOR + text))
    assert found.editor == RMSProp(lr=1e-3, max_steps=3)
    assert found.curriculum == Curriculum(start=2, steps=300)
    assert found.block == Block(before="fc")
    with pytest.raises(InvalidInput, match="block.kind is 'wide'; expected elu or sparse"):
        read_config(write(GOOD + EDITOR + text + "kind = 'wide'\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise = 3\n" + GOOD + EDITOR, "there is no key batch_sise; did you mean batch_size"),
        (GOOD + EDITOR.replace("lr", "lrr"), "there is no key editor.lrr; did you mean lr"),
        (GOOD + EDITOR.replace("RMSProp", "RMSprop"), "editor.name is 'RMSprop'; expected one of Adam"),
        (GOOD + EDITOR.replace("max_steps = 3", "max_steps = 0.5"), "editor.max_steps is 0.5; expected int"),
        (GOOD + EDITOR.replace("lr = 1e-3", "lr = -1"), "lr=-1"),
        (GOOD, "editor is missing"),
        (GOOD.replace("edits = 2", "edits = true", 1) + EDITOR, "edits is True; expected int"),
        (GOOD.replace("steps = 4", 'steps = "4"') + EDITOR, "steps is '4'; expected int"),
        (GOOD + "epochs = 2\n" + EDITOR, "either epochs or steps"),
        (GOOD + 'sampler = "own"\n' + EDITOR, "sampler is 'own'; expected one of random, mistakes, rank-matched"),
        (GOOD + 'schedule = "cosine"\n' + EDITOR, "schedule is 'cosine'; expected one of constant, one-cycle"),
        (GOOD + "c_gen = 0.1\n" + EDITOR, "set altered = true"),
        (GOOD + "[curriculum]\nstart = 1\n" + EDITOR, "in curriculum: steps is missing"),
        (GOOD + "this is not TOML", "cannot be read as TOML"),
    ],
)
def test_a_configuration_that_is_wrong_says_how(text: str, message: str):
    with pytest.raises(InvalidInput, match=message):
        read_config(write(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("held_out = 60", "held_out = 155"), "held_out is 155 and batch_size 16, of 160 items"),
        (("small.npz", "missing.npz"), "missing.npz"),
        (("edits = 2", "c_loc = -1.0"), "c_loc=-1.0"),
        (('"layer3.*"', '"layer9.*"'), "layer9"),
    ],
)
def test_bad_input_is_exit_code_2(change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]):
    code, facts = run(GOOD.replace(*change) + EDITOR, capsys=capsys)
    assert code == 2
    assert message in facts["error"]
    assert not Path("runs/run/model.safetensors").exists()
