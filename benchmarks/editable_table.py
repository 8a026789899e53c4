"""Plain against editable on Fashion-MNIST: edits one at a time, several demands in one edit, and one edit on another.

    python benchmarks/editable_runs.py seed resnet18 sweep    # the trainings, hours; those that are done are skipped
    python benchmarks/editable_table.py                       # measures what is not measured yet
    python benchmarks/editable_table.py --show                # prints the stored table

Every network is measured with the same edits of test images, k = 10. `plain` is a plainly trained network, edited by
gradient descent: the shipped classifier on layer3, of six editors on six scopes the one with the least drawdown at 99 %
success or more (benchmarks/fashion_table.py); ResNet-18 on the layer, and both at the rate, that a validation split
favours. `+ sparse block` is the same network, answer for answer, with an untrained `SparseBlock`. `editable` is that
after Editable Training by a config, weights and rate as it left them. `+ Shrink` walks every edit back.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fashion_table import SCOPES, all_mistakes, machine, random_edits
from safetensors.torch import load_file
from torch import nn

import weightpatch as wp
from weightpatch.cli._model import load_model
from weightpatch.constraints import Classified
from weightpatch.editing import solve
from weightpatch.editors import Editor, GradientDescent, Shrink
from weightpatch.evaluation import Report, Sequential, figures, predict
from weightpatch.network import Network
from weightpatch.tasks import images
from weightpatch.training import ResidualBlock, SparseBlock, add_block
from weightpatch.training.config import read_config

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "editable.json", HERE / "results" / "editable.md"
JOINT = {1: 100, 5: 40, 25: 20, 75: 10, 125: 10}  # demands in one edit: how many such edits
CHECKPOINTS = (1, 10, 25, 50, 100, 200)
EDITS, HIDDEN, RATE = 1000, 1024, 0.5


@dataclass(frozen=True)
class Part:
    """A network, what edits move, and by what."""

    model: nn.Module
    parameters: tuple[str, ...]
    editor: Editor


def plain() -> Part:
    rows = json.loads((HERE / "results" / "fashion.json").read_text())["rows"]
    lr = next(row["lr"] for row in rows if row["row"] == "GradientDescent-layer3")
    return Part(images.fashion_classifier(), SCOPES["layer3"], GradientDescent(lr=lr))


def with_block(model: nn.Module, train: images.LabelledImages, seed: int) -> Part:
    torch.manual_seed(seed)
    parameters = add_block(model, "fc", HIDDEN, kind=SparseBlock, reference=train.images[:5000])
    return Part(model, (parameters,), GradientDescent(lr=RATE))


def trained(folder: Path) -> Part:
    """Return a network that `weightpatch train` made, with the editor as training left it."""
    config = folder / "config.toml"
    told = read_config(config if config.exists() else HERE.parent / "examples" / "fashion-editable.toml")
    model = load_model(told.model, None)
    parameters = told.parameters or ("*",)
    if told.block is not None:
        kind = SparseBlock if told.block.kind == "sparse" else ResidualBlock
        parameters = (add_block(model, told.block.before, told.block.hidden, kind=kind),)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    said = json.loads((folder / "result.json").read_text())["editor"]
    rates = dict(re.findall(r"'([\w.]+)': ([\d.e-]+)", said.partition("}")[0]))
    editor = replace(told.editor, lr={name: float(rate) for name, rate in rates.items()}) if rates else told.editor
    return Part(model.eval(), parameters, editor)


def chosen(part: Part, held_out: images.LabelledImages) -> Part:
    """Choose the layer and the rate of gradient descent by the rule of fashion_table.py, on the validation split."""
    tried: dict[tuple[str, float], tuple[float, float]] = {}
    for layer in ("layer3.*", "layer4.*", "fc.*"):
        for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
            one = Part(part.model, (layer,), GradientDescent(lr=lr))
            found = report_of(one, random_edits(held_out, 40, seed=1), held_out).summary
            tried[layer, lr] = found.success.value, found.drawdown_absolute.value
    best = max(success for success, _ in tried.values())
    good = {key: drawdown for key, (success, drawdown) in tried.items() if success >= best - 0.01}
    layer, lr = min(good, key=lambda key: good[key])
    return Part(part.model, (layer,), GradientDescent(lr=lr))


def report_of(part: Part, edits: list[Classified], data: images.LabelledImages) -> Report:
    return wp.evaluate(
        part.model,
        edits,
        part.editor,
        test=(data.images, data.labels),
        parameters=part.parameters,
        altered=images.altered,
        progress=False,
    )


def independent(part: Part, edits: list[Classified], test: images.LabelledImages) -> dict[str, Any]:
    report = report_of(part, edits, test)
    found = report.summary.drawdown_absolute.value
    return {"edits": len(edits), "figures": figures(report), "drawdown_absolute": found}


def joint(part: Part, test: images.LabelledImages) -> dict[str, Any]:
    """Several demands in one edit: the share of demands that hold on the final weights, and the drawdown."""
    network, found = Network(part.model, part.parameters), {}
    base = float((predict(part.model, test.images).argmax(1) != test.labels).double().mean())
    for count, repeats in JOINT.items():
        held, drawdowns = 0, []
        for repeat in range(repeats):
            some = random_edits(test, count, seed=1000 + repeat)
            whole = Classified(torch.cat([c.inputs for c in some]), torch.cat([c.labels for c in some]))
            solved = solve(network, whole, part.editor)
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


def sequential(part: Part, test: images.LabelledImages) -> list[dict[str, Any]]:
    """Random-label edits one on another: how many of all made so far hold, and the drawdown."""
    report = wp.evaluate(
        part.model,
        random_edits(test, max(CHECKPOINTS), seed=2),
        part.editor,
        test=(test.images, test.labels),
        parameters=part.parameters,
        protocol=Sequential(CHECKPOINTS),
        progress=False,
    )
    return [
        {
            "edits": point.edits,
            "retained": point.retained / point.edits,
            "drawdown": point.impact.error - report.base_error,
        }
        for point in report.checkpoints
    ]


def measure(name: str, make: Callable[[], Part], test: images.LabelledImages, runs: Path) -> None:
    path = runs / f"{name.replace(' ', '-')}.json"
    facts = json.loads(path.read_text()) if path.exists() else {"name": name}
    alone = "Shrink" in name or "sweep" in name  # such rows have edits one at a time alone
    wanted = ("random", "mistakes") if alone else ("random", "mistakes", "joint", "sequential")
    if all(key in facts for key in wanted):
        return
    part = make()
    inner = part.editor.editor if isinstance(part.editor, Shrink) else part.editor
    rates = inner.lr if isinstance(inner.lr, dict) else {"": inner.lr}
    facts |= {"lr": next(iter(rates.values())) if len(rates) == 1 else None, "parameters": part.parameters}
    tasks: dict[str, Callable[[], Any]] = {
        "random": lambda: independent(part, random_edits(test, EDITS, seed=0), test),
        "mistakes": lambda: independent(part, all_mistakes(test, part.model), test),
        "joint": lambda: joint(part, test),
        "sequential": lambda: sequential(part, test),
    }
    for key in wanted:
        if key not in facts:
            began = time.monotonic()
            facts[key] = tasks[key]()
            path.write_text(json.dumps(facts))
            print(f"{name}: {key} in {time.monotonic() - began:.0f} s", flush=True)


def finished(runs: Path, pattern: str) -> list[Path]:
    return sorted(path.parent for path in runs.glob(f"{pattern}/result.json"))


def networks(train: images.LabelledImages, runs: Path) -> dict[str, Callable[[], Part]]:
    """Return, by name and in the order of the table, what is measured."""
    held_out = train[slice(len(train) - 5000, len(train))]

    def shrunk(make: Callable[[], Part]) -> Callable[[], Part]:
        return lambda: replace(part := make(), editor=Shrink(part.editor))

    found: dict[str, Callable[[], Part]] = {
        "plain": plain,
        "plain + sparse block": lambda: with_block(images.fashion_classifier(), train, 0),
    }
    found |= {f"editable seed {seed}": lambda seed=seed: trained(runs / f"seed-{seed}") for seed in range(3)}
    for name in ("plain", "plain + sparse block", "editable seed 0"):
        found[f"{name} + Shrink"] = shrunk(found[name])
    for seed in range(3):
        folder = runs / f"resnet18-plain-{seed}"
        found[f"ResNet-18 plain seed {seed}"] = lambda folder=folder: chosen(trained(folder), held_out)
    for seed in range(3):
        folder = runs / f"resnet18-plain-{seed}"
        found[f"ResNet-18 plain + sparse block seed {seed}"] = lambda folder=folder, seed=seed: with_block(
            trained(folder).model, train, seed
        )
    for kind in ("finetuned", "scratch"):
        for folder in finished(runs, f"resnet18-{kind}-*"):
            found[f"ResNet-18 editable {kind} seed {folder.name[-1]}"] = lambda folder=folder: trained(folder)
    for folder in finished(runs, "sweep-*"):
        found[folder.name.replace("-", " ")] = lambda folder=folder: trained(folder)
    return found


def table(rows: list[dict[str, Any]], where: str) -> str:
    shown = ("base error", "success", "steps", "drawdown", "absolute", "max", "generality")
    lines = [
        "# Plain against editable on Fashion-MNIST\n",
        "Made by `python benchmarks/editable_table.py` after the trainings of `benchmarks/editable_runs.py`, on "
        f"{where}. Edits of test images, k = 10, margin 0; drawdown in percentage points on all 10,000 test images; "
        "generality on seven altered copies of the edited image. How each network came about is said in the scripts; "
        "rows without ResNet-18 are the demo's small network, ResNet-18 has width 8.\n",
    ]
    if any(row["name"].startswith("sweep") for row in rows):
        lines.append(
            "`sweep` rows: one seed, shipped weights where it says finetuned, 6 epochs where it says scratch or plain; "
            "c scales c_edit = c_loc = c and c_gen = c / 10; elu is the paper's block, layer3 the network's own; "
            "without either, the sparse block with c = 1.\n"
        )
    for key, title in (("random", f"{EDITS} random-label edits, one at a time"), ("mistakes", "All real mistakes")):
        lines += [f"## {title}\n", "| network | lr | edits | " + " | ".join(shown) + " |"]
        lines.append("|---|---:|---:|" + "---:|" * len(shown))
        for row in rows:
            cells = " | ".join(row[key]["figures"][column] for column in shown)
            lr = "learned" if row["lr"] is None else f"{row['lr']:.3g}"
            lines.append(f"| {row['name']} | {lr} | {row[key]['edits']} | {cells} |")
        lines.append("")
    rows = [row for row in rows if "sequential" in row]
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
    """Return the README's rows: seeds averaged, with their standard deviation."""
    rows, groups = [row for row in rows if "sequential" in row], {}
    for row in rows:
        groups.setdefault(row["name"].partition(" seed ")[0], []).append(row)
    groups = {f"{name}, {len(some)} seeds" if len(some) > 1 else name: some for name, some in groups.items()}
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


def collect(names: Iterable[str], runs: Path) -> None:
    paths = [runs / f"{name.replace(' ', '-')}.json" for name in names]
    rows = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = [row for row in rows if "mistakes" in row]
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
    made = networks(train, arguments.runs)
    for name, make in made.items():
        if arguments.only is None or arguments.only in name:
            measure(name, make, test, arguments.runs)
    collect(made, arguments.runs)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
