"""The table of editors on Fashion-MNIST: each on the whole model and on each block (stem, layer1 to layer3, head fc).

1000 random-label edits of test images a row.

    python benchmarks/fashion_table.py            # all rows; a killed run continues (--shard 0/2 and 1/2 in parallel)
    python benchmarks/fashion_table.py --show     # print the stored table

Learning rates are chosen on a validation split: edits of held-out training images, drawdown on the same 5,000 images,
which the shipped classifier never saw. The rule: of the rates whose success is within one point of the best one's, the
least absolute drawdown. `Shrink` rows wrap each editor, with the chosen rate, on the block its validation favours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editing import solve
from weightpatch.editors import (
    Adam,
    GradientDescent,
    IterativeEditor,
    Momentum,
    RMSProp,
    RProp,
    ScaledGradientDescent,
    Shrink,
    ladder,
)
from weightpatch.evaluation import figures, predict
from weightpatch.network import Network
from weightpatch.tasks import images

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fashion.json"
TABLE = HERE / "results" / "fashion.md"
SCOPES = {
    "whole model": ("*",),
    "stem": ("conv1.*", "bn1.*"),
    "layer1": ("layer1.*",),
    "layer2": ("layer2.*",),
    "layer3": ("layer3.*",),
    "fc": ("fc.*",),
}
GRIDS: dict[IterativeEditor, tuple[float, ...]] = {
    GradientDescent(): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ScaledGradientDescent(): (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    RProp(): (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    RMSProp(): (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    Momentum(): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    Adam(): (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
ORDER = ("fc", "layer3", "layer2", "layer1", "stem", "whole model")
EDITS, VALIDATION_EDITS, HELD_OUT, KEPT, TIMED = 1000, 40, 5000, 256, 50


@dataclass(frozen=True)
class Row:
    """One line of the table: an editor on one scope, with or without Shrink; or the default ladder (None)."""

    editor: IterativeEditor | None
    scope: str
    shrink: bool = False
    mistakes: bool = False

    @property
    def name(self) -> str:
        if self.editor is None:
            return f"ladder, {'all real mistakes' if self.mistakes else 'random labels'}"
        return f"{type(self.editor).__name__}{' + Shrink' if self.shrink else ''}"

    @property
    def key(self) -> str:
        return f"{self.name}-{self.scope}".replace(", ", "-").replace(" ", "-")


def random_edits(data: images.LabelledImages, n: int, seed: int) -> list[Classified]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data), generator=draw)[:n].tolist()
    labels = torch.randint(0, len(data.classes), (n,), generator=draw)
    return [Classified(data.images[i : i + 1], y[None]) for i, y in zip(rows, labels, strict=True)]


def all_mistakes(data: images.LabelledImages, model: nn.Module) -> list[Classified]:
    answers = predict(model, data.images).argmax(1)
    rows = (answers != data.labels).nonzero().squeeze(1).tolist()
    return [Classified(data.images[i : i + 1], data.labels[i : i + 1]) for i in rows]


def measure(scope: str, editor, data: images.LabelledImages, edits: list[Classified], results: Path, keep=None):
    return wp.evaluate(
        images.fashion_classifier(),
        edits,
        editor,
        test=(data.images, data.labels),
        parameters=SCOPES[scope],
        keep=keep,
        altered=images.altered,
        results=results,
        progress=False,
    )


def choose(row: Row, held_out: images.LabelledImages, runs: Path) -> tuple[float, dict[str, float]]:
    """Pick the learning rate on the validation split; return it with its validation figures."""
    plain = replace(row, shrink=False)
    if (known := runs / f"{plain.key}.json").exists():
        facts = json.loads(known.read_text())
        return facts["lr"], facts["validation"]
    edits = random_edits(held_out, VALIDATION_EDITS, seed=1)
    tried = {}
    for lr in GRIDS[row.editor]:
        results = runs / f"validation-{plain.key}-{lr:g}.jsonl"
        report = measure(row.scope, replace(row.editor, lr=lr), held_out, edits, results)
        tried[lr] = (report.summary.success.value, report.summary.drawdown_absolute.value)
    best = max(success for success, _ in tried.values())
    lr = min((lr for lr, (success, _) in tried.items() if success >= best - 0.01), key=lambda lr: tried[lr][1])
    return lr, {"success": tried[lr][0], "drawdown_absolute": tried[lr][1]}


def run(rows: list[Row], train: images.LabelledImages, test: images.LabelledImages, runs: Path) -> None:
    held_out = train[slice(len(train) - HELD_OUT, len(train))]
    for row in rows:
        if (runs / f"{row.key}.json").exists():
            continue
        lr, validation, keep = None, None, None
        if row.editor is None:
            editor, keep = ladder(keep_weight=100.0), wp.Locality(train.images[:KEPT])
        else:
            lr, validation = choose(row, held_out, runs)
            editor = replace(row.editor, lr=lr)
        edits = all_mistakes(test, images.fashion_classifier()) if row.mistakes else random_edits(test, EDITS, seed=0)
        wrapped = Shrink(editor) if row.shrink else editor
        report = measure(row.scope, wrapped, test, edits, runs / f"test-{row.key}.jsonl", keep)
        facts = {"row": row.key, "name": row.name, "scope": row.scope, "lr": lr, "validation": validation}
        facts |= {"figures": figures(report), "summary": asdict(report.summary)}
        (runs / f"{row.key}.json").write_text(json.dumps(facts))
        print(f"{row.key:45} lr {lr} {figures(report)}", flush=True)
        collect(runs)


def plain_rows() -> list[Row]:
    return [Row(editor, scope) for scope in ORDER for editor in GRIDS]


def extra_rows() -> list[Row]:
    return [Row(None, "layer3", mistakes=True), Row(None, "layer3")]


def shrink_rows(runs: Path) -> list[Row]:
    """Wrap every editor on the scope where its validation drawdown is least among those that succeed best."""
    return [Row(editor, best_scope(editor, runs), shrink=True) for editor in GRIDS]


def best_scope(editor: IterativeEditor, runs: Path) -> str:
    found = {scope: json.loads((runs / f"{Row(editor, scope).key}.json").read_text())["validation"] for scope in ORDER}
    best = max(v["success"] for v in found.values())
    good = {scope: v for scope, v in found.items() if v["success"] >= best - 0.01}
    return min(good, key=lambda scope: good[scope]["drawdown_absolute"])


def collect(runs: Path) -> None:
    """Gather the finished rows into results/fashion.json and results/fashion.md."""
    order = {row.key: place for place, row in enumerate(plain_rows())}
    found = [json.loads(path.read_text()) for path in runs.glob("*.json")]
    found.sort(key=lambda facts: (order.get(facts["row"], len(order)), facts["row"]))
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")
    TABLE.write_text(table(found, machine()))


def machine() -> str:
    named = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return f"{next(named, ': unknown').split(':')[1].strip()}, {os.cpu_count()} cores, torch {torch.__version__}"


def restore(runs: Path) -> None:
    """Take the rows that results/fashion.json has as done."""
    if RESULTS.exists():
        for facts in json.loads(RESULTS.read_text())["rows"]:
            if not (path := runs / f"{facts['row']}.json").exists():
                path.write_text(json.dumps(facts))


def table(rows: list[dict], where: str) -> str:
    columns = [column for column in rows[0]["figures"] if column != "KL"]
    lines = [
        "# Editors on Fashion-MNIST\n",
        f"{EDITS} random-label edits of test images, k = 10 steps, margin 0, one at a time, each measured on all "
        "10,000 test images; learning rates were chosen on held-out training images. `ladder` is the default editor "
        "with 256 training images kept, up to 100 steps a rung. Made by `python benchmarks/fashion_table.py`; "
        f"milliseconds, of the edit alone, by `--time` on {where}: the median of {TIMED} edits, one thread. Drawdown "
        "is in percentage points.\n",
        "| editor | edited | lr | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---:|" * len(columns),
    ]
    for facts in rows:
        lr = "" if facts["lr"] is None else f"{facts['lr']:g}"
        cells = " | ".join(facts["figures"][column] for column in columns)
        lines.append(f"| {facts['name']} | {facts['scope']} | {lr} | {cells} |")
    return "\n".join(lines) + "\n"


def retime(rows: list[Row], test: images.LabelledImages, train: images.LabelledImages, runs: Path) -> None:
    """Measure the milliseconds of every finished row again, alone on the machine: a median, on one thread."""
    torch.set_num_threads(1)
    model = images.fashion_classifier()
    for row in rows:
        facts = json.loads((path := runs / f"{row.key}.json").read_text())
        editor = ladder(keep_weight=100.0) if row.editor is None else replace(row.editor, lr=facts["lr"])
        editor = Shrink(editor) if row.shrink else editor
        keep = wp.Locality(train.images[:KEPT]) if row.editor is None else None
        network, seconds = Network(model, SCOPES[row.scope]), []
        for edit in (all_mistakes(test, model) if row.mistakes else random_edits(test, EDITS, seed=0))[:TIMED]:
            started = time.perf_counter()
            if solve(network, edit, editor, keep).steps:
                seconds.append(time.perf_counter() - started)
        facts["figures"]["ms/edit"] = f"{1000 * statistics.median(seconds):.1f}"
        path.write_text(json.dumps(facts))
        print(f"{row.key:45} {facts['figures']['ms/edit']} ms", flush=True)
    collect(runs)


def readme_table(rows: list[dict]) -> str:
    """Return the README's rows: every editor on the scope that validation favours, plain and shrunk, and the ladder."""
    shown = ("success", "steps", "drawdown", "absolute", "max", "broken/repaired/other", "generality", "ms/edit")
    best = {facts["name"].removesuffix(" + Shrink"): facts["scope"] for facts in rows if "Shrink" in facts["name"]}
    picked = [f for f in rows if best.get(f["name"].removesuffix(" + Shrink"), f["scope"]) == f["scope"]]
    picked.sort(key=lambda facts: facts["name"].removesuffix(" + Shrink"))
    lines = ["| editor | edited | " + " | ".join(shown) + " |", "|---|---|" + "---:|" * len(shown)]
    lines += [f"| {f['name']} | {f['scope']} | " + " | ".join(f["figures"][c] for c in shown) + " |" for f in picked]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--readme", action="store_true", help="print the README's table")
    parser.add_argument("--time", action="store_true", help="measure the milliseconds again, on a quiet machine")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--last", action="store_true", help="the rows that need all others: Shrink and ladder")
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    if arguments.readme:
        print(readme_table(json.loads(RESULTS.read_text())["rows"]))
        return
    part, parts = map(int, arguments.shard.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    restore(arguments.runs)
    train, test = images.fashion_mnist("train"), images.fashion_test()
    if arguments.time:
        every = [row for row in plain_rows() + extra_rows() if (arguments.runs / f"{row.key}.json").exists()]
        shrunk = [Row(e, scope, shrink=True) for e in GRIDS for scope in ORDER]
        every += [row for row in shrunk if (arguments.runs / f"{row.key}.json").exists()]
        retime(every, test, train, arguments.runs)
        return
    rows = shrink_rows(arguments.runs) + extra_rows() if arguments.last else plain_rows()
    run(rows[part::parts], train, test, arguments.runs)
    if parts == 1 and not arguments.last:
        run(shrink_rows(arguments.runs) + extra_rows(), train, test, arguments.runs)


if __name__ == "__main__":
    main()
