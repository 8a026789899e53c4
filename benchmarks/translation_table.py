"""Edits of the German–English translators, plainly and editably trained, judged by what they translate afterwards.

    python benchmarks/translation_table.py                  # measures what is not measured yet; --only NAME for some
    python benchmarks/translation_table.py --show           # prints the stored table
    python benchmarks/translation_table.py --speed          # the fast evaluation beside the plain loop, in one run

Every edit is of a test sentence, on its own: the translator is to say a translation that it samples at temperature 1.2
(rows "sampled") or the reference ("reference"). Deployed is greedy decoding; a row with `preferred` asks, as the paper
does, only that the target's mean log-probability beats those of the 32 translations of a beam of the unedited model.
Success is what the edited model really writes. The drawdown is the loss of BLEU on test sentences that no edit is of.
`editable` is the plain translator with the sparse block that examples/translator/editable.toml trained for edits,
`untrained block` one as wide that is only fitted; without an edit both translate as the plain one does. Not shipped, to
be trained first: `last layer trained` is examples/translator/last-layer.toml, `from scratch` scratch.toml, to be
compared with the plain translator after as many steps, `as many plain steps`, which is first.toml; both are edited by
gradient descent with the rates that scratch.toml learned. Where a row has fewer edits than others, they are the first
ones, as --edits takes them; a run that was stopped continues edit by edit. Metrics are two-sided, of 1,000 training
pairs; gates go by the translations of 100 others. Learning rates are one setting each; --tune prints what others do to
30 validation sentences.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fashion_table import machine

from weightpatch.editing import solve
from weightpatch.editors import (
    Adam,
    Editor,
    Gate,
    GradientDescent,
    KeyValue,
    LowRank,
    MinimumNorm,
    Preconditioned,
    RMSProp,
    Shrink,
)
from weightpatch.evaluation.generations import SlowGenerations
from weightpatch.likelihoods import Categorical
from weightpatch.preparing import prepared
from weightpatch.statistics import second_moments
from weightpatch.tasks import text, translation
from weightpatch.training import SparseBlock, add_block

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "translation.json", HERE / "results" / "translation.md"
JUDGED = slice(1000, 1400)  # test sentences; edits are of the others
KEPT, REFERENCE = 100, 1000  # training sentences
EDITS = 500  # of each kind, at most
HIDDEN = 4096  # of the untrained block, as the trained one has
SHRINKAGE, OUTPUT_SHRINKAGE = 0.001, 0.1
LAST, BEFORE = "model.decoder.layers.2.", "model.decoder.layers.1."
SHOWN = ("success", "steps", "drawdown", "absolute", "max", "changed", "KL a token", "ms an edit")


@dataclass(frozen=True)
class Row:
    """What is measured."""

    network: str
    parameters: tuple[str, ...]
    make: Callable[[text.Generating], Editor]
    preferred: bool = False
    beams: int = 1


TRAINED = {  # not shipped
    "last layer trained": "translator-last-layer",
    "from scratch": "translator-scratch",
    "as many plain steps": "translator-first",
}


def network(name: str) -> text.Seq2Seq:
    """Return one of the translators."""
    if name in TRAINED:
        found = text.load(HERE.parent / "runs" / TRAINED[name] / "model", "translation")
        assert isinstance(found, text.Seq2Seq)
        return found
    kind = translation.translator(editable=name == "editable")
    if name == "untrained block":
        pairs = translation.libreoffice("train")[:REFERENCE]
        torch.manual_seed(0)
        reference = kind.kept(pairs.german, pairs.english)
        add_block(kind.model, "lm_head", HIDDEN, kind=SparseBlock, reference=reference)
    return kind


def metric(kind: text.Generating, parameters: tuple[str, ...]) -> Any:
    """Return the metric of the layers' inputs at the tokens of training translations; padding does not count."""
    pairs = translation.libreoffice("train")[:REFERENCE]
    keep = kind.kept(pairs.german, pairs.english)
    moments = second_moments(kind.model, keep, parameters=parameters, likelihood=Categorical())
    return moments.metric(SHRINKAGE, output_shrinkage=OUTPUT_SHRINKAGE)


