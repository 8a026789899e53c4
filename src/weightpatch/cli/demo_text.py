"""`weightpatch demo --task translation`: a wrong translation mended, by a plain and by an editable translator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EditFailed, InvalidInput
from ._output import Answer, console
from ._speakers import silent
from ._verdict import tell_effects, tell_verdict

if TYPE_CHECKING:
    from rich.console import Console

    from ..editing import Edit
    from ..editors import Editor
    from ..evaluation import Estimate, SentenceComparison
    from ..tasks.text import Seq2Seq
    from ..tasks.translation import Pairs

KEPT = 32  # sentences of the validation split hold the plain translator's edit back
NEAR = 0.5  # at most this share of its words is wrong, where there is such a mistake
WORDS = 12  # the mistake is a sentence of at most so many words, so that it is easy to see
LAST = "model.decoder.layers.2.*"  # what the plain translator is edited in
POOL = 100  # sentences among which it is looked for


def demo_text(
    output: Path = Path("demo-output"),
    task: Literal["translation"] = "translation",
    sentences: int = 300,
    json: bool = False,
) -> Answer:
    """Mend a wrong translation, and show what else changes: of a plain translator, and of an editable one.

    Args:
        output: The folder for the patches and the reports.
        task: What the model does.
        sentences: On how many other test sentences each is measured.
        json: Print facts as JSON alone.
    """
    from ..tasks import translation

    everything = translation.libreoffice("test")
    if not 1 <= sentences <= len(everything) - POOL:
        raise InvalidInput(f"--sentences was given {sentences}; expected 1 to {len(everything) - POOL}")
    pool, test = everything[:POOL], everything[POOL : POOL + sentences]
    out = console(json)
    output.mkdir(parents=True, exist_ok=True)
    with silent():
        plain, editable = translation.translator(), translation.translator(editable=True)
    source, before, wanted = _mistake(plain, editable, pool)
    out.print(f"[bold]1. The mistake[/] of a German-English translator of {_millions(plain)} million parameters")
    for name, text in (("German", source), ("it says", before), ("right is", wanted)):
        out.print(f"   {name:9} {text}", markup=False)

    held = translation.libreoffice("validation")[:KEPT]
    found = {}
    for place, (name, kind) in enumerate((("plain", plain), ("editable", editable)), 2):
        out.print(f"[bold]{place}. The {name} translator[/]")
        found[name] = _mended(kind, name, (source, wanted), held, test, output, out)
    out.print(_table({name: comparison for name, (_, comparison, _) in found.items()}, len(test)))
    facts: dict[str, Any] = {"source": source, "before": before, "wanted": wanted}
    for name, (edit, comparison, page) in found.items():
        patch = output / f"{name}.patch.safetensors"
        out.print(f"{name:9} {patch} and {page}", markup=False)
        facts[name] = {
            "result": edit.result.name,
            "steps": edit.steps,
            "patch": str(patch),
            "report": str(page),
            **edit.effects(),
            "comparison": comparison.to_json(),
            "verdict": (comparison.verdict & edit.verdict).to_json(),
        }
    good = all(edit.result.name in ("satisfied", "already_satisfied") for edit, _, _ in found.values())
    return Answer(facts, 0 if good else 1)


def _mistake(plain: Seq2Seq, editable: Seq2Seq, pool: Pairs) -> tuple[str, str, str]:
    """Return a short sentence that both translate otherwise than its reference, the first one's translation, and that.

    The first one that is nearly right is taken, or else the first one.
    """
    from ..evaluation.differences import distance

    short = [pair for pair in zip(pool.german, pool.english, strict=True) if len(pair[1].split()) <= WORDS]
    answers = [[kind.text(tokens) for tokens in kind.generate([g for g, _ in short])] for kind in (plain, editable)]
    found = [
        (german, said[0], english)
        for (german, english), *said in zip(short, *answers, strict=True)
        if english not in said and plain.text(plain.tokens(english)) == english
    ]
    if not found:
        raise EditFailed(f"each of {len(short)} short sentences is translated as its reference; there is no mistake")
    return next((told for told in found if distance(told[1], told[2]) <= NEAR), found[0])


def _mended(
    kind: Seq2Seq, name: str, asked: tuple[str, str], held: Pairs, test: Pairs, output: Path, out: Console
) -> tuple[Edit, SentenceComparison, Path]:
    """Edit one translator, save, load and apply the patch, and measure it."""
    from .. import edit as run
    from ..evaluation import compare_sentences, patched, sentence_page
    from ..patches import Patch

    fix = kind.says(*asked)
    editor, parameters = _way(name, kind)
    found = run(
        kind.model, fix, editor, keep=kind.kept(held.german) if name == "plain" else None, parameters=parameters
    )
    out.print(f"   {found}\n   {found.result.value}", markup=False)
    if found.patch is None:
        raise EditFailed(f"the edit of the {name} translator is {found.result.name}: {found.result.value}")
    path = output / f"{name}.patch.safetensors"
    found.patch.save(path)
    patch = Patch.load(path)
    says = kind.text(kind.decoding(asked[0])(patched(kind.model, patch)))
    out.print(f"   it says   {says}", markup=False)
    if says != asked[1] and found.result.held:
        raise EditFailed("the loaded patch does not hold on the patched model; please report this")
    comparison = compare_sentences(kind, patch, test.german, test.english)
    out.print(f"   {comparison}", markup=False)
    tell_effects(out, found, before="   ")
    tell_verdict(out, comparison.verdict & found.verdict, before="   ")
    page = sentence_page(
        output / f"{name}.html", kind=kind, edit=found, constraint=fix, sources=asked[:1], comparison=comparison
    )
    return found, comparison, page


def _way(name: str, kind: Seq2Seq) -> tuple[Editor, str]:
    """Return how a translator is edited, and what may move."""
    from ..editors import ladder
    from ..tasks import translation

    return (translation.editor(kind), translation.EDITED) if name == "editable" else (ladder(100.0), LAST)


def _table(found: dict[str, SentenceComparison], n: int) -> Any:
    from rich.table import Table

    table = Table(title=f"4. What else changed, of {n:,} other translations", title_justify="left", box=None)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[SentenceComparison], str]] = {
        "changed": lambda c: f"{len(c.changed)}",
        "BLEU before": lambda c: _bleu(c, 0),
        "BLEU after": lambda c: _bleu(c, 1),
        "BLEU lost, 95 % interval": lambda c: "" if c.drawdown is None else _lost(c.drawdown),
        "drift, nats": lambda c: f"{c.drift:.2g}",
    }
    for title, cell in rows.items():
        table.add_row(title, *(cell(comparison) for comparison in found.values()))
    return table


def _bleu(comparison: SentenceComparison, place: int) -> str:
    return "" if comparison.scores is None else f"{comparison.scores[place]:.2f}"


def _lost(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _millions(kind: Seq2Seq) -> str:
    return f"{sum(p.numel() for p in kind.model.parameters()) / 1e6:.1f}"
