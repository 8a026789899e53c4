"""Plain against editable on Fashion-MNIST: edits one at a time, several demands in one edit, and one edit on another.

    weightpatch train examples/fashion-editable.toml --folder benchmarks/runs/editable/seed-0    # seeds 0, 1, 2
    python benchmarks/editable_table.py          # measures what is not measured yet
    python benchmarks/editable_table.py --show   # prints the stored table

Every network is measured with the same edits of test images, k = 10. `plain` is the shipped classifier, edited by
gradient descent on layer3, of six editors on six scopes the one with the least drawdown at 99 % success or more, its
rate chosen on the validation split (benchmarks/fashion_table.py). `plain + sparse block` is the same classifier, answer
for answer, with an untrained `SparseBlock`. `editable` is that after Editable Training by the config, weights and rate
as it left them. On the test set nothing was chosen but which plain editor to show, in its favour.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fashion_table import SCOPES, all_mistakes, machine, random_edits
from safetensors.torch import load_file
from torch import nn

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editing import solve
from weightpatch.editors import GradientDescent
from weightpatch.evaluation import Sequential, figures, predict
from weightpatch.network import Network
from weightpatch.tasks import images
from weightpatch.training import SparseBlock, add_block

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "editable.json", HERE / "results" / "editable.md"
JOINT = {1: 100, 5: 40, 25: 20, 75: 10, 125: 10}  # demands in one edit: how many such edits
CHECKPOINTS = (1, 10, 25, 50, 100, 200)
EDITS, HIDDEN, RATE = 1000, 1024, 0.5


def plain() -> tuple[nn.Module, tuple[str, ...], GradientDescent]:
    rows = json.loads((HERE / "results" / "fashion.json").read_text())["rows"]
    lr = next(row["lr"] for row in rows if row["row"] == "GradientDescent-layer3")
    return images.fashion_classifier(), SCOPES["layer3"], GradientDescent(lr=lr)


def untrained(train: images.LabelledImages, seed: int) -> tuple[nn.Module, tuple[str, ...], GradientDescent]:
    torch.manual_seed(seed)
    model = images.fashion_classifier()
    parameters = add_block(model, "fc", HIDDEN, kind=SparseBlock, reference=train.images[:5000])
    return model, (parameters,), GradientDescent(lr=RATE)


def editable(folder: Path) -> tuple[nn.Module, tuple[str, ...], GradientDescent]:
    model = images.fashion_classifier()
    parameters = add_block(model, "fc", HIDDEN, kind=SparseBlock)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    told = json.loads((folder / "result.json").read_text())["editor"]
    found = re.match(r"GradientDescent\(lr=\{'fc\.block\.outer\.weight': ([\d.e-]+)\}", told)
    assert found is not None, told
    return model.eval(), (parameters,), GradientDescent(lr=float(found[1]))


def independent(part: tuple, edits: list[Classified], test: images.LabelledImages) -> dict[str, Any]:
    model, parameters, editor = part
    report = wp.evaluate(
        model,
        edits,
        editor,
        test=(test.images, test.labels),
        parameters=parameters,
        altered=images.altered,
        progress=False,
    )
    found = report.summary
    return {"edits": len(edits), "figures": figures(report), "drawdown_absolute": found.drawdown_absolute.value}


def joint(part: tuple, test: images.LabelledImages) -> dict[str, Any]:
    """Several demands in one edit: the share of demands that hold on the final weights, and the drawdown."""
    model, parameters, editor = part
    network, found = Network(model, parameters), {}
    base = float((predict(model, test.images).argmax(1) != test.labels).double().mean())
    for count, repeats in JOINT.items():
        held, drawdowns = 0, []
        for repeat in range(repeats):
            some = random_edits(test, count, seed=1000 + repeat)
            whole = Classified(torch.cat([c.inputs for c in some]), torch.cat([c.labels for c in some]))
            solved = solve(network, whole, editor)
            with torch.no_grad(), network.isolated():
                held += int((whole.violation(network.full(solved.params)) <= 0).sum())
                if repeat < 5:
                    after = predict(network.at(solved.params), test.images, 500)
                    wrong = float((after.argmax(1) != test.labels).double().mean())
                    drawdowns.append(100 * (wrong - base))
        found[str(count)] = {
            "edits": repeats,
            "success": held / (count * repeats),
            "drawdown": sum(drawdowns) / len(drawdowns),
        }
    return found


def sequential(part: tuple, test: images.LabelledImages) -> list[dict[str, Any]]:
    """Random-label edits one on another: how many of all made so far hold, and the drawdown."""
    model, parameters, editor = part
    report = wp.evaluate(
        model,
        random_edits(test, max(CHECKPOINTS), seed=2),
        editor,
        test=(test.images, test.labels),
        parameters=parameters,
        protocol=Sequential(CHECKPOINTS),
        progress=False,
    )
    return [
        {
            "edits": point.edits,
            "retained": point.retained / point.edits,
            "drawdown": 100 * (point.impact.error - report.base_error),
        }
        for point in report.checkpoints
    ]


def measure(name: str, part: tuple, test: images.LabelledImages, runs: Path) -> None:
    path = runs / f"{name.replace(' ', '-')}.json"
    facts = json.loads(path.read_text()) if path.exists() else {"name": name, "lr": part[2].lr}
    tasks: dict[str, Callable[[], Any]] = {
        "random": lambda: independent(part, random_edits(test, EDITS, seed=0), test),
        "mistakes": lambda: independent(part, all_mistakes(test, part[0]), test),
        "joint": lambda: joint(part, test),
        "sequential": lambda: sequential(part, test),
    }
    for key, task in tasks.items():
        if key not in facts:
            began = time.monotonic()
            facts[key] = task()
            path.write_text(json.dumps(facts))
            print(f"{name}: {key} in {time.monotonic() - began:.0f} s", flush=True)


def table(rows: list[dict[str, Any]], where: str) -> str:
    shown = ("base error", "success", "steps", "drawdown", "absolute", "max", "generality")
    lines = [
        "# Plain against editable on Fashion-MNIST\n",
        "Made by `python benchmarks/editable_table.py` after `weightpatch train examples/fashion-editable.toml` with "
        f"seeds 0, 1, 2, on {where}. Edits of test images, k = 10, margin 0; drawdown in percentage points on all "
        "10,000 test images; generality on seven altered copies of the edited image. How each network came about is "
        "said in the script.\n",
    ]
    for key, title in (("random", f"{EDITS} random-label edits, one at a time"), ("mistakes", "All real mistakes")):
        lines += [f"## {title}\n", "| network | lr | edits | " + " | ".join(shown) + " |"]
        lines.append("|---|---:|---:|" + "---:|" * len(shown))
        for row in rows:
            cells = " | ".join(row[key]["figures"][column] for column in shown)
            lines.append(f"| {row['name']} | {row['lr']:.3g} | {row[key]['edits']} | {cells} |")
        lines.append("")
    lines += ["## Several demands in one edit: the share that holds, and the drawdown\n"]
    lines += ["| network | " + " | ".join(map(str, JOINT)) + " |", "|---|" + "---:|" * len(JOINT)]
    for row in rows:
        cells = [f"{100 * found['success']:.1f} %, {found['drawdown']:+.2f}" for found in row["joint"].values()]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines += ["", "## Random-label edits one on another: the share of all that still hold, and the drawdown\n"]
    lines += ["| network | " + " | ".join(map(str, CHECKPOINTS)) + " |", "|---|" + "---:|" * len(CHECKPOINTS)]
    for row in rows:
        cells = [f"{100 * found['retained']:.1f} %, {found['drawdown']:+.2f}" for found in row["sequential"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def readme_table(rows: list[dict[str, Any]]) -> str:
    """Return the README's rows: the seeds of the editable network averaged, with their standard deviation."""
    groups = {name: [row for row in rows if row["name"] == name] for name in ("plain", "plain + sparse block")}
    seeds = [row for row in rows if row["name"].startswith("editable")]
    groups[f"editable, {len(seeds)} seeds"] = seeds
    wanted: dict[str, tuple[Callable[[dict], float], str]] = {
        "base error": (lambda row: _number(row["random"]["figures"]["base error"]), "{:.2f} %"),
        "success": (lambda row: _number(row["random"]["figures"]["success"]), "{:.1f} %"),
        "steps": (lambda row: _number(row["random"]["figures"]["steps"]), "{:.2f}"),
        "absolute drawdown": (lambda row: row["random"]["drawdown_absolute"], "{:.3f}"),
        "generality": (lambda row: _number(row["random"]["figures"]["generality"]), "{:.1f} %"),
        "125 in one edit": (lambda row: 100 * row["joint"]["125"]["success"], "{:.1f} %"),
        "real mistakes: drawdown": (lambda row: row["mistakes"]["drawdown_absolute"], "{:.3f}"),
        "generality ": (lambda row: _number(row["mistakes"]["figures"]["generality"]), "{:.1f} %"),
    }
    lines = ["| network | " + " | ".join(map(str.strip, wanted)) + " |", "|---|" + "---:|" * len(wanted)]
    for name, some in groups.items():
        cells = []
        for value, form in wanted.values():
            numbers = [value(row) for row in some]
            spread = f" ±{statistics.stdev(numbers):.2g}" if len(numbers) > 1 and statistics.stdev(numbers) else ""
            cells.append(form.format(statistics.mean(numbers)) + spread)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(text: str) -> float:
    return float(text.split()[0])


def collect(runs: Path) -> None:
    rows = [json.loads(path.read_text()) for path in runs.glob("*.json")]
    rows = sorted((row for row in rows if "sequential" in row), key=lambda row: (row["name"] != "plain", row["name"]))
    rows.sort(key=lambda row: row["name"].startswith("editable"))
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    TABLE.write_text(table(rows, machine()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--readme", action="store_true", help="print the README's table")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "editable")
    parser.add_argument("--only", help="a part of the names of the networks to measure")
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    if arguments.readme:
        print(readme_table(json.loads(RESULTS.read_text())["rows"]))
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    train, test = images.fashion_mnist("train"), images.fashion_test()
    made: dict[str, Callable[[], tuple]] = {"plain": plain, "plain + sparse block": lambda: untrained(train, 0)}
    for folder in sorted(arguments.runs.glob("*/result.json")):
        name = f"editable {folder.parent.name}".replace("-", " ")
        made[name] = lambda folder=folder: editable(folder.parent)
    for name, make in made.items():
        if arguments.only is None or arguments.only in name:
            measure(name, make(), test, arguments.runs)
    collect(arguments.runs)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
