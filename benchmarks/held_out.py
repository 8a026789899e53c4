"""Whether what an edit tells of other sentences is true: README's translation edit, with 20, 200 and 2,000 kept ones.

    python benchmarks/held_out.py           # measures what is not measured yet, and prints the table
    python benchmarks/held_out.py --show    # prints the stored table

Each of 50 test sentences is to be translated by its reference, on its own, by `wp.edit`'s default, `Auto`, as README
has it: the second matrix of the last block may move. Kept are the first test sentences neither edited nor judged;
half of them judge. Told is the one-sided 95 % upper bound of the held-out share, seen the share of 500 other test
sentences that the edited translator then translates otherwise, decoded greedily as it is deployed. Statistics are made
once for all edits, as they would be for each. Sentences whose reference is said already are left out. With 2,000 kept
sentences an edit takes minutes on two cores; the run continues from the edits that are stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from weightpatch.editing import solve
from weightpatch.editors import Auto
from weightpatch.evaluation.metrics import bootstrap_mean, wilson
from weightpatch.network import Network
from weightpatch.preparing import prepared
from weightpatch.tasks import translation
from weightpatch.tasks.text._protocol import generations

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "held_out.jsonl", HERE / "results" / "held_out.md"
SIZES, EDITS, JUDGED = (20, 200, 2000), 50, 500
PARAMETERS = "model.decoder.layers.2.fc2.*"


@dataclass(frozen=True)
class Row:
    """One edit."""

    kept: int
    sentence: int
    result: str
    rung: str
    kept_changed: int
    held_out: int
    held_out_changed: int
    told: float
    seen: float
    seconds: float


def measure(done: list[Row]) -> list[Row]:
    kind, test = translation.translator(), translation.libreoffice("test")
    texts = list(test.german)
    judged, rest = texts[-JUDGED:], texts[: -JUDGED - EDITS]
    asked = range(len(texts) - JUDGED - EDITS, len(texts) - JUDGED)
    for size in SIZES:
        known = {row.sentence for row in done if row.kept == size}
        if len(known) == EDITS:
            continue
        pool = rest if size <= len(rest) else [*rest, *translation.libreoffice("train").german]
        keep = kind.kept(pool[:size])
        demands = {place: kind.says(texts[place], test.english[place], 0.1) for place in asked}
        plain = Network(kind.model, PARAMETERS)
        with plain.isolated():
            keep = keep.of(demands[asked[0]]).fitted(plain.before)
        editor, _, network = prepared(kind.model, PARAMETERS, Auto(), keep, demands[asked[0]])
        fast = generations(kind, network, judged)
        for place in asked:
            if place in known:
                continue
            began = time.monotonic()
            torch.manual_seed(place)
            solved = solve(network, demands[place], editor, keep)
            seconds = time.monotonic() - began
            if solved.result.name == "already_satisfied" or solved.held_out is None or solved.kept is None:
                told, seen, held, counts = 0.0, 0.0, 0, (0, 0)
            else:
                seen = len(fast.predict(solved.params).changed) / len(judged)
                told, held = solved.held_out.upper, solved.held_out.items
                counts = (solved.kept.changed, solved.held_out.changed)
            rung = solved.attempts[-1].name if solved.attempts else ""
            row = Row(size, place, solved.result.name, rung, counts[0], held, counts[1], told, seen, seconds)
            done.append(row)
            with RESULTS.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(row, flush=True)
    return done


def table(rows: list[Row]) -> str:
    lines = [
        "| kept | held out | edits | hold | told covers seen | held-out share | told | seen on others | gates |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in SIZES:
        some = [row for row in rows if row.kept == size and row.result != "already_satisfied"]
        if not some:
            continue
        held = wilson(sum(row.result == "satisfied" for row in some), len(some))
        covered = wilson(sum(row.seen <= row.told for row in some), len(some))
        seen = bootstrap_mean([100 * row.seen for row in some])
        share = 100 * statistics.mean(row.held_out_changed / row.held_out for row in some)
        told = 100 * statistics.mean(row.told for row in some)
        gates = sum(row.rung.startswith("gate") for row in some)
        lines.append(
            f"| {size} | {some[0].held_out} | {len(some)} | {100 * held.value:.0f} % | "
            f"{100 * covered.value:.0f} % [{100 * covered.low:.0f}, {100 * covered.high:.0f}] | {share:.2f} % | "
            f"{told:.2f} % | {seen.value:.2f} % [{seen.low:.2f}, {seen.high:.2f}] | {gates} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    told = parser.parse_args()
    rows = [Row(**json.loads(line)) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if not told.show:
        rows = measure(rows)
        TABLE.write_text(f"# What is told of other sentences, and what is seen\n\n{__doc__}\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