def rows() -> dict[str, Row]:
    found: dict[str, Row] = {}
    for layer, prefix in (("last layer", LAST), ("penultimate layer", BEFORE)):
        whole, dense = (f"{prefix}*",), (f"{prefix}fc1.*", f"{prefix}fc2.*")

        def exact(kind: text.Generating, dense: tuple[str, ...] = dense) -> Editor:
            return MinimumNorm(metric=metric(kind, dense))

        def conditioned(kind: text.Generating, dense: tuple[str, ...] = dense) -> Editor:
            return Preconditioned(metric=metric(kind, dense), max_steps=60)

        def gate(kind: text.Generating, prefix: str = prefix) -> Editor:
            return Gate(f"{prefix}fc2", 256)

        def memit(kind: text.Generating, prefix: str = prefix) -> Editor:
            return KeyValue.memit(f"{prefix}fc2", metric(kind, (f"{prefix}fc2.weight",)))

        found |= {
            f"plain, {layer}, {name}": Row("plain", some, make)
            for name, some, make in (
                ("RMSProp", whole, lambda kind: RMSProp(lr=RATES["RMSProp"], max_steps=100)),
                ("MinimumNorm", dense, exact),
                ("Preconditioned", dense, conditioned),
                ("gate", (f"{prefix}fc2.*",), gate),
                ("MEMIT", (f"{prefix}fc2.weight",), memit),
                (
                    "gradient descent",
                    whole,
                    lambda kind: GradientDescent(lr=RATES["gradient descent"], max_steps=100),
                ),
                ("Adam, fine-tuning", whole, lambda kind: Adam(lr=RATES["Adam"], max_steps=100)),
                ("LoRA", dense[:1], lambda kind: LowRank(Adam(lr=RATES["LoRA"], max_steps=100), rank=4)),
                ("RMSProp, Shrink", whole, lambda kind: Shrink(RMSProp(lr=RATES["RMSProp"], max_steps=100))),
            )
        }
    whole, block = (f"{LAST}*",), (translation.EDITED,)
    found |= {
        "plain, last layer, RMSProp, preferred": replace(found["plain, last layer, RMSProp"], preferred=True),
        "last layer trained, gradient descent": Row(
            "last layer trained", whole, lambda kind: learned("last layer trained")
        ),
        "last layer trained, gradient descent, Shrink": Row(
            "last layer trained", whole, lambda kind: Shrink(learned("last layer trained"))
        ),
        "last layer trained, gradient descent, preferred": Row(
            "last layer trained", whole, lambda kind: learned("last layer trained"), preferred=True
        ),
        "untrained block, MinimumNorm": Row("untrained block", block, lambda kind: measured(kind)),
        "editable, MinimumNorm": Row("editable", block, lambda kind: measured(kind)),
        "editable, gradient descent, Shrink": Row(
            "editable", block, lambda kind: Shrink(GradientDescent(lr=RATES["block"], max_steps=100))
        ),
        "editable, RMSProp": Row("editable", block, lambda kind: RMSProp(lr=RATES["block, RMSProp"], max_steps=100)),
        "editable, Preconditioned": Row(
            "editable", block, lambda kind: Preconditioned(metric=measured(kind).metric, max_steps=60)
        ),
        "editable, MinimumNorm, preferred": Row("editable", block, lambda kind: measured(kind), preferred=True),
        "editable, MinimumNorm, 5 beams": Row("editable", block, lambda kind: measured(kind), beams=5),
    }
    dense = (f"{LAST}fc1.*", f"{LAST}fc2.*")
    for name in ("from scratch", "as many plain steps"):
        found |= {
            f"{name}, gradient descent": Row(name, dense, lambda kind: learned("from scratch")),
            f"{name}, MinimumNorm": Row(name, dense, lambda kind: MinimumNorm(metric=metric(kind, dense))),
        }
    return found


def measured(kind: text.Generating) -> MinimumNorm:
    assert isinstance(kind, text.Seq2Seq)
    found = translation.editor(kind, REFERENCE)
    assert isinstance(found, MinimumNorm)
    return found


def learned(name: str) -> Editor:
    """Return gradient descent with the rates that training came to."""
    told = json.loads((HERE.parent / "runs" / TRAINED[name] / "result.json").read_text())
    return GradientDescent(lr=told["lr"], max_steps=50)


RATES = {"gradient descent": 1e-3, "RMSProp": 3e-4, "Adam": 3e-4, "LoRA": 1e-2, "block": 1.0, "block, RMSProp": 3e-3}


def demands(kind: text.Generating, pairs: translation.Pairs, which: str, count: int, preferred: bool) -> list[Any]:
    """Return edits of the first sentences whose translation is not the target already."""
    made: list[Any] = []
    for place in range(len(pairs)):
        source, reference = pairs[place]
        target: Any = kind.tokens(reference, source)
        if which == "sampled":
            target = kind.answers(source, do_sample=True, temperature=1.2, top_k=0, num_beams=1, seed=place)[0]
        if kind.decoding(source)(kind.model).tolist() == target.tolist():
            continue
        made.append(kind.preferred(source, target, 32) if preferred else kind.says(source, target))
        if len(made) == count:
            break
    return made


def others(test: translation.Pairs) -> translation.Pairs:
    """Return the test sentences that are not judged."""
    first, last = test[: JUDGED.start], test[JUDGED.stop :]
    return translation.Pairs(first.german + last.german, first.english + last.english)


