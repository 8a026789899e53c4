"""The command line as its users meet it: what is printed, what is written, and the exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from weightpatch import Patch
from weightpatch.cli import main
from weightpatch.tasks import images

MODEL = "weightpatch.tasks.images:fashion_classifier"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def mistake() -> int:
    test, model = images.fashion_test()[:500], images.fashion_classifier()
    with torch.no_grad():
        return int((model(test.images).argmax(1) != test.labels).nonzero()[0])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The first 300 test images, already normalised numbers as an .npz of bytes."""
    test = images.fashion_test()[:300]
    pixels = ((test.images * 0.3530 + 0.2860) * 255).round().to(torch.uint8).squeeze(1).numpy()
    np.savez(tmp_path / "small.npz", images=pixels, labels=test.labels.numpy())
    return tmp_path / "small.npz"


def reading(path: Path) -> list[str]:
    return ["--data", str(path), "--mean", "0.2860", "--std", "0.3530"]


def run(*words: str, capsys: pytest.CaptureFixture[str] | None = None) -> tuple[int, dict]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out) if capsys else {}


def edit(small: Path, item: int, *words: str) -> list[str]:
    return ["edit", "--model", MODEL, *reading(small), "--item", str(item), "--parameters", "layer3.*", *words]


@pytest.fixture
def wrong(small: Path) -> int:
    test, model = images.fashion_test()[:300], images.fashion_classifier()
    with torch.no_grad():
        return int((model(test.images).argmax(1) != test.labels).nonzero()[0])


