"""`doctor` and `evaluate` for text models on the command line: what they tell is so, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import text_folders as folders
import torch

from weightpatch.cli import main
from weightpatch.editors import RMSProp
from weightpatch.tasks import text

PLAIN = ["--editor", "RMSProp", "--lr", "1e-2", "--max-steps", "60", "--no-shrink"]
SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts, wanted = folders.sentences(12), ["w7 w8", "w9", "w10 w2"]
    Path("texts.txt").write_text("\n".join(texts), encoding="utf-8")
    Path("pairs.tsv").write_text("\n".join(f"{a}\t{b}" for a, b in zip(texts, folders.sentences(12, 1), strict=True)))
    Path("named.tsv").write_text("\n".join(f"{a}\thappy" for a in texts))
    rows = [{"source": texts[i], "target": target, "note": i} for i, target in enumerate(wanted)]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    rows = [{"source": texts[i], "target": name} for i, name in enumerate(("sad", "happy", "bored"))]
    Path("classes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("task", folders.MAKE)
def test_doctor_tells_what_moves_what_is_replayed_and_what_an_edit_costs(task, models, capsys):
    seen, here = digest(models[task]), set(Path().iterdir())
    code, facts = run(capsys, "doctor", "--task", task, models[task], "--source", "w3 w4", *PLAIN, *SHORT)
    assert code == 0 and facts["edit"]["result"] == "satisfied" and facts["edit"]["steps"] > 0
    assert facts["edit"]["cost"]["seconds"] > 0 and facts["edit"]["patch"]["bytes"] > 0
    listed = {row["name"]: row for row in facts["parameters"]}
    assert len(facts["moves"]) == 2 and set(facts["moves"]) <= set(listed)
    assert all(row["editable"] and len(row["shape"]) for row in listed.values())
    replay = facts["replay"]
    assert not replay["full_passes_because"] and min(replay["seconds"].values()) > 0
    assert any("embed" in name or "wte" in name or "encoder" in name for name in replay["modules"])
    assert not {name.removesuffix(".weight") for name in facts["moves"]} & set(replay["modules"])
    assert digest(models[task]) == seen and set(Path().iterdir()) == here


def test_a_trial_edit_without_a_target_asks_for_the_second_likeliest_answer(models, capsys):
    _, facts = run(capsys, "doctor", "--task", "text-classification", models["text-classification"], *PLAIN)
    kind = text.load(models["text-classification"])
    with torch.no_grad():
        order = kind.model(**kind.inputs(["Hello."])).logits[0].argsort(descending=True).tolist()
    assert facts["edit"]["target"] == kind.model.config.id2label[order[1]]

    _, facts = run(capsys, "doctor", "--task", "lm", models["lm"], "--source", "w3 w4", *PLAIN, *SHORT)
    kind = text.load(models["lm"])
    with torch.no_grad():
        order = kind.model(**kind.source("w3 w4")).logits[0, -1].argsort(descending=True).tolist()
    words = [token for token in order if token not in kind.tokenizer.all_special_ids or token == order[0]]
    assert facts["edit"]["target"] == kind.text(torch.tensor([words[1]]))


def test_doctor_tries_the_edit_that_is_asked_for(models, capsys):
    words = ["doctor", "--task", "translation", models["translation"], "--source", "w3", "--target", "w7 w8", *SHORT]
    code, facts = run(capsys, *words, "--keep-texts", "texts.txt", "--keep", 4, *PLAIN, "--keep-weight", 1)
    assert code == 0 and (facts["edit"]["target"], facts["edit"]["kept"]["items"]) == ("w7 w8", 4)
    assert facts["edit"]["kept"]["drift"] > 0
    code, facts = run(capsys, *words, "--editor", "RMSProp", "--lr", "1e-9", "--max-steps", 1)
    assert (code, facts["edit"]["result"]) == (1, "unsatisfied")
    assert main([*map(str, words), *PLAIN, "--parameters", "*"]) == 0
    told = capsys.readouterr().out
    assert "replays  0 modules" in told and "took" in told


@pytest.mark.parametrize("task", ["translation", "lm"])
def test_evaluate_tells_the_figures_of_the_library(task, models, capsys):
    words = ["evaluate", "--task", task, models[task], "--edits", "edits.jsonl", "--texts", "pairs.tsv", *PLAIN, *SHORT]
    code, facts = run(capsys, *words, "--results", "rows.jsonl", "--output", "out/found.json")
    assert code == 0 and facts == json.loads(Path("out/found.json").read_text())
    kind = text.load(models[task], task, settings={"num_beams": 1, "max_new_tokens": 6})
    rows = [json.loads(line) for line in Path("edits.jsonl").read_text().split("\n") if line]
    tested = folders.sentences(12)[3:]  # what is asked about does not count
    references = folders.sentences(12, 1)[3:]
    right = {"translation": None, "lm": lambda said, wanted: said.strip().startswith(wanted)}[task]
    report = text.evaluate(
        kind,
        [kind.says(row["source"], row["target"]) for row in rows],
        RMSProp(lr=1e-2, max_steps=60),
        texts=tested,
        parameters=facts["moves"],
    )
    assert facts["tested"] == report.items == 9 and facts["kept"] == 0
    assert [row["steps"] for row in facts["edits"]] == [row.steps for row in report.rows]
    assert [row["changed"] for row in facts["edits"]] == [row.changed for row in report.rows]
    assert [row["item"] for row in facts["edits"]] == [1, 2, 3]
    assert facts["success"]["value"] == report.success.value > 0
    if right is None:
        assert facts["score"]["name"] == "BLEU" and "tok:13a" in facts["score"]["signature"]
    else:
        said = [kind.text(tokens) for tokens in kind.generate(tested)]
        assert facts["base_score"] == pytest.approx(100 * sum(map(right, said, references)) / 9)

    lines = Path("rows.jsonl").read_text()
    _, again = run(capsys, *words, "--results", "rows.jsonl")
    assert again == facts and Path("rows.jsonl").read_text() == lines
    assert run(capsys, *words, "--results", "rows.jsonl", "--min-success", 1.1)[0] == 1
    code, facts = run(capsys, *words, "--results", "rows.jsonl", "--max-steps", 61)
    assert code == 2 and "another run" in facts["error"]
    rows[0]["target"] = "w11"  # as many edits, and others
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, facts = run(capsys, *words, "--results", "rows.jsonl")
    assert code == 2 and "another run" in facts["error"]


def test_evaluate_without_references_counts_what_changed(models, capsys):
    words = ["--edits", "edits.jsonl", "--texts", "texts.txt", "--keep", 4, *PLAIN, "--keep-weight", 1, *SHORT]
    code, facts = run(capsys, "evaluate", "--task", "translation", models["translation"], *words)
    assert code == 0 and facts["score"] is facts["base_score"] is None
    assert (facts["kept"], facts["tested"]) == (4, 5) and "drawdown" not in facts["figures"]
    assert main(["evaluate", "--task", "translation", *map(str, [models["translation"], *words])]) == 0
    told = capsys.readouterr().out
    assert told.count("% changed") == 3 and f"success    {facts['figures']['success']}" in told


def test_evaluate_edits_classes_by_name(models, capsys):
    task = "text-classification"
    words = ["--edits", "classes.jsonl", "--texts", "named.tsv", *PLAIN, "--results", "rows.jsonl"]
    code, facts = run(capsys, "evaluate", "--task", task, models[task], *words)
    assert code == 0 and facts["tested"] == 9 and len(facts["rows"]) == 3
    kind = text.load(models[task])
    with torch.no_grad():
        answers = kind.model(**kind.inputs(folders.sentences(12))).logits.argmax(1).tolist()
    assert facts["base_error"] == pytest.approx(100 * sum(answer != 1 for answer in answers[3:]) / 9)
    held = [row["result"] == "already_satisfied" for row in facts["rows"]]
    assert [row["item"] for row in facts["rows"]] == [1, 2, 3]
    assert held == [answer == wanted for answer, wanted in zip(answers, range(3), strict=False)]


def test_where_every_edit_held_before_nothing_is_measured(models, capsys):
    kind, source = text.load(models["lm"], settings={"max_new_tokens": 2}), folders.sentences(12)[0]
    target = kind.answer(source)
    Path("held.jsonl").write_text(json.dumps({"source": source, "target": target}))
    words = ["--edits", "held.jsonl", "--texts", "texts.txt", "--margin", 0, "--max-new-tokens", 2]
    code, facts = run(capsys, "evaluate", "--task", "lm", models["lm"], *words)
    assert code == 0 and facts["success"]["value"] is None and facts["figures"] == {}
    assert [row["result"] for row in facts["edits"]] == ["already_satisfied"]
    code, _ = run(capsys, "evaluate", "--task", "lm", models["lm"], *words, "--min-success", 0)
    assert code == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["doctor", "--task", "lm", "absent"], "absent does not exist"),
        (["doctor", "--task", "lm", "LM", "--source", " "], "empty text"),
        (["doctor", "--task", "lm", "LM", "--source", "w1", "--target", "house"], "no token for some of it"),
        (["doctor", "--task", "text-classification", "CL", "--target", "angry"], "sad, happy, bored"),
        (["doctor", "--task", "lm", "LM", "--parameters", "x*"], "transformer"),
        (["doctor", "--task", "lm", "LM", "--keep-texts", "absent.txt"], "absent.txt cannot be read"),
        (["evaluate", "MT", "--edits", "absent.jsonl", "--texts", "texts.txt"], "absent.jsonl cannot be read"),
        (["evaluate", "MT", "--edits", "edits.jsonl", "--texts", "absent.txt"], "absent.txt cannot be read"),
        (["evaluate", "MT", "--edits", "empty.jsonl", "--texts", "texts.txt"], "empty.jsonl is empty"),
        (["evaluate", "MT", "--edits", "odd.jsonl", "--texts", "texts.txt"], "line 2 of odd.jsonl is not JSON"),
        (["evaluate", "MT", "--edits", "list.jsonl", "--texts", "texts.txt"], "is a JSON list; expected an object"),
        (["evaluate", "MT", "--edits", "half.jsonl", "--texts", "texts.txt"], 'line 3 of half.jsonl has no "target"'),
        (["evaluate", "MT", "--edits", "number.jsonl", "--texts", "texts.txt"], '7 as "target"; expected a text'),
        (["evaluate", "MT", "--edits", "unknown.jsonl", "--texts", "texts.txt"], "line 1 of unknown.jsonl"),
        (["evaluate", "MT", "--edits", "edits.jsonl", "--texts", "one.txt"], "expected at least 2"),
        (["evaluate", "CL", "--edits", "classes.jsonl", "--texts", "texts.txt"], "has no references"),
        (["evaluate", "CL", "--edits", "edits.jsonl", "--texts", "named.tsv"], "sad, happy, bored"),
        (["evaluate", "CL", "--edits", "classes.jsonl", "--texts", "pairs.tsv"], "expected one of the classes sad"),
    ],
)
def test_bad_input_of_measurements_gives_2_and_says_why(words, says, models, capsys):
    first = json.dumps({"source": "w1", "target": "w2"})
    for name, content in {
        "empty.jsonl": "\n",
        "odd.jsonl": f"{first}\nw1\tw2\n",
        "list.jsonl": '["w1", "w2"]\n',
        "half.jsonl": f'{first}\n\n{{"source": "w1"}}\n',
        "number.jsonl": '{"source": "w1", "target": 7}\n',
        "unknown.jsonl": '{"source": "w1", "target": "house"}\n',
        "one.txt": "w1\n",
    }.items():
        Path(name).write_text(content)
    names = {"MT": models["translation"], "LM": models["lm"], "CL": models["text-classification"]}
    if words[0] == "evaluate":
        words = [*words, "--task", "translation" if words[1] == "MT" else "text-classification"]
    code, facts = run(capsys, *[names.get(word, word) for word in words])
    assert code == 2
    assert says in facts["error"], facts["error"]


@pytest.mark.parametrize("command", ["doctor", "evaluate"])
def test_the_help_of_measurements_is_that_of_the_task(command, capsys):
    for task in (*folders.MAKE, "images"):
        assert main([command, "--task", task, "--help"]) == 0
        assert ("--num-beams" in capsys.readouterr().out) == (task != "images")
    assert main([command, "--task", "music", "--model", "a:b"]) == 2
    assert "text-classification" in capsys.readouterr().err
