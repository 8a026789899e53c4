"""The training runs behind the table of plain against editable: `weightpatch train` on variants of the shipped configs.

    python benchmarks/editable_runs.py --list
    python benchmarks/editable_runs.py resnet18 sweep     # those whose name has one of these words; resumes, skips done

A run lies in benchmarks/runs/editable/NAME with the config that made it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLES, RUNS = HERE.parent / "examples", HERE / "runs" / "editable"
SMALL, PLAIN, SCRATCH, TUNED = (
    EXAMPLES / name
    for name in ("fashion-editable.toml", "resnet18/plain.toml", "resnet18/scratch.toml", "resnet18/finetuned.toml")
)
C = (0.01, 0.1, 1.0)
FASHION = {"model": "weightpatch.tasks.images.models:FashionResNet"}
LAYER3 = {"block": None, "parameters": "layer3.*", "editor": {"name": "GradientDescent", "lr": 1e-3, "max_steps": 10}}


def scaled(c: float) -> dict[str, Any]:
    return {"c_edit": c, "c_loc": c, "c_gen": 0.1 * c}


def all_runs() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return, by name, a config and what is different from it."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for seed in range(3):
        found[f"seed-{seed}"] = SMALL, {"seed": seed}
        found[f"resnet18-plain-{seed}"] = PLAIN, {"seed": seed}
        weights = str(RUNS / f"resnet18-plain-{seed}" / "model.safetensors")
        found[f"resnet18-finetuned-{seed}"] = TUNED, {"seed": seed, "weights": weights}
        found[f"resnet18-scratch-{seed}"] = SCRATCH, {"seed": seed}
    found["sweep-finetuned-elu"] = SMALL, {"block": {"before": "fc", "hidden": 1024, "kind": "elu", "lr": 1e-3}}
    found["sweep-finetuned-layer3"] = SMALL, LAYER3
    for c in C[:-1]:
        found[f"sweep-finetuned-c{c}"] = SMALL, scaled(c)
    found["sweep-plain"] = PLAIN, {**FASHION, "epochs": 6, "parameters": "layer3.*"}
    for c in C:
        found[f"sweep-scratch-c{c}"] = SCRATCH, {**FASHION, **scaled(c), "epochs": 6}
    return found


def written(path: Path, base: Path, changes: dict[str, Any]) -> None:
    """Write a variant of a config; a change of None takes a key out."""
    content = {**tomllib.loads(base.read_text()), **changes}
    flat = {key: value for key, value in content.items() if value is not None and not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in flat.items()]
    for name, table in content.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of names")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    arguments = parser.parse_args()
    for name, (base, changes) in all_runs().items():
        if arguments.list:
            done = "done" if (RUNS / name / "result.json").exists() else ""
            print(f"{name:24s} {base.relative_to(HERE.parent)} {done}")
        elif any(word in name for word in arguments.words) and not (RUNS / name / "result.json").exists():
            folder = RUNS / name
            folder.mkdir(parents=True, exist_ok=True)
            written(folder / "config.toml", base, changes)
            command = [
                sys.executable,
                "-m",
                "weightpatch",
                "train",
                str(folder / "config.toml"),
                "--folder",
                str(folder),
            ]
            print(name, flush=True)
            subprocess.run(command, check=True, env=os.environ)


if __name__ == "__main__":
    main()
