"""Edits of EfficientNet-Lite0 (ImageNet weights) on the real photos that a package ships.

    python benchmarks/photos_table.py            # measures; --show prints the stored table

There is no ImageNet test set here, so what is measured is what changes: the share of other answers, in percent, and
KL, on 8 alterations (crops, mirrored, darker, lighter, noise) of the photos that are not edited. Ten photos are edited,
one at a time, each to a random class and then, where the network errs, to its own; alterations of the ten others are
what statistics, gates and budgets go by, and those of the nine unedited ones are what is judged. Seven altered copies
of the edited photo are demanded with it, and `unasked` is the share that holds of nine other alterations of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from fashion_table import machine
from torch import Tensor

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editing import solve
from weightpatch.editors import Adam, Auto, Budget, Editor, Gate, LowRank, MinimumNorm
from weightpatch.evaluation import predict
from weightpatch.preparing import prepared
from weightpatch.statistics import second_moments

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "tasks"))
from imagenet import load_efficientnet, load_photos  # noqa: E402

RESULTS, TABLE = HERE / "results" / "photos.json", HERE / "results" / "photos.md"
HEAD, CONV = ("_fc.*",), ("_conv_head.weight",)
SIDE, SMALLER = 224, 196


def alterations(photos: Tensor, first: int = 0, last: int = 16) -> Tensor:
    """Return crops, mirrored in turn, darker, lighter or noisy, (m·n, 3, 224, 224), copy after copy; of seed 0."""
    draw, made = torch.Generator().manual_seed(0), []
    for place in range(16):
        top, left = (int(x) for x in torch.randint(SIDE - SMALLER + 1, (2,), generator=draw))
        noise = torch.randn(1, 3, SIDE, SIDE, generator=draw)
        crop = photos[..., top : top + SMALLER, left : left + SMALLER]
        crop = torch.nn.functional.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        crop = crop.flip(-1) if place % 2 else crop
        made.append(crop * (0.8, 1.0, 1.2, 1.0)[place % 4] + 0.1 * noise * (place % 4 == 3))
    return torch.cat(made[first:last])


def asked(photos: Tensor) -> Tensor:
    return alterations(photos, 0, 7)


def unasked(photos: Tensor) -> Tensor:
    return alterations(photos, 7, 16)


def editors(model: torch.nn.Module, reference: Tensor) -> dict[str, tuple[Editor, tuple[str, ...]]]:
    metric = second_moments(model, reference, parameters=(*CONV, *HEAD)).metric(0.001)
    auto = Auto.late(metric, gate="_fc", budget=Budget(changed=0.01, seconds=2.0))
    return {
        "no edit": (Adam(lr=0.0, max_steps=0), HEAD),
        "lookup gate": (Gate("_fc", share=0.0), HEAD),
        "head, fine-tuning": (Adam(lr=1e-3, max_steps=100), HEAD),
        "last convolution, fine-tuning": (Adam(lr=1e-3, max_steps=100), CONV),
        "last convolution, LoRA": (LowRank(Adam(lr=1e-2, max_steps=100), rank=4), CONV),
        "gate": (Gate("_fc"), HEAD),
        "head, MinimumNorm": (MinimumNorm(metric=metric), HEAD),
        "last convolution, MinimumNorm": (MinimumNorm(metric=metric), CONV),
        "Auto": (auto, (*CONV, *HEAD)),
    }


def measure(model: torch.nn.Module, editor: Editor, scope: tuple[str, ...], facts: dict[str, Any]) -> dict[str, Any]:
    photos, answers, keep = facts["photos"], facts["answers"], facts["keep"]
    editor, _, network = prepared(model, scope, editor, keep)
    judged, whose = alterations(photos, 0, 8), torch.arange(8 * len(photos)) % len(photos)
    rows = []
    for kind, labels in (("random", facts["random"]), ("mistake", facts["labels"])):
        for place in range(len(photos)):
            if int(labels[place]) == int(answers[place]):
                continue
            photo = photos[place : place + 1]
            copies, further = torch.cat([photo, asked(photo)]), unasked(photo)
            began = time.perf_counter()
            solved = solve(network, Classified(copies, labels[place].repeat(len(copies))), editor, keep)
            seconds = time.perf_counter() - began
            moved = [n for n, value in network.start.items() if not torch.equal(value, solved.params[n])]
            at = network.narrow(moved or network.names[:1])
            with torch.no_grad(), network.isolated():
                before, after = (
                    at({n: params[n] for n in moved or network.names[:1]})(judged)[whose != place]
                    for params in (network.start, solved.params)
                )
                held = Classified(further, labels[place].repeat(len(further))).met(network.full(solved.params))
            kl = (before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))).sum(1).mean()
            rows.append(
                {
                    "kind": kind,
                    "success": solved.result.name == "satisfied",
                    "changed": float((before.argmax(1) != after.argmax(1)).double().mean()),
                    "kl": float(kl),
                    "unasked": float(held.double().mean()),
                    "steps": solved.steps,
                    "seconds": seconds,
                    "by": solved.attempts[-1].name if solved.attempts else "",
                }
            )
    copies = torch.cat([photos[:1], asked(photos[:1])])
    found = wp.edit(model, Classified(copies, facts["random"][:1].repeat(len(copies))), editor, parameters=scope)
    return {"rows": rows, "bytes": 0 if found.patch is None else found.patch.nbytes}


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Edits of EfficientNet-Lite0 on real photos\n",
        f"Made by `python benchmarks/photos_table.py` on {results['machine']}. What is judged and how is said there: "
        "changed answers and KL are on 72 altered photos that are not the edited one.\n",
        "| edited, by | edits | success | changed answers | largest | KL, nats | unasked | steps | s an edit | patch |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["editors"].items():
        for kind in ("random", "mistake"):
            some = [row for row in found["rows"] if row["kind"] == kind]
            if not some:
                continue
            cells = [
                f"{100 * mean(row['success'] for row in some):.0f} %",
                f"{100 * mean(row['changed'] for row in some):.2f} %",
                f"{100 * max(row['changed'] for row in some):.2f} %",
                f"{mean(row['kl'] for row in some):.4f}",
                f"{100 * mean(row['unasked'] for row in some):.0f} %",
                f"{mean(row['steps'] for row in some):.1f}",
                f"{sorted(row['seconds'] for row in some)[len(some) // 2]:.2f}",
                f"{found['bytes'] / 1000:.0f} kB",
            ]
            lines.append(f"| {name}, {kind} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--edits", type=int, default=10, help="at most so many photos")
    if (arguments := parser.parse_args()).show:
        print(TABLE.read_text())
        return
    model, all_photos = load_efficientnet(), load_photos()
    photos, labels = all_photos.inputs[: arguments.edits], all_photos.labels[: arguments.edits]
    reference = alterations(all_photos.inputs[10:], 0, 8)
    answers = predict(model, photos).argmax(1)
    random = torch.randint(1000, (len(photos),), generator=torch.Generator().manual_seed(0))
    facts = {
        "photos": photos,
        "labels": labels,
        "answers": answers,
        "random": random,
        "keep": wp.Locality(reference),
    }
    results: dict[str, Any] = {"machine": machine(), "editors": {}}
    for name, (editor, scope) in editors(model, reference).items():
        began = time.monotonic()
        results["editors"][name] = measure(model, editor, scope, facts)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(table(results))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