def measure(name: str, row: Row, which: str, folder: Path, most: int) -> dict[str, Any]:
    kind = network(row.network)
    if row.beams > 1:
        kind = replace(kind, settings={**kind.settings, "num_beams": row.beams})
    test = translation.libreoffice("test")
    editor, judged = row.make(kind), test[JUDGED]
    # what is kept would be measured after every edit: given where an editor goes by it
    kept = translation.libreoffice("train").german[REFERENCE : REFERENCE + KEPT]
    keep = kind.kept(kept) if isinstance(editor, Gate) else None
    began = time.monotonic()
    report = text.evaluate(
        kind,
        demands(kind, others(test), which, most, row.preferred),
        editor,
        texts=judged.german,
        references=judged.english,
        score=translation.bleu,
        parameters=row.parameters,
        keep=keep,
        results=folder / f"{name}-{which}.jsonl".replace(" ", "-").replace(",", ""),
    )
    return {
        "edits": len(report.edited),
        "figures": report.figures(),
        "base_bleu": report.base_score,
        "drawdown_absolute": sum(map(abs, report.drawdowns)) / len(report.drawdowns),
        "anew": sum(row.anew for row in report.edited) / len(report.edited),
        "seconds": time.monotonic() - began,
        "machine": machine(),
    }


def tune() -> None:
    """Print what rates do to 30 validation sentences, judged on 200 others."""
    pairs = translation.libreoffice("validation")
    makes: dict[str, Callable[[float], Editor]] = {
        "gradient descent": lambda lr: GradientDescent(lr=lr, max_steps=100),
        "RMSProp": lambda lr: RMSProp(lr=lr, max_steps=100),
        "Adam": lambda lr: Adam(lr=lr, max_steps=100),
        "LoRA": lambda lr: LowRank(Adam(lr=lr, max_steps=100), rank=4),
    }
    for which, parameters, grids in (
        (
            "plain",
            f"{LAST}*",
            {
                "gradient descent": (1e-3, 3e-3, 1e-2, 3e-2),
                "RMSProp": (1e-4, 3e-4, 1e-3),
                "Adam": (1e-4, 3e-4, 1e-3),
            },
        ),
        ("plain", f"{LAST}fc1.*", {"LoRA": (1e-3, 3e-3, 1e-2, 3e-2)}),
        ("editable", translation.EDITED, {"gradient descent": (0.3, 1.0, 3.0), "RMSProp": (1e-3, 3e-3, 1e-2)}),
    ):
        kind = network(which)
        edits = demands(kind, pairs[:500], "reference", 15, False) + demands(kind, pairs[:500], "sampled", 15, False)
        for name, lr in ((name, lr) for name, rates in grids.items() for lr in rates):
            report = text.evaluate(
                kind,
                edits,
                makes[name](lr),
                texts=pairs.german[500:700],
                references=pairs.english[500:700],
                score=translation.bleu,
                parameters=parameters,
            )
            print(which, name, lr, report.figures(), flush=True)


def speed() -> list[dict[str, Any]]:
    """Time the evaluation of edits by several editors, the plain loop and the fast way in turn, in one run."""
    test, dense = translation.libreoffice("test"), (f"{LAST}fc1.*", f"{LAST}fc2.*")
    judged, found = test[JUDGED], []
    for name, which, make, parameters in (
        ("RMSProp", "plain", lambda kind: RMSProp(lr=RATES["RMSProp"], max_steps=100), (f"{LAST}*",)),
        ("MinimumNorm", "plain", lambda kind: MinimumNorm(metric=metric(kind, dense)), dense),
        ("MinimumNorm, editable translator", "editable", measured, (translation.EDITED,)),
        ("gate", "plain", lambda kind: Gate(f"{LAST}fc2", 256), dense[1:]),
    ):
        kind = network(which)
        keep = kind.kept(translation.libreoffice("train").german[REFERENCE : REFERENCE + KEPT])
        edits = demands(kind, test[:20], "reference", 3, False)
        editor, _, view = prepared(kind.model, parameters, make(kind), keep)
        fast = text.generations(kind, view, judged.german)

        def anew(model: torch.nn.Module, items: Sequence[int], kind: text.Seq2Seq = kind) -> list[torch.Tensor]:
            return kind.generate([judged.german[i] for i in items], model)

        slow = SlowGenerations(view, fast.base, fast._forced, anew)
        took: dict[str, list[float]] = {"plain": [], "fast": []}
        changed = []
        for edit in edits:
            params = solve(view, edit, editor, keep).params
            answers = []
            for way_name, way in (("plain", slow), ("fast", fast)):
                began = time.process_time()
                answers.append(way.predict(params))
                took[way_name].append(time.process_time() - began)
            same = [{i: tokens.tolist() for i, tokens in one.changed.items()} for one in answers]
            assert same[0] == same[1]
            changed.append(len(answers[1].changed))
        plain, quick = (sorted(took[way_name])[1] for way_name in ("plain", "fast"))
        found.append(
            {"editor": name, "plain_s": plain, "fast_s": quick, "ratio": plain / quick, "changed": sorted(changed)[1]}
        )
        print(found[-1], flush=True)
    return found


