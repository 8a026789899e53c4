"""Edits of a ResNet-18 judged on 10,000 images: copying the model and running everything, against weightpatch.

Both sides make the same edit and answer the same test set; their answers are asserted to be equal. One process,
interleaved, medians. The plain side copies the model, edits the copy with full passes and runs the whole test set
through it; ours is what `weightpatch.evaluate` does for each edit, its line in the results file included. What ours
does once (recording the test set) is timed apart. The same is timed with the first convolutions of the edited part run
in full, whatever the rank of the edit, so that what correcting their recorded products gains is a ratio within one run.

    python benchmarks/bench_evaluation.py
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightpatch.constraints import Classified
from weightpatch.editing import solve
from weightpatch.editors import Editor, GradientDescent, RMSProp
from weightpatch.evaluation.bench import Bench
from weightpatch.evaluation.log import Log
from weightpatch.evaluation.predictor import FastPredictor
from weightpatch.evaluation.products import Shortcut
from weightpatch.evaluation.report import encode_row
from weightpatch.network import Network
from weightpatch.tasks.images.models import resnet18

STEPS = 50


@dataclass(frozen=True)
class Case:
    """What is edited, how, and how many times faster than the plain way it should be judged."""

    parameters: str
    editor: Editor
    aim: int


CASES = (
    Case("layer4.1.*", RMSProp(lr=1e-4, max_steps=10), 20),
    Case("layer4.1.*", GradientDescent(lr=1e-2, max_steps=10), 20),
    Case("fc.*", RMSProp(lr=1e-2, max_steps=10), 1000),
)


@dataclass
class Times:
    """Seconds of one edit, judged."""

    wall: list[float]
    cpu: list[float]

    def median(self, kind: str) -> float:
        return statistics.median(getattr(self, kind))


@dataclass
class Result:
    parameters: str
    editor: str
    aim: int
    plain_cpu: float
    ours_cpu: float
    plain_wall: float
    ours_wall: float
    ratio_cpu: float
    ratio_wall: float
    full_cpu: float
    ratio_full_cpu: float
    base_error: float
    first_wall: float
    once_wall: float
    exact_items: float
    peak_gb: float
    rounds: int
    edits_a_round: int


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten blurred patterns under noise."""
    shapes = F.interpolate(
        torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=32, mode="bilinear"
    )
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=random)
    return shapes[labels] + 3.5 * torch.randn(n, 3, 32, 32, generator=random), labels


def classifier() -> nn.Module:
    """A ResNet-18 of width 32 after half a minute of training, in bfloat16 where the machine has it."""
    torch.manual_seed(0)
    model = resnet18(width=32)
    x, y = images(64 * STEPS, seed=2)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for images_, labels in zip(x.split(64), y.split(64), strict=True):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            loss = F.cross_entropy(model(images_), labels)
        loss.backward()
        optimiser.step()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # statistics of these weights, not of those that led to them
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in x[:1000].split(250):
            model(batch)
    return model.eval()


def plain(model: nn.Module, edit: Classified, case: Case, inputs: Tensor, batch_size: int) -> tuple[Tensor, Any]:
    """Copy, edit, run everything."""
    copied = copy.deepcopy(model)
    found = solve(Network(copied, case.parameters, replay=False), edit, case.editor)
    with torch.no_grad():
        for name, value in found.params.items():
            copied.get_parameter(name).copy_(value)
        return torch.cat([copied(batch).argmax(1) for batch in inputs.split(batch_size)]), found


def clocked(times: Times, work: Callable[[], Any], repeats: int = 1) -> Any:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        found = work()
    times.wall.append((time.perf_counter() - wall) / repeats)
    times.cpu.append((time.process_time() - cpu) / repeats)
    return found


