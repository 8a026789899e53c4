"""Edits in the metric of a layer's inputs on Fashion-MNIST: one input alone, and jointly with altered copies of it.

    python benchmarks/metric_table.py                  # measures what is not measured yet; --edits N for fewer
    python benchmarks/metric_table.py --show           # prints the stored table

The metric is E[x xᵀ] of the edited layer's inputs on 10,000 training images, shrinkage 0.001; nothing is trained, and
no learning rate is chosen. `jointly` demands the image and seven altered copies of it together (shifts, rotations by 5
degrees, noise); `unasked` is then the share that holds of further alterations of these eight: turned by 8 degrees, or
with fresh noise. `alone` demands the image, and `unasked` are the seven copies. Settings were chosen on the last 5,000
training images; edits are of test images, drawdown is on all 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from editable_table import RATE, Part, plain, with_block
from fashion_table import all_mistakes, machine, random_edits
from torch import Tensor

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import GradientDescent, MinimumNorm, Preconditioned
from weightpatch.evaluation import figures
from weightpatch.statistics import second_moments
from weightpatch.tasks import images

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "metric.json", HERE / "results" / "metric.md"
CONVOLUTIONS = ("layer3.0.conv1.weight", "layer3.0.conv2.weight", "layer3.0.downsample.0.weight")
SHRINKAGE, REFERENCE, EDITS = 0.001, 10_000, 1000
SHOWN = ("success", "steps", "drawdown", "absolute", "max", "broken/repaired/other")


def part(model: torch.nn.Module, parameters: tuple[str, ...], train: images.LabelledImages, kind: type) -> Part:
    moments = second_moments(model, train.images[:REFERENCE], parameters=parameters)
    settings = {"max_steps": 40} if kind is Preconditioned else {}
    return Part(model, parameters, kind(metric=moments.metric(SHRINKAGE), **settings))


def networks(train: images.LabelledImages) -> dict[str, tuple[Callable[[], Part], bool]]:
    """Return, by name, a network with its editor, and whether altered copies are demanded too."""

    def classifier(parameters: tuple[str, ...], kind: type) -> Callable[[], Part]:
        return lambda: part(images.fashion_classifier(), parameters, train, kind)

    def sparse(kind: type) -> Callable[[], Part]:
        def make() -> Part:
            blocked = with_block(images.fashion_classifier(), train, 0)
            return part(blocked.model, blocked.parameters, train, kind)

        return make

    def editable(kind: type) -> Callable[[], Part]:
        return lambda: part(images.fashion_editable(), (images.EDITED,), train, kind)

    def descent() -> Part:
        blocked = with_block(images.fashion_classifier(), train, 0)
        return Part(blocked.model, blocked.parameters, GradientDescent(lr=RATE, max_steps=100))

    found: dict[str, tuple[Callable[[], Part], bool]] = {}
    for joint, how in ((True, "jointly"), (False, "alone")):
        found |= {
            f"sparse block, MinimumNorm, {how}": (sparse(MinimumNorm), joint),
            f"editable, MinimumNorm, {how}": (editable(MinimumNorm), joint),
            f"layer3, MinimumNorm, {how}": (classifier(CONVOLUTIONS, MinimumNorm), joint),
            f"layer3, Preconditioned, {how}": (classifier(CONVOLUTIONS, Preconditioned), joint),
            f"fc, MinimumNorm, {how}": (classifier(("fc.*",), MinimumNorm), joint),
            f"sparse block, GradientDescent, {how}": (descent, joint),
            f"layer3, GradientDescent, {how}": (plain, joint),
        }
    return found


def with_copies(fix: Classified) -> Classified:
    inputs = torch.cat([fix.inputs, images.altered(fix.inputs)])
    return Classified(inputs, fix.labels.repeat(len(inputs)))


def further(inputs: Tensor) -> Tensor:
    return torch.cat([images.rotations(inputs, (-8.0, 8.0)), images.noise(inputs, std=0.1, seed=1)])


def measure(made: Part, joint: bool, edits: list[Classified], test: images.LabelledImages) -> dict[str, Any]:
    fixes = [with_copies(fix) for fix in edits] if joint else edits
    began = time.monotonic()
    report = wp.evaluate(
        made.model,
        fixes,
        made.editor,
        test=(test.images, test.labels),
        parameters=made.parameters,
        altered=further if joint else images.altered,
        progress=False,
    )
    seconds = sorted(row.seconds for row in report.rows if row.steps)
    return {
        "edits": len(edits),
        "figures": figures(report),
        "drawdown_absolute": report.summary.drawdown_absolute.value,
        "edit_ms": 1000 * seconds[len(seconds) // 2],
        "seconds": time.monotonic() - began,
    }


def table(rows: list[dict[str, Any]], where: str) -> str:
    lines = [
        "# Edits in the metric of a layer's inputs, on Fashion-MNIST\n",
        f"Made by `python benchmarks/metric_table.py` on {where}. Drawdown in percentage points on all 10,000 test "
        "images; what the rows are is said in the script. `jointly`: the image and seven altered copies are demanded; "
        "`unasked`: the share that holds of alterations that were not.\n",
    ]
    for kind, title in (("random", "Random labels"), ("mistakes", "Real mistakes")):
        lines += [f"## {title}\n", "| edited, by | edits | " + " | ".join(SHOWN) + " | unasked | ms an edit |"]
        lines.append("|---|---:|" + "---:|" * (len(SHOWN) + 2))
        for row in rows:
            if kind in row:
                cells = " | ".join(str(row[kind]["figures"].get(column, "")) for column in (*SHOWN, "generality"))
                lines.append(f"| {row['name']} | {row[kind]['edits']} | {cells} | {row[kind]['edit_ms']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--edits", type=int, default=EDITS, help="at most so many of each kind")
    parser.add_argument("--only", help="a part of the names to measure")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "metric")
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    train, test = images.fashion_mnist("train"), images.fashion_test()
    rows = []
    for name, (make, joint) in networks(train).items():
        path = arguments.runs / f"{name.replace(' ', '-').replace(',', '')}.json"
        row = json.loads(path.read_text()) if path.exists() else {"name": name}
        if arguments.only is None or arguments.only in name:
            made = None
            for kind in ("random", "mistakes"):
                if kind not in row:
                    made = made or make()
                    draw = random_edits(test, EDITS, seed=0) if kind == "random" else all_mistakes(test, made.model)
                    row[kind] = measure(made, joint, draw[: arguments.edits], test)
                    path.write_text(json.dumps(row))
                    print(f"{name}: {kind} in {row[kind]['seconds']:.0f} s: {row[kind]['figures']}", flush=True)
        if len(row) > 1:
            rows.append(row)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    TABLE.write_text(table(rows, machine()))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