def test_help_does_not_import_torch():
    code = (
        "import sys; from weightpatch.cli import main; c = main(['--help']);"
        "assert 'torch' not in sys.modules; sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "edit", "evaluate", "diff", "apply", "revert", "inspect", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["demo", "edit", "evaluate", "diff", "apply", "revert", "inspect", "doctor"])
def test_every_command_explains_itself(command: str, capsys):
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_journey(small: Path, wrong: int, capsys, tmp_path: Path):
    code, facts = run(*edit(small, wrong, "--output", "fix.patch.safetensors", "--report", "fix.html"), capsys=capsys)
    assert (code, facts["result"]) == (0, "satisfied")
    assert Path("fix.html").exists()
    save_file(images.fashion_classifier().state_dict(), "base.safetensors")

    code, facts = run("inspect", "fix.patch.safetensors", capsys=capsys)
    assert code == 0
    assert all(tensor["name"].startswith("layer3.") for tensor in facts["tensors"])
    code, _ = run(
        "apply",
        "fix.patch.safetensors",
        "--weights",
        "base.safetensors",
        "--output",
        "patched.safetensors",
        capsys=capsys,
    )
    assert code == 0
    base, patched = load_file("base.safetensors"), load_file("patched.safetensors")
    assert {name for name in base if not torch.equal(base[name], patched[name])} <= {
        n for n in base if n.startswith("layer3.")
    }
    model = images.fashion_classifier()
    model.load_state_dict(patched)
    test = images.fashion_test()[:300]
    assert int(model(test.images[wrong : wrong + 1]).argmax()) == int(test.labels[wrong])

    where = ["--model", MODEL, "--test", str(small), "--mean", "0.2860", "--std", "0.3530"]
    code, facts = run("diff", "base.safetensors", "patched.safetensors", *where, "--report", "diff.html", capsys=capsys)
    assert code == 0
    assert Path("diff.html").exists()
    code, same = run("diff", "base.safetensors", "fix.patch.safetensors", *where, capsys=capsys)
    assert same["comparison"] == facts["comparison"]
    code, _ = run("diff", "patched.safetensors", "base.safetensors", *where, "--max-broken", "0", capsys=capsys)
    assert code == 1
    code, _ = run(
        "revert",
        "fix.patch.safetensors",
        "--weights",
        "patched.safetensors",
        "--output",
        "again.safetensors",
        capsys=capsys,
    )
    assert code == 0
    again = load_file("again.safetensors")
    assert all(torch.equal(base[name], again[name]) for name in base)


def test_reports_name_the_rows_of_the_users_data(small: Path, capsys):
    data = images.load(small, mean=0.2860, std=0.3530)
    model = images.fashion_classifier().eval()
    with torch.no_grad():
        answers = model(data.images).argmax(1)
    item = int((answers != data.labels).nonzero()[-1])  # far from its place among those that are left
    words = ["--output", "fix.patch.safetensors", "--report", "fix.html", "--editor", "RMSProp", "--lr", "1e-2"]
    code, facts = run(*edit(small, item, *words, "--keep", "70"), capsys=capsys)
    assert code == 0 and facts["items"] == [{"row": item, "name": item}]
    told = json.loads(Path("fix.json").read_text())
    assert told["mistakes"][0]["item"] == f"row {item} of small.npz" in Path("fix.html").read_text()
    with Patch.load("fix.patch.safetensors").applied(model), torch.no_grad():
        after = model(data.images).argmax(1)
    changed = {kind: facts["comparison"][kind] for kind in ("broken", "repaired", "other")}
    assert changed == {kind: told["comparison"][kind] for kind in changed}
    assert sum(map(len, changed.values())) > 2
    right = {"broken": answers, "repaired": after}
    for kind, rows in changed.items():
        assert all(answers[row] != after[row] for row in rows)
        assert kind == "other" or all(right[kind][row] == data.labels[row] for row in rows)


def test_a_constraint_that_is_not_met_gives_1_and_no_patch(small: Path, wrong: int, capsys):
    code, facts = run(*edit(small, wrong, "--editor", "RMSProp", "--margin", "1e6", "--max-steps", "2"), capsys=capsys)
    assert (code, facts["result"]) == (1, "unsatisfied")
    assert not Path("edit.patch.safetensors").exists()


def test_a_gate_that_is_not_met_gives_1_and_no_patch(small: Path, wrong: int, capsys):
    words = edit(
        small, wrong, "--label", "0", "--editor", "RProp", "--lr", "0.1", "--no-shrink", "--max-drawdown", "-99"
    )
    code, facts = run(*words, capsys=capsys)
    assert code == 1
    assert facts["gate"] is False
    assert not Path("edit.patch.safetensors").exists()


def test_the_exit_code_goes_by_the_verdict(small: Path, wrong: int, capsys):
    coarse = edit(small, wrong, "--editor", "RProp", "--lr", "0.02", "--no-shrink", "--max-steps", "5")
    code, facts = run(*coarse, capsys=capsys)
    assert (code, facts["result"], facts["gate"], facts["verdict"]["level"]) == (1, "satisfied", True, "red")
    assert Path(facts["output"]).exists()  # for those who accept that
    assert facts["kept"]["items"] == 75 > facts["held_out"]["items"] and facts["held_out"]["upper"] > 0.5
    assert main(coarse) == 1
    told = capsys.readouterr().out
    assert re.search(r"^kept .* of 75 answers changed.*\nheld out .* at most [\d.]+ % of others", told, re.MULTILINE)
    assert re.search(r"^verdict  red: Over all items, the error moved by \+", told, re.MULTILINE)

    save_file(images.fashion_classifier().state_dict(), "base.safetensors")
    where = ["--model", MODEL, "--test", str(small), "--mean", "0.2860", "--std", "0.3530"]
    code, facts = run("diff", "base.safetensors", "edit.patch.safetensors", *where, capsys=capsys)
    assert code == 1 and facts["gates_failed"] == [] and facts["verdict"]["level"] == "red"
    same = ["diff", "base.safetensors", "base.safetensors", *where]  # 300 items are too few to know of 1 point
    code, facts = run(*same, capsys=capsys)
    assert code == 0 and facts["verdict"] == facts["comparison"]["verdict"] and facts["verdict"]["level"] == "amber"
    assert run(*same, "--strict", capsys=capsys)[0] == 1
    code, facts = run(*same, "--strict", "--max-drawdown", "5", capsys=capsys)
    assert code == 0 and facts["verdict"]["level"] == "green"


def test_evaluate_continues_and_gates(small: Path, capsys):
    words = [
        "evaluate",
        "--model",
        MODEL,
        *reading(small),
        "--edits",
        "4",
        "--labels",
        "random",
        "--parameters",
        "fc.*",
    ]
    code, facts = run(*words, "--results", "r.jsonl", "--output", "summary.json", "--lr", "0.01", capsys=capsys)
    assert code == 0
    lines = Path("r.jsonl").read_text().splitlines()
    assert len(lines) == 5
    code, again = run(*words, "--results", "r.jsonl", "--lr", "0.01", capsys=capsys)
    assert Path("r.jsonl").read_text().splitlines() == lines
    assert again == facts
    code, _ = run(*words, "--min-success", "1.1", capsys=capsys)
    assert code == 1


def test_doctor_says_what_can_be_edited(capsys):
    code, facts = run("doctor", "--model", MODEL, "--parameters", "fc.*", capsys=capsys)
    assert code == 0
    assert [row["name"] for row in facts["parameters"]] == ["fc.weight", "fc.bias"]
    assert all(row["editable"] for row in facts["parameters"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["doctor", "--model", "nothing"], "package.module:factory"),
        (["doctor", "--model", "torch.nn:Linear(3)"], "package.module:factory"),
        (["doctor", "--model", "torch.nn:Linear(in_features=print())"], "package.module:factory"),
        (["doctor", "--model", "torch.nn:Linear(width=3)"], "could not be called"),
        (["doctor", "--model", "json:nothing"], "could not be imported"),
        (["doctor", "--model", "json:JSONDecoder"], "expected a torch.nn.Module"),
        (["doctor", "--model", MODEL, "--weights", "absent.pt"], "is not a file"),
        (["edit", "--model", MODEL, "--item", "99999"], "rows from 0 to 9999"),
        (["edit", "--model", MODEL, "--item", "1", "--label", "Hat"], "Ankle boot"),
        (["edit", "--model", MODEL, "--item", "1", "--data", "absent"], "does not exist"),
        (["edit", "--model", MODEL, "--item", "1", "--label", "3", "--parameters", "layr3.*"], "layer3"),
        (["inspect", "absent.patch.safetensors"], "absent"),
    ],
)
def test_bad_input_gives_2_and_says_why(words: list[str], says: str, capsys):
    assert main(words) == 2
    assert says in capsys.readouterr().err
    code, facts = run(*words, capsys=capsys)
    assert code == 2
    assert says in facts["error"]