def peak_gb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def compare(model: nn.Module, case: Case, test: tuple[Tensor, Tensor], rounds: int, batch_size: int) -> Result:
    inputs, labels = test
    x, y = images(rounds + 1, seed=4)
    edits = [Classified(x[i : i + 1], (y[i : i + 1] + 1) % 10) for i in range(rounds + 1)]
    Path("/proc/self/clear_refs").write_text("5")
    once = time.perf_counter()
    network = Network(model, case.parameters)
    predictor = FastPredictor(model, network, inputs, batch_size)
    once = time.perf_counter() - once
    file = Path(tempfile.mkdtemp()) / "results.jsonl"
    ours, full, theirs, exact = Times([], []), Times([], []), Times([], []), []
    repeats = 20 if case.parameters == "fc.*" else 2
    with Log(file, {}) as log:
        log.start()
        bench = Bench(model, network, edits, case.editor, None, None, predictor, labels, log)

        def judge(index: int) -> Any:
            row = bench.made(index)
            log.append({"row": encode_row(row)})
            return row

        first = Times([], [])
        clocked(first, lambda: judge(rounds))
        peak = peak_gb()
        for index in range(rounds):
            classes, found = clocked(theirs, lambda i=index: plain(model, edits[i], case, inputs, batch_size))
            row = clocked(ours, lambda i=index: judge(i), repeats)
            with patch.object(Shortcut, "weights", lambda shortcut, params: None):
                same = clocked(full, lambda i=index: judge(i), repeats)
                again = predictor.likelihood.answer(predictor.predict(found.params).outputs)
                assert torch.equal(again, classes), "the answers in full differ"
            prediction = predictor.predict(found.params)
            assert torch.equal(predictor.likelihood.answer(prediction.outputs), classes), "the answers differ"
            assert row.impact is not None
            assert row.impact.error == 100 * float((classes != labels).double().mean()), "the rows differ"
            assert same.impact is not None
            assert same.impact.error == row.impact.error, "the rows in full differ"
            assert (row.result, row.steps) == (found.result, found.steps)
            exact.append(prediction.exact)
            print(f"  {case.parameters}: {row}", flush=True)
    return Result(
        parameters=case.parameters,
        editor=type(case.editor).__name__,
        aim=case.aim,
        plain_cpu=theirs.median("cpu"),
        ours_cpu=ours.median("cpu"),
        plain_wall=theirs.median("wall"),
        ours_wall=ours.median("wall"),
        ratio_cpu=theirs.median("cpu") / ours.median("cpu"),
        ratio_wall=theirs.median("wall") / ours.median("wall"),
        full_cpu=full.median("cpu"),
        ratio_full_cpu=full.median("cpu") / ours.median("cpu"),
        base_error=float((predictor.likelihood.answer(predictor.base) != labels).double().mean()),
        first_wall=first.median("wall"),
        once_wall=once,
        exact_items=statistics.mean(exact),
        peak_gb=peak,
        rounds=rounds,
        edits_a_round=repeats,
    )


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    amx = "with" if any("amx_bf16" in line for line in lines) else "without"
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {amx} AMX bfloat16"


def table(results: list[Result], args: argparse.Namespace) -> str:
    head = (
        "edited", "by", "plain, CPU s", "ours, CPU s", "ratio", "aim", "plain, wall s", "ours, wall s", "ratio",
        "ours in full, CPU s", "ratio", "first edit, wall s", "once, wall s", "items in float32",
        "peak memory, all told",
    )  # fmt: skip
    lines = [
        "# Judging one edit on a test set",
        "",
        f"`python benchmarks/bench_evaluation.py --threads {args.threads} --rounds {args.rounds}`: ResNet-18 of width "
        f"32 (error {100 * results[0].base_error:.1f} %), {args.items:,} images of 3×32×32, at most 10 steps. The edit "
        f"counts on both sides, all answers are asserted equal. Medians of {args.rounds} interleaved rounds in one "
        f"process; {machine()}, PyTorch {torch.__version__}, {args.threads} thread(s). The machine was "
        "shared: CPU seconds are the steadier measure. `in full` is ours without correcting recorded products, in the "
        "same rounds. `once` is what recording the test set takes, for any number of edits; the first edit, which is "
        "in no median, records the products too, if it has a use for them.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    lines += [
        f"| `{r.parameters}` | {r.editor} | {r.plain_cpu:.2f} | {r.ours_cpu:.4f} | **{r.ratio_cpu:,.0f}** "
        f"| ≥ {r.aim:,} | {r.plain_wall:.2f} | {r.ours_wall:.4f} | {r.ratio_wall:,.0f} | {r.full_cpu:.4f} "
        f"| **{r.ratio_full_cpu:.2f}** | {r.first_wall:.2f} | {r.once_wall:.1f} | {r.exact_items:,.0f} "
        f"| {r.peak_gb:.2f} GB |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, test = classifier(), images(args.items, seed=3)
    chosen = [case for case in CASES if args.only in f"{case.parameters} {type(case.editor).__name__}"]
    results = [compare(model, case, test, args.rounds, args.batch_size) for case in chosen]
    text = table(results, args)
    print(text)
    if len(chosen) == len(CASES):
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"machine": machine(), "torch": torch.__version__, "threads": args.threads, "items": args.items}
        content = {**facts, "results": [asdict(r) for r in results]}
        (args.out / "evaluation.json").write_text(json.dumps(content, indent=1) + "\n")
        (args.out / "evaluation.md").write_text(text)


if __name__ == "__main__":
    main()