def table(content: dict[str, Any]) -> str:
    lines = [
        "# Edits of a translator\n",
        f"Made by `python benchmarks/translation_table.py` on {content['machine']}; what the rows are is said in the "
        "script. Drawdown in points of BLEU on 400 test sentences that no edit is of; `changed` is the share of their "
        "translations that differ at all; success is what the edited translator writes. Some rows have fewer edits, to "
        "save time; milliseconds are those of a busy machine.\n",
    ]
    for which in ("sampled", "reference"):
        some = [row for row in content["rows"] if which in row]
        lines += [f"## Targets: {which}\n", "| translator, edited, by | edits | " + " | ".join(SHOWN) + " |"]
        lines.append("|---|---:|" + "---:|" * len(SHOWN))
        for row in some:
            cells = " | ".join(str(row[which]["figures"].get(column, "")) for column in SHOWN)
            mark = "" if row[which].get("machine", content["machine"]) == content["machine"] else " *"
            lines.append(f"| {row['name']}{mark} | {row[which]['edits']} | {cells} |")
        elsewhere = {row[which].get("machine", content["machine"]) for row in some} - {content["machine"]}
        lines += ["", f"\\* Made, all or in part, on {' and '.join(sorted(elsewhere))}.", ""] if elsewhere else [""]
    if content.get("speed"):
        lines += [
            "## What evaluating one edit takes\n",
            "CPU seconds for all 400 sentences, one thread, medians of three edits in one run, answers equal; of the "
            "plain translator where no other is named.\n",
            "| edited by | translations changed | plain loop | fast way | ratio |",
            "|---|---:|---:|---:|---:|",
        ]
        for told in content["speed"]:
            times = f"{told['plain_s']:.2f} | {told['fast_s']:.2f} | {told['ratio']:.1f}"
            lines.append(f"| {told['editor']} | {told['changed']} | {times} |")
    return "\n".join(lines) + "\n"


def short(content: dict[str, Any]) -> str:
    """Return the table of README and docs."""
    lines = [
        "| translator, edited by | references: edits | success | absolute drawdown, BLEU | changed | "
        "sampled: edits | success | absolute drawdown, BLEU | changed | ms an edit |",
        "|---|" + "---:|" * 9,
    ]
    for row in content["rows"]:
        if "reference" not in row or "sampled" not in row:
            continue
        cells = []
        for which in ("reference", "sampled"):
            figures = row[which]["figures"]
            cells += [str(row[which]["edits"]), *(figures[column] for column in ("success", "absolute", "changed"))]
        lines.append(f"| {row['name']} | " + " | ".join((*cells, row["reference"]["figures"]["ms an edit"])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--tune", action="store_true", help="print what learning rates do on the validation split")
    parser.add_argument("--speed", action="store_true", help="measure the speed of the evaluation")
    parser.add_argument("--edits", type=int, default=EDITS, help="at most so many of each kind")
    parser.add_argument("--only", help="a name, or a part of names, to measure; --only nothing collects")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "translation")
    parser.add_argument("--readme", action="store_true", help="print the table of the docs")
    arguments = parser.parse_args()
    if arguments.show or arguments.readme:
        print(TABLE.read_text() if arguments.show else short(json.loads(RESULTS.read_text())))
        return
    if arguments.tune:
        tune()
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    timed = arguments.runs / "speed.json"
    if arguments.speed:
        timed.write_text(json.dumps(speed()))
    content: dict[str, Any] = {"machine": machine(), "rows": []}
    some = rows()
    wanted = [name for name in some if arguments.only == name] or [n for n in some if (arguments.only or "") in n]
    for name, row in some.items():
        path = arguments.runs / f"{name.replace(' ', '-').replace(',', '')}.json"
        found = json.loads(path.read_text()) if path.exists() else {"name": name}
        if not arguments.speed and name in wanted:
            for which in ("reference", "sampled"):
                if which not in found:
                    found[which] = measure(name, row, which, arguments.runs, arguments.edits)
                    path.write_text(json.dumps(found))
                    print(f"{name}: {which} in {found[which]['seconds']:.0f} s: {found[which]['figures']}", flush=True)
        if len(found) > 1:
            content["rows"].append(found)
    if timed.exists():
        content["speed"] = json.loads(timed.read_text())
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    TABLE.write_text(table(content))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