@pytest.mark.parametrize("words", [["--labels", "mistakes"], ["--labels", "random"]])
def test_data_of_more_classes_than_the_model_has_is_refused(words: list[str], small: Path, capsys):
    content = dict(np.load(small))
    content["labels"][7] = 10
    np.savez(small, **content)
    code, facts = run("evaluate", "--model", MODEL, *reading(small), *words, "--edits", "2", capsys=capsys)
    assert code == 2
    assert "expected 0 to 9" in facts["error"] and words[1] in facts["error"]


def test_usage_errors_give_2(capsys):
    assert main(["edit"]) == 2
    assert main(["nothing"]) == 2


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_weights_that_would_run_code_are_refused(capsys):
    torch.save({"fc.weight": Code()}, "evil.pt")
    assert main(["doctor", "--model", MODEL, "--weights", "evil.pt"]) == 2
    assert "evil.pt" in capsys.readouterr().err
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_weights_load_from_every_kind_of_file(name: str, capsys):
    state = images.fashion_classifier().state_dict()
    if name.endswith(".safetensors"):
        save_file(state, name)
    else:
        torch.save(state, name)
    _, plain = run("doctor", "--model", MODEL, capsys=capsys)
    _, loaded = run("doctor", "--model", MODEL, "--weights", name, capsys=capsys)
    assert plain["fingerprint"] == loaded["fingerprint"]


def test_weights_that_do_not_fit_are_refused(capsys):
    save_file({"fc.weight": torch.zeros(2)}, "other.safetensors")
    assert main(["doctor", "--model", MODEL, "--weights", "other.safetensors"]) == 2
    assert "does not fit the model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_does_the_whole_journey(capsys, tmp_path: Path):
    code, facts = run("demo", "--edits", "5", "--output", "out", capsys=capsys)
    assert code == 0
    assert Path(facts["patch"]).exists()
    page = Path(facts["report"]).read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    kinds = ("real mistakes", "random labels")
    assert set(facts["evaluations"]) == {f"{kind}, {name}" for kind in kinds for name in ("plain", "editable")}
