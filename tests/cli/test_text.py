"""Text models on the command line: the journey of a patch on a model folder, gates, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import text_folders as folders
import torch
from safetensors.torch import load_file

from weightpatch.cli import main
from weightpatch.cli._late import late_weights
from weightpatch.patches import Patch
from weightpatch.tasks.text import load

TARGET = {"translation": "w7 w8", "lm": "w7 w8", "text-classification": "happy"}
SOURCE = "w3 w4 w5"
GENTLE = ["--editor", "RMSProp", "--lr", "1e-2", "--max-steps", "60", "--keep-weight", "1", "--no-shrink"]
GENTLE += ["--max-new-tokens", "8"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = folders.sentences(12)
    Path("texts.txt").write_text("\n".join([SOURCE, *texts]) + "\n\n", encoding="utf-8")
    lines = [f"{a}\t{b}" for a, b in zip(texts, folders.sentences(12, 1), strict=True)]
    Path("pairs.txt").write_text("\n".join(lines), encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def edit(model: Path, task: str, *words: object) -> list[object]:
    return ["edit", "--task", task, model, "--source", SOURCE, "--target", TARGET[task], *GENTLE, *words]


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def answer(folder: Path, task: str, text: str = SOURCE) -> str:
    kind = load(folder, task, settings={"max_new_tokens": 8})
    if task != "text-classification":
        return kind.answer(text)
    with torch.no_grad():
        return kind.model.config.id2label[int(kind.model(**kind.inputs([text])).logits.argmax())]


@pytest.mark.parametrize("task", folders.MAKE)
def test_the_journey_of_a_patch_on_a_model_folder(task, models, capsys):
    model = models[task]
    seen = digest(model)
    kept = ["--keep-texts", "texts.txt", "--keep", 4, "--report", "fix.html"]
    code, facts = run(capsys, *edit(model, task, *kept))
    assert (code, facts["result"], facts["verdict"]["level"]) == (1, "satisfied", "red")
    assert facts["gate"] and Path(facts["output"]).exists()  # the patch is there for those who accept that
    code, facts = run(capsys, *edit(model, task, *kept, "--max-changed", 100))
    assert (code, facts["verdict"]["level"]) == (0, "amber")
    assert run(capsys, *edit(model, task, *kept, "--max-changed", 100, "--strict"))[0] == 1
    assert digest(model) == seen
    assert (
        facts["kept"]["items"] == 4 and facts["comparison"]["n"] == 8
    )  # the source itself is neither kept nor measured
    (told,) = facts["answers"]
    assert told["before"] == answer(model, task) and told["after"].startswith(TARGET[task])
    assert SOURCE in Path("fix.html").read_text()

    code, found = run(capsys, "inspect", "edit.patch.safetensors")
    assert code == 0 and {tensor["name"] for tensor in found["tensors"]} <= set(facts["parameters"])

    code, _ = run(capsys, "apply", "edit.patch.safetensors", "--weights", model, "--output", "patched")
    assert code == 0 and digest(model) == seen
    assert answer(Path("patched"), task) == told["after"]
    live = load(model, task).model
    Patch.load("edit.patch.safetensors").apply(live)
    own = load(Path("patched"), task).model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in live.state_dict().items())

    where = ["--task", task, "--texts", "texts.txt", "--max-new-tokens", 8]
    code, files = run(capsys, "diff", model, "patched", *where)
    assert code == 1 and files["gates_failed"] == [] and files["verdict"]["level"] == "red"
    where += ["--max-changed", 100]
    code, files = run(capsys, "diff", model, "patched", *where, "--report", "diff.html")
    assert code == 0 and Path("diff.html").exists()
    _, patch = run(capsys, "diff", model, "edit.patch.safetensors", *where)
    assert patch["comparison"] == files["comparison"]
    assert SOURCE in [row["text"] for row in files["comparison"]["rows"]]
    lines = Path("texts.txt").read_text().splitlines()
    assert all(lines[row["item"] - 1] == row["text"] for row in files["comparison"]["rows"])
    assert run(capsys, "diff", model, "patched", *where, "--strict")[0] == 1
    code, files = run(capsys, "diff", model, "patched", *where[:-1], 0)
    assert code == 1 and "answers changed" in files["gates_failed"][0]

    code, _ = run(capsys, "revert", "edit.patch.safetensors", "--weights", "patched", "--output", "again")
    assert code == 0 and digest(Path("again")) == seen


def test_a_folder_is_patched_in_place_by_several_patches(models, capsys):
    shutil.copytree(models["translation"], "own")
    seen = digest(Path("own"))
    run(capsys, *edit(Path("own"), "translation", "--output", "a.patch.safetensors"))
    words = ["--source", "w9", "--target", "w10", *GENTLE, "--parameters", "model.decoder.layers.1.*"]
    run(capsys, "edit", "--task", "translation", "own", *words, "--output", "b.patch.safetensors")
    for name in "ab":
        code, facts = run(capsys, "apply", f"{name}.patch.safetensors", "--weights", "own")
        assert code == 0
    assert len(facts["patches"]) == 2
    code, facts = run(capsys, "apply", "a.patch.safetensors", "--weights", "own/model.safetensors")
    assert code == 2 and "applied already" in facts["error"]
    for name in "ab":
        assert run(capsys, "revert", f"{name}.patch.safetensors", "--weights", "own")[0] == 0
    assert digest(Path("own")) == seen


def test_a_patch_of_another_model_is_refused(models, capsys):
    folders.translator(Path("other"))
    state = load_file("other/model.safetensors")
    state["final_logits_bias"][0, 3] += 1  # nothing that the patch touches
    from safetensors.torch import save_file

    save_file(state, "other/model.safetensors", {"format": "pt"})
    run(capsys, *edit(models["translation"], "translation"))
    seen = digest(Path("other"))
    code, facts = run(capsys, "apply", "edit.patch.safetensors", "--weights", "other")
    assert code == 2 and "made for another model" in facts["error"] and digest(Path("other")) == seen


def test_several_mistakes_at_once(models, capsys):
    words = ["--source", "w9 w2", "--target", "w4", "--parameters", "model.decoder.layers.*", "--num-beams", "2"]
    code, facts = run(capsys, *edit(models["translation"], "translation", *words))
    assert code == 0 and [told["after"] for told in facts["answers"]] == ["w7 w8", "w4"]
    assert facts["comparison"] is None


def test_gates_refuse_a_patch(models, capsys):
    words = edit(models["translation"], "translation", "--keep-texts", "pairs.txt", "--lr", "0.1")
    code, facts = run(capsys, *words, "--max-changed", 1)
    assert code == 1 and facts["gate"] is False and facts["result"] == "satisfied"
    assert facts["comparison"]["scoring"]["name"] == "BLEU" and "tok:13a" in facts["comparison"]["scoring"]["signature"]
    code, facts = run(capsys, *words, "--max-drawdown", -100)
    assert code == 1 and facts["output"] is None
    assert not Path("edit.patch.safetensors").exists()
    code, facts = run(capsys, *words, "--max-drawdown", 100, "--max-changed", 100)
    assert code == 0 and Path(facts["output"]).exists()


def test_what_is_not_met_gives_1_and_no_patch(models, capsys):
    code, facts = run(capsys, *edit(models["lm"], "lm", "--max-steps", 1, "--margin", 1e6))
    assert (code, facts["result"]) == (1, "unsatisfied")
    assert not Path("edit.patch.safetensors").exists()


def test_references_of_a_classifier_are_classes(models, capsys):
    texts = folders.sentences(6)
    Path("named.txt").write_text("\n".join(f"{text}\thappy" for text in texts))
    Path("numbered.txt").write_text("\n".join(f"{text}\t1" for text in texts))
    Path("odd.txt").write_text("\n".join(f"{text}\tangry" for text in texts))
    model, task = models["text-classification"], "text-classification"
    right = sum(answer(model, task, text) == "happy" for text in texts)
    _, named = run(capsys, "diff", model, model, "--task", task, "--texts", "named.txt")
    _, numbered = run(capsys, "diff", model, model, "--task", task, "--texts", "numbered.txt")
    assert named["comparison"]["scores"]["before"] == pytest.approx(100 * right / 6)
    assert named["comparison"] == numbered["comparison"]
    code, facts = run(capsys, "diff", model, model, "--task", task, "--texts", "odd.txt")
    assert code == 2 and "'angry'" in facts["error"] and "bored" in facts["error"]


def test_the_default_editor_keeps_within_its_budget(models, capsys):
    words = ["--source", "w1 w2", "--target", "sad", "--keep-texts", "texts.txt"]
    for extra in ([], ["--no-gate"]):
        _, facts = run(capsys, "edit", "--task", "text-classification", models["text-classification"], *words, *extra)
        assert facts["result"] in ("satisfied", "over_budget", "already_satisfied")
        assert any("gate" in attempt["name"] for attempt in facts["attempts"]) <= (not extra)


def test_what_may_move_is_found_by_structure(models):
    for task, expected in {
        "translation": ["model.decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc2.weight"],
        "lm": ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"],
        "text-classification": [
            "bert.encoder.layer.1.intermediate.dense.weight",
            "bert.encoder.layer.1.output.dense.weight",
        ],
    }.items():
        kind = load(models[task], task)
        inputs = kind.inputs(["w3"]) if task == "text-classification" else kind.forced(["w3"], ["w4"])[0]
        assert [name.replace("[[]", "[") for name in late_weights(kind.model, inputs)] == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["edit", "--task", "translation", "absent", "--source", "w1", "--target", "w2"], "absent does not exist"),
        (["edit", "--task", "translation", ".", "--source", "w1", "--target", "w2"], "does not hold a model"),
        (["edit", "--task", "translation", "MT", "--source", "w1"], "--target 0 times"),
        (["edit", "--task", "translation", "MT", "--target", "w1"], "--source was given 0 times"),
        (["edit", "--task", "translation", "MT", "--source", "w1", "--target", " "], "empty text"),
        (["edit", "--task", "translation", "MT", "--source", "w1", "--target", "w1 house"], "no token for some of it"),
        (["edit", "--task", "lm", "LM", "--source", "w1", "--target", "house"], "no token for some of it"),
        (["edit", "--task", "lm", "LM", "--source", "w1", "--target", "w2", "--chat"], "no chat template"),
        (["edit", "--task", "translation", "LM", "--source", "w1", "--target", "w2"], "--task translation"),
        (["edit", "--task", "text-classification", "CL", "--source", "w1", "--target", "angry"], "sad, happy, bored"),
        (["edit", "--task", "lm", "LM", "--source", "w1", "--target", "w2", "--parameters", "x*"], "transformer"),
        (["edit", "--task", "lm", "LM", "--source", "w1", "--target", "w2", "--max-changed", "1"], "--keep-texts"),
        (["edit", "--task", "lm", "LM", "--source", "w1", "--target", "w2", "--report", "a.html"], "--keep-texts"),
        (["edit", "--task", "lm", "LM", "--source", "w1", "--target", "w2", "--num-beams", "0"], "at least 1"),
        (["diff", "LM", "LM", "--task", "lm", "--texts", "texts.txt", "--max-drawdown", "1"], "needs references"),
        (["diff", "LM", "LM", "--task", "lm", "--texts", "absent.txt"], "cannot be read"),
        (["diff", "LM", "LM", "--task", "lm", "--texts", "empty.txt"], "empty"),
        (["diff", "LM", "LM", "--task", "lm", "--texts", "mixed.txt"], "line 2 of mixed.txt"),
        (["apply", "absent.patch.safetensors", "--weights", "LM"], "absent"),
    ],
)
def test_bad_input_gives_2_and_says_why(words, says, models, capsys):
    names = {"MT": models["translation"], "LM": models["lm"], "CL": models["text-classification"]}
    Path("empty.txt").write_text("\n \n")
    Path("mixed.txt").write_text("w1\tw2\nw3\n")
    code, facts = run(capsys, *[names.get(word, word) for word in words])
    assert code == 2
    assert says in facts["error"], facts["error"]


def test_folders_that_hold_no_single_file_of_weights_are_refused(models, capsys):
    run(capsys, *edit(models["lm"], "lm"))
    Path("none").mkdir()
    code, facts = run(capsys, "apply", "edit.patch.safetensors", "--weights", "none")
    assert code == 2 and "no model.safetensors" in facts["error"]
    Path("none/model.safetensors.index.json").write_text("{}")
    code, facts = run(capsys, "apply", "edit.patch.safetensors", "--weights", "none")
    assert code == 2 and "several files" in facts["error"]
    Path("there").mkdir()
    code, facts = run(capsys, "apply", "edit.patch.safetensors", "--weights", models["lm"], "--output", "there")
    assert code == 2 and "there exists" in facts["error"] and not list(Path("there").iterdir())


@pytest.mark.parametrize("task", ["translation", "lm", "text-classification", "images"])
def test_help_is_that_of_the_task(task, capsys):
    assert main(["edit", "--task", task, "--help"]) == 0
    assert ("--source" in capsys.readouterr().out) == (task != "images")


def test_an_unknown_task_is_refused(capsys):
    assert main(["edit", "--task", "music", "--model", "a:b", "--item", "1"]) == 2
    assert "text-classification" in capsys.readouterr().err


def test_the_demo_mends_a_plain_and_an_editable_translator(models, capsys, monkeypatch):
    from weightpatch.editors import RMSProp
    from weightpatch.tasks import translation

    pairs = translation.Pairs(tuple(folders.sentences(110)), tuple(folders.sentences(110, 1)))
    settings = {"max_new_tokens": 6}
    monkeypatch.setattr(translation, "libreoffice", lambda split: pairs[:4] if split == "validation" else pairs)
    monkeypatch.setattr(
        translation, "translator", lambda editable=False: load(models["translation"], "translation", settings=settings)
    )
    monkeypatch.setattr(translation, "EDITED", "model.decoder.layers.1.*")
    monkeypatch.setattr("weightpatch.cli.demo_text.LAST", "model.decoder.layers.1.*")
    monkeypatch.setattr(translation, "editor", lambda kind: RMSProp(lr=1e-2, max_steps=100))
    monkeypatch.setattr("weightpatch.editors.ladder", lambda weight: RMSProp(lr=1e-2, max_steps=100))
    code, facts = run(capsys, "demo", "--task", "translation", "--output", "out", "--sentences", 10)
    assert code == 0 and facts["before"] != facts["wanted"]
    for name in ("plain", "editable"):
        told = facts[name]
        assert told["result"] == "satisfied" and told["comparison"]["n"] == 10
        assert {"before", "after"} == set(told["comparison"]["scores"])
        kind = load(models["translation"], "translation", settings=settings)
        Patch.load(told["patch"]).apply(kind.model)
        assert kind.answer(facts["source"]) == facts["wanted"]
        assert facts["wanted"] in Path(told["report"]).read_text()
    code, facts = run(capsys, "demo", "--task", "translation", "--sentences", 11)
    assert code == 2 and "1 to 10" in facts["error"]
