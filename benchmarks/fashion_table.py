"""The table of editors on Fashion-MNIST: each on the whole model and on each block, 1000 random-label test edits.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import (
    Adam,
    GradientDescent,
    IterativeEditor,
    Momentum,
    RMSProp,
    RProp,
    ScaledGradientDescent,
    Shrink,
)
from weightpatch.evaluation import figures
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
EDITS, VALIDATION_EDITS, HELD_OUT = 1000, 40, 5000


@dataclass(frozen=True)
class Row:
    """One line of the table: an editor, with or without Shrink, on one scope."""

    editor: IterativeEditor
    scope: str
    shrink: bool = False

    @property
    def key(self) -> str:
        return f"{type(self.editor).__name__}{'+Shrink' if self.shrink else ''}-{self.scope}".replace(" ", "-")


def random_edits(data: images.LabelledImages, n: int, seed: int) -> list[Classified]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data), generator=draw)[:n].tolist()
    labels = torch.randint(0, len(data.classes), (n,), generator=draw)
    return [Classified(data.images[i : i + 1], y[None]) for i, y in zip(rows, labels, strict=True)]


def measure(row: Row, editor, data: images.LabelledImages, edits: list[Classified], name: str, runs: Path) -> wp.Report:
    return wp.evaluate(
        images.fashion_classifier(),
        edits,
        editor,
        test=(data.images, data.labels),
        parameters=SCOPES[row.scope],
        altered=images.altered,
        results=runs / f"{name}.jsonl",
        progress=False,
    )


def choose(row: Row, held_out: images.LabelledImages, runs: Path) -> tuple[float, dict[str, float]]:
    """Pick the learning rate on the validation split; return it with its validation figures."""
    edits = random_edits(held_out, VALIDATION_EDITS, seed=1)
    tried = {}
    for lr in GRIDS[row.editor]:
        report = measure(row, replace(row.editor, lr=lr), held_out, edits, f"validation-{row.key}-{lr:g}", runs)
        tried[lr] = (report.summary.success.value, report.summary.drawdown_absolute.value)
    best = max(success for success, _ in tried.values())
    lr = min((lr for lr, (success, _) in tried.items() if success >= best - 0.01), key=lambda lr: tried[lr][1])
    return lr, {"success": tried[lr][0], "drawdown_absolute": tried[lr][1]}


def run(rows: list[Row], held_out: images.LabelledImages, test: images.LabelledImages, runs: Path) -> None:
    edits = random_edits(test, EDITS, seed=0)
    for row in rows:
        lr, validation = choose(row, held_out, runs)
        editor = replace(row.editor, lr=lr)
        report = measure(row, Shrink(editor) if row.shrink else editor, test, edits, f"test-{row.key}", runs)
        facts = {
            "row": row.key,
            "scope": row.scope,
            "lr": lr,
            "validation": validation,
            "figures": figures(report),
            "summary": asdict(report.summary),
        }
        (runs / f"{row.key}.json").write_text(json.dumps(facts))
        print(f"{row.key:45} lr {lr:<8g} {figures(report)}", flush=True)


def plain_rows() -> list[Row]:
    return [Row(editor, scope) for scope in reversed(SCOPES) for editor in GRIDS]


def shrink_rows(runs: Path) -> list[Row]:
    """Wrap every editor on the block where its validation drawdown is least among the scopes that succeed best."""
    rows = []
    for editor in GRIDS:
        found = {
            scope: json.loads((runs / f"{Row(editor, scope).key}.json").read_text())["validation"] for scope in SCOPES
        }
        best = max(v["success"] for v in found.values())
        good = {scope: v for scope, v in found.items() if v["success"] >= best - 0.01}
        rows.append(Row(editor, min(good, key=lambda scope: good[scope]["drawdown_absolute"]), shrink=True))
    return rows


def collect(runs: Path) -> None:
    """Gather the finished rows into results/fashion.json and results/fashion.md."""
    order = [row.key for row in plain_rows()]
    found = {path.stem: json.loads(path.read_text()) for path in runs.glob("*.json")}
    plain = [found[key] for key in order if key in found]
    shrunk = [facts for key, facts in sorted(found.items()) if "+Shrink" in key]
    model = "one Intel Xeon, 2 cores"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
            break
    RESULTS.write_text(json.dumps({"machine": model, "torch": torch.__version__, "rows": plain + shrunk}, indent=1))
    TABLE.write_text(table(plain, shrunk, model))


def table(plain: list[dict], shrunk: list[dict], machine: str) -> str:
    rows = plain + shrunk
    columns = list(rows[0]["figures"]) if rows else []
    lines = [
        "# Editors on Fashion-MNIST\n",
        f"{EDITS} random-label edits of test images, k = 10 steps, margin 0, one at a time, each measured on all 10,000 "
        "test images.",
        "Learning rates were chosen on held-out training images. Made by `python benchmarks/fashion_table.py` on "
        f"{machine}, torch {torch.__version__}. Drawdown in percentage points; milliseconds are of the edit alone.\n",
        "| editor | edited | lr | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---:|" * len(columns),
    ]
    for facts in rows:
        name, cells = facts["row"].split("-")[0], facts["figures"]
        lines.append(
            f"| {name} | {facts['scope']} | {facts['lr']:g} | " + " | ".join(str(cells[c]) for c in columns) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--shrink-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    part, parts = map(int, arguments.shard.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    train, test = images.fashion_mnist("train"), images.fashion_test()
    held_out = train[slice(len(train) - HELD_OUT, len(train))]
    if not arguments.shrink_only:
        run(plain_rows()[part::parts], held_out, test, arguments.runs)
    if parts == 1 or arguments.shrink_only:
        run(shrink_rows(arguments.runs)[part::parts], held_out, test, arguments.runs)
    collect(arguments.runs)


if __name__ == "__main__":
    main()
