"""Every way to edit, beside the usual baselines, on Fashion-MNIST: one image jointly with altered copies of it.

    python benchmarks/metric_table.py                  # measures what is not measured yet; --edits N for fewer
    python benchmarks/metric_table.py --show           # prints the stored table

The metric is E[x xᵀ] of the edited layer's inputs on 10,000 training images, shrinkage 0.001; in rows with
`two-sided` and in `Auto` also E[g gᵀ] of its outputs' gradients, shrinkage 0.1; gates, budgets and KL go by 2,000
others. The image and seven altered copies of it are demanded together (shifts, rotations by 5 degrees, noise);
`unasked` is then the share that holds of further alterations of these eight: turned by 8 degrees, or with fresh
noise. `alone` demands the image, and `unasked` are the seven copies. Settings of metric editors were chosen on the
last 5,000 training images, those of the fine-tuning baselines are usual ones; edits are of test images, drawdown is
on all 10,000 test images. Patch sizes are the middle one of the first 20 edits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, final

import torch
from editable_table import RATE, Part, with_block
from fashion_table import all_mistakes, machine, random_edits
from torch import Tensor

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import (
    Adam,
    Auto,
    Bounded,
    Budget,
    Editor,
    Gate,
    GaussNewton,
    GradientDescent,
    KeyValue,
    LowRank,
    MinimumNorm,
    Preconditioned,
    Rung,
)
from weightpatch.editors import ladder as rmsprop_ladder
from weightpatch.editors.base import Solution
from weightpatch.evaluation import Sequential, figures
from weightpatch.likelihoods import Categorical
from weightpatch.problem import Problem
from weightpatch.statistics import second_moments
from weightpatch.tasks import images

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "metric.json", HERE / "results" / "metric.md"
ALONE = ("layer3, MinimumNorm", "sparse block, MinimumNorm", "editable, MinimumNorm", "Auto", "gate at fc")
CONVOLUTIONS = ("layer3.0.conv1.weight", "layer3.0.conv2.weight", "layer3.0.downsample.0.weight")
SHRINKAGE, REFERENCE, EDITS, FEWER = 0.001, 10_000, 1000, 200
OUTPUT_SHRINKAGE = 0.1
KEPT, CHANGED, TOTAL = 2000, 0.003, 0.01  # images that gates, budgets and KL go by; Auto's budgets, shares of these
README = (
    "fc, fine-tuning",
    "layer3, LoRA",
    "layer3, fine-tuning with KL",
    "Auto",
    "gate at fc",
    "sparse block, MinimumNorm",
)
CHECKPOINTS, SEEDS = (1, 10, 25, 50, 100, 200, 1000), 3
SHOWN = ("success", "steps", "drawdown", "absolute", "max", "broken/repaired/other")


@dataclass(frozen=True)
class Row:
    """What is measured: what edits what, and whether altered copies are demanded too."""

    make: Callable[[], Part]
    joint: bool = True
    edits: int = EDITS


def part(
    model: torch.nn.Module,
    parameters: tuple[str, ...],
    train: images.LabelledImages,
    kind: type,
    two_sided: bool = False,
    **settings: int,
) -> Part:
    likelihood, outputs = (Categorical(), OUTPUT_SHRINKAGE) if two_sided else (None, None)
    moments = second_moments(model, train.images[:REFERENCE], parameters=parameters, likelihood=likelihood)
    settings = {"max_steps": 40, **settings} if kind is Preconditioned else settings
    return Part(model, parameters, kind(metric=moments.metric(SHRINKAGE, output_shrinkage=outputs), **settings))


def ladder(model: torch.nn.Module, parameters: tuple[str, ...], train: images.LabelledImages, **budget: float) -> Part:
    """Return `Auto` as `wp.edit` makes it, with statistics of 10,000 images."""
    moments = second_moments(model, train.images[:REFERENCE], parameters=parameters, likelihood=Categorical())
    metric = moments.metric(SHRINKAGE, output_shrinkage=OUTPUT_SHRINKAGE)
    gate = "fc.head" if parameters == (images.EDITED,) else "fc"
    made = Auto.late(metric, gate=gate, budget=Budget(**budget), altered=images.altered)
    return Part(model, parameters, made)


def key_value(model: torch.nn.Module, train: images.LabelledImages, preset: str) -> Part:
    moments = second_moments(model, train.images[:REFERENCE], parameters=("fc.weight",))
    return Part(model, ("fc.weight",), getattr(KeyValue, preset)("fc", moments.metric(SHRINKAGE)))


def networks(train: images.LabelledImages) -> dict[str, Row]:
    """Return the rows by name."""
    small = images.fashion_classifier

    def given(parameters: tuple[str, ...], editor: Editor) -> Callable[[], Part]:
        return lambda: Part(small(), parameters, editor)

    def classifier(
        parameters: tuple[str, ...], kind: type, two_sided: bool = False, **settings: int
    ) -> Callable[[], Part]:
        return lambda: part(small(), parameters, train, kind, two_sided, **settings)

    def sparse(kind: type) -> Callable[[], Part]:
        def make() -> Part:
            blocked = with_block(small(), train, 0)
            return part(blocked.model, blocked.parameters, train, kind)

        return make

    def editable(kind: type) -> Callable[[], Part]:
        return lambda: part(images.fashion_editable(), (images.EDITED,), train, kind)

    def descent() -> Part:
        blocked = with_block(small(), train, 0)
        return Part(blocked.model, blocked.parameters, GradientDescent(lr=RATE, max_steps=100))

    kl = Auto((Rung("RMSProp with KL", rmsprop_ladder(100.0), kept=64),), Budget(changed=1.0))
    found = {
        "no edit": Row(given(("fc.*",), GradientDescent(lr=0.0, max_steps=0))),
        "lookup gate": Row(given(("fc.*",), Gate("fc", share=0.0))),
        "fc, fine-tuning": Row(given(("fc.*",), Adam(lr=1e-2, max_steps=100))),
        "layer3, fine-tuning": Row(given(("layer3.*",), Adam(lr=1e-3, max_steps=100)), edits=FEWER),
        "layer3, LoRA": Row(given(CONVOLUTIONS, LowRank(Adam(lr=1e-2, max_steps=100), rank=4)), edits=FEWER),
        "layer3, FT-L": Row(given(("layer3.*",), Bounded(Adam(lr=1e-3, max_steps=100), 5e-3)), edits=FEWER),
        "layer3, fine-tuning with KL": Row(given(("layer3.*",), kl), edits=FEWER),
        "gate at fc": Row(given(("fc.*",), Gate("fc"))),
        "fc, MinimumNorm": Row(classifier(("fc.*",), MinimumNorm)),
        "conv2 of layer3, MinimumNorm": Row(classifier(CONVOLUTIONS[1:2], MinimumNorm)),
        "layer3, MinimumNorm": Row(classifier(CONVOLUTIONS, MinimumNorm)),
        "layer3, Preconditioned": Row(classifier(CONVOLUTIONS, Preconditioned), edits=FEWER),
        "layer3, Preconditioned, line search": Row(
            classifier(CONVOLUTIONS, Preconditioned, line_search=6), edits=FEWER
        ),
        "fc, MinimumNorm, two-sided": Row(classifier(("fc.*",), MinimumNorm, two_sided=True)),
        "fc, GaussNewton, two-sided": Row(classifier(("fc.*",), GaussNewton, two_sided=True), edits=FEWER),
        "fc, ROME": Row(lambda: key_value(small(), train, "rome"), edits=FEWER),
        "fc, MEMIT": Row(lambda: key_value(small(), train, "memit"), edits=FEWER),
        "layer3, MinimumNorm, two-sided": Row(classifier(CONVOLUTIONS, MinimumNorm, two_sided=True)),
        "layer3, Preconditioned, two-sided": Row(classifier(CONVOLUTIONS, Preconditioned, two_sided=True), edits=FEWER),
        "Auto": Row(lambda: ladder(small(), (*CONVOLUTIONS, "fc.*"), train, changed=CHANGED, seconds=0.3)),
        "Auto, quick": Row(
            lambda: ladder(small(), (*CONVOLUTIONS, "fc.*"), train, changed=CHANGED, seconds=0.02), edits=FEWER
        ),
        "sparse block, MinimumNorm": Row(sparse(MinimumNorm)),
        "sparse block, GradientDescent": Row(descent, edits=FEWER),
        "sparse block, Preconditioned": Row(sparse(Preconditioned), edits=FEWER),
        "editable, GradientDescent": Row(
            lambda: Part(images.fashion_editable(), (images.EDITED,), images.fashion_editor()), edits=FEWER
        ),
        "editable, MinimumNorm": Row(editable(MinimumNorm)),
        "editable, Preconditioned": Row(editable(Preconditioned), edits=FEWER),
        "editable, Auto": Row(
            lambda: ladder(images.fashion_editable(), (images.EDITED,), train, changed=CHANGED, seconds=0.3),
            edits=FEWER,
        ),
    }
    for name, row in list(found.items()):
        if name in ALONE:
            found[f"{name}, alone"] = replace(row, joint=False, edits=FEWER)
    return found


def with_copies(fix: Classified) -> Classified:
    inputs = torch.cat([fix.inputs, images.altered(fix.inputs)])
    return Classified(inputs, fix.labels.repeat(len(inputs)))


def further(inputs: Tensor) -> Tensor:
    return torch.cat([images.rotations(inputs, (-8.0, 8.0)), images.noise(inputs, std=0.1, seed=1)])


def measure(
    made: Part, joint: bool, edits: list[Classified], test: images.LabelledImages, keep: wp.Locality
) -> dict[str, Any]:
    auto = isinstance(made.editor, Auto) and made.editor.altered is not None
    fixes = [with_copies(fix) for fix in edits] if joint and not auto else edits
    if auto and not joint:
        made = replace(made, editor=replace(made.editor, altered=None))
    began = time.monotonic()
    report = wp.evaluate(
        made.model,
        fixes,
        made.editor,
        test=(test.images, test.labels),
        parameters=made.parameters,
        keep=keep,
        altered=further if joint else images.altered,
        progress=False,
    )
    seconds = sorted(row.seconds for row in report.rows if row.steps) or [0.0]
    sizes = [wp.edit(made.model, fix, made.editor, keep=keep, parameters=made.parameters).patch for fix in fixes[:20]]
    return {
        "edits": len(edits),
        "figures": figures(report),
        "drawdown_absolute": report.summary.drawdown_absolute.value,
        "patch_bytes": sorted(patch.nbytes for patch in sizes if patch is not None)[len(sizes) // 2],
        "edit_ms": 1000 * seconds[len(seconds) // 2],
        "seconds": time.monotonic() - began,
    }


@final
@dataclass(frozen=True, eq=False)
class Noting(Editor):
    """Runs a ladder and counts how often its last rung was taken."""

    editor: Editor
    taken: list[bool]

    @property
    def slots(self) -> Mapping[str, int]:
        return self.editor.slots

    def run(self, problem: Problem) -> Solution:
        found = self.editor.run(problem)
        self.taken.append(not found.attempts or found.attempts[-1].name.startswith("gate"))
        return found


def sequences(train: images.LabelledImages) -> dict[str, tuple[Part, int, bool]]:
    """Return by name what makes edits one on another, how many, and whether each meets the earlier demands too."""
    small, scope = images.fashion_classifier, (*CONVOLUTIONS, "fc.*")
    moments = second_moments(small(), train.images[:REFERENCE], parameters=scope, likelihood=Categorical())
    metric = moments.metric(SHRINKAGE, output_shrinkage=OUTPUT_SHRINKAGE)
    auto = Auto.late(metric, gate="fc", budget=Budget(changed=TOTAL, seconds=0.3), count=1024)
    return {
        "Auto, 1 % for all together": (Part(small(), scope, auto), 200, True),
        "gate at fc": (Part(small(), scope, Gate("fc", 1024)), 1000, False),
        "fc, MinimumNorm": (part(small(), ("fc.*",), train, MinimumNorm), 100, True),
        "layer3, MinimumNorm": (part(small(), CONVOLUTIONS, train, MinimumNorm), 100, True),
    }


def sequence(
    made: Part,
    count: int,
    remember: bool,
    seed: int,
    held_out: images.LabelledImages,
    test: images.LabelledImages,
    keep: wp.Locality,
) -> dict[str, Any]:
    """Make random-label edits one on another; drawdown in points at each checkpoint, and the share made by gates.

    The edits are of images that were held out of training, and of the test set: what is edited does not count as lost.
    """
    editor = Noting(made.editor, [])
    began = time.monotonic()
    report = wp.evaluate(
        made.model,
        random_edits(held_out, count, seed=seed),
        editor,
        test=(test.images, test.labels),
        parameters=made.parameters,
        keep=keep,
        protocol=Sequential(tuple(point for point in CHECKPOINTS if point <= count), remember=remember),
        progress=False,
    )
    points = [
        {
            "edits": point.edits,
            "retained": point.retained / point.edits,
            "drawdown": point.impact.error - report.base_error,
        }
        for point in report.checkpoints
    ]
    gates = sum(editor.taken) / len(editor.taken) if editor.slots else 0.0
    return {"seed": seed, "points": points, "gates": gates, "seconds": time.monotonic() - began}


def size(found: dict[str, Any]) -> str:
    return f"{found['patch_bytes'] / 1000:.1f} kB" if "patch_bytes" in found else ""


def table(rows: list[dict[str, Any]], several: list[dict[str, Any]], where: str) -> str:
    lines = [
        "# Edits in the metric of a layer's inputs, on Fashion-MNIST\n",
        f"Made by `python benchmarks/metric_table.py` on {where}. Drawdown in percentage points on all 10,000 test "
        "images; what the rows are is said in the script. The image and seven altered copies are demanded together, "
        "the image in rows with `alone`; `unasked`: the share that holds of alterations that were not. Some rows have "
        "fewer edits, to save time; milliseconds are those of a busy machine.\n",
    ]
    for kind, title in (("random", "Random labels"), ("mistakes", "Real mistakes")):
        lines += [f"## {title}\n", "| edited, by | edits | " + " | ".join(SHOWN) + " | unasked | ms an edit | patch |"]
        lines.append("|---|---:|" + "---:|" * (len(SHOWN) + 3))
        for row in rows:
            if kind in row:
                cells = " | ".join(str(row[kind]["figures"].get(column, "")) for column in (*SHOWN, "generality"))
                costs = f"{row[kind]['edit_ms']:.0f} | {size(row[kind])}"
                lines.append(f"| {row['name']} | {row[kind]['edits']} | {cells} | {costs} |")
        lines.append("")
    lines += [
        "## Random-label edits one on another: the share of all made so far that hold, and the drawdown\n",
        f"Of images held out of training, three sets of them; mean, and the largest drawdown of the three. Gates go "
        f"by {KEPT:,} training images; Auto's budget is for all edits together, measured on these.\n",
        "| edited, by | " + " | ".join(map(str, CHECKPOINTS)) + " | made by gates |",
        "|---|" + "---:|" * (len(CHECKPOINTS) + 1),
    ]
    for row in several:
        cells = []
        for point in CHECKPOINTS:
            some = [p for run in row["runs"] for p in run["points"] if p["edits"] == point]
            held, lost = [p["retained"] for p in some], [p["drawdown"] for p in some]
            shown = f"{100 * mean(held):.1f} %, {mean(lost):+.2f} (≤ {max(lost):+.2f})" if some else ""
            cells.append(shown)
        gates = mean(run["gates"] for run in row["runs"])
        lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | {100 * gates:.0f} % |")
    return "\n".join(lines) + "\n"


def short(rows: list[dict[str, Any]], names: Sequence[str]) -> str:
    """Return the table of README and docs."""
    lines = [
        "| edited, by | random labels: success | absolute drawdown | unasked | real mistakes: success | "
        "absolute drawdown | unasked | ms an edit | patch |",
        "|---|" + "---:|" * 8,
    ]
    for row in sorted((row for row in rows if row["name"] in names), key=lambda row: names.index(row["name"])):
        cells = []
        for kind in ("random", "mistakes"):
            found = row[kind]["figures"]
            cells += [found["success"], f"{row[kind]['drawdown_absolute']:.3f}", found["generality"]]
        costs = (f"{row['mistakes']['edit_ms']:.0f}", size(row["mistakes"]))
        lines.append(f"| {row['name']} | " + " | ".join((*cells, *costs)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--edits", type=int, default=EDITS, help="at most so many of each kind")
    parser.add_argument("--only", help="a part of the names to measure; an empty run only collects: --only nothing")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "metric")
    parser.add_argument("--readme", action="store_true", help="print the README's table")
    parser.add_argument("--advice", action="store_true", help="print the table of docs/choosing-an-editor.md")
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    if arguments.readme or arguments.advice:
        rows = [row for row in json.loads(RESULTS.read_text())["rows"] if len(row) > 2]
        print(short(rows, README if arguments.readme else [row["name"] for row in rows]))
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    train, test = images.fashion_mnist("train"), images.fashion_test()
    rows = []
    keep = wp.Locality(train.images[REFERENCE : REFERENCE + KEPT])
    for name, row_of in networks(train).items():
        path = arguments.runs / f"{name.replace(' ', '-').replace(',', '')}.json"
        row = json.loads(path.read_text()) if path.exists() else {"name": name}
        if arguments.only is None or arguments.only in name:
            made = None
            for kind in ("random", "mistakes"):
                if kind not in row:
                    made = made or row_of.make()
                    draw = random_edits(test, EDITS, seed=0) if kind == "random" else all_mistakes(test, made.model)
                    most = min(arguments.edits, row_of.edits)
                    row[kind] = measure(made, row_of.joint, draw[:most], test, keep)
                    path.write_text(json.dumps(row))
                    print(f"{name}: {kind} in {row[kind]['seconds']:.0f} s: {row[kind]['figures']}", flush=True)
        if len(row) > 1:
            rows.append(row)
    several, held_out = [], train[slice(len(train) - 5000, len(train))]
    for name, (made, count, remember) in sequences(train).items():
        path = arguments.runs / f"one-on-another-{name.replace(' ', '-').replace(',', '')}.json"
        row = json.loads(path.read_text()) if path.exists() else {"name": name, "runs": []}
        if arguments.only is None or arguments.only in f"one on another {name}":
            for seed in range(len(row["runs"]), SEEDS):
                row["runs"].append(
                    sequence(made, min(count, arguments.edits), remember, 100 + seed, held_out, test, keep)
                )
                path.write_text(json.dumps(row))
                print(f"{name}: {row['runs'][-1]}", flush=True)
        if row["runs"]:
            several.append(row)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows, "several": several}, indent=1) + "\n")
    TABLE.write_text(table(rows, several, machine()))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
