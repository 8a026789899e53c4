"""How much generality costs: the more altered copies are demanded, the more follows, and the more else changes.

    python benchmarks/locality_curve.py            # measures and draws; --show prints the stored numbers

Each image is demanded with 0, 1, 3 or 7 altered copies of it. What follows is the share of nine alterations that hold
and were never demanded (turned by ±8 degrees, and seven with fresh noise); drawdown is absolute, on all 10,000 test
images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from editable_table import Part
from fashion_table import all_mistakes, machine, random_edits
from metric_table import KEPT, REFERENCE, networks
from torch import Tensor

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editing import solve
from weightpatch.evaluation.predictor import FastPredictor
from weightpatch.preparing import prepared
from weightpatch.tasks import images

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "locality.json"
PICTURE = HERE.parent / "docs" / "images" / "locality.png"
ROWS = (
    "gate at fc",
    "fc, MinimumNorm",
    "conv2 of layer3, MinimumNorm",
    "sparse block, MinimumNorm",
    "editable, MinimumNorm",
)
COPIES, EDITS = (0, 1, 3, 7), 60


def further(image: Tensor) -> Tensor:
    noisy = [images.noise(image, std=0.1, seed=seed) for seed in range(1, 8)]
    return torch.cat([images.rotations(image, (-8.0, 8.0)), *noisy])


def measure(
    made: Part, edits: list[Classified], test: images.LabelledImages, keep: wp.Locality
) -> list[dict[str, Any]]:
    editor, model, network = prepared(made.model, made.parameters, made.editor, keep)
    predictor = FastPredictor(model, network, test.images, 250)
    base = float((predictor.likelihood.answer(predictor.base) != test.labels).double().mean())
    points = []
    for count in COPIES:
        lost, followed, held = [], [], []
        for fix in edits:
            inputs = torch.cat([fix.inputs, images.altered(fix.inputs)[:count]])
            solved = solve(network, Classified(inputs, fix.labels.repeat(len(inputs))), editor, keep)
            held.append(solved.after <= 0)
            classes = predictor.likelihood.answer(predictor.predict(solved.params).outputs)
            lost.append(100 * abs(float((classes != test.labels).double().mean()) - base))
            unasked = Classified(further(fix.inputs), fix.labels.repeat(9))
            with network.isolated():
                followed.append(float(unasked.met(network.full(solved.params)).double().mean()))
        points.append({"copies": count, "success": mean(held), "drawdown": mean(lost), "followed": mean(followed)})
    return points


def draw(results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    for axes, (kind, title) in zip(
        figure.subplots(1, 2), (("random", "random labels"), ("mistakes", "real mistakes")), strict=True
    ):
        for name, found in results["rows"].items():
            points = found[kind]
            axes.plot(
                [p["drawdown"] for p in points], [100 * p["followed"] for p in points], "o-", markersize=4, label=name
            )
            last = (points[-1]["drawdown"], 100 * points[-1]["followed"])
            axes.annotate("7 copies", last, (-6, 4), textcoords="offset points", fontsize=6, ha="right")
        axes.margins(0.08)
        axes.set(xscale="log", xlabel="drawdown, points (absolute)", ylabel="unasked alterations that follow, %")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize=7)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored numbers")
    parser.add_argument("--draw", action="store_true", help="draw the stored numbers again")
    parser.add_argument("--edits", type=int, default=EDITS, help="of each kind")
    arguments = parser.parse_args()
    if arguments.show:
        print(RESULTS.read_text())
        return
    if arguments.draw:
        draw(json.loads(RESULTS.read_text()))
        return
    train, test = images.fashion_mnist("train"), images.fashion_test()
    keep = wp.Locality(train.images[REFERENCE : REFERENCE + KEPT])
    results: dict[str, Any] = {"machine": machine(), "edits": arguments.edits, "rows": {}}
    for name in ROWS:
        made = networks(train)[name].make()
        kinds = {"random": random_edits(test, arguments.edits, seed=0), "mistakes": all_mistakes(test, made.model)}
        found = {kind: measure(made, edits[: arguments.edits], test, keep) for kind, edits in kinds.items()}
        results["rows"][name] = found
        print(name, found, flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)


if __name__ == "__main__":
    main()
