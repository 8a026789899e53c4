"""`weightpatch doctor --task translation|lm|text-classification`: what of a text model can be edited, at what cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import InvalidInput
from ._late import inputs_of, late_weights
from ._output import Answer, console
from ._speakers import Serving, TextTask, served
from ._texts import Texts, read_texts
from .edit import facts_of
from .edit_text import TextSettings

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ..network import ParameterRow

_PASSES = 5  # of which the median time is told


def doctor_text(
    model: Annotated[Path, tyro.conf.Positional],
    task: TextTask,
    source: str = "Hello.",
    target: str | None = None,
    keep_texts: Path | None = None,
    keep: int | None = None,
    settings: Annotated[TextSettings, tyro.conf.arg(name="")] = TextSettings(),  # noqa: B008
    serving: Annotated[Serving, tyro.conf.arg(name="")] = Serving(),  # noqa: B008
    json: bool = False,
) -> Answer:
    """Say what in a text model can be edited, what a pass replays, and what an edit costs; nothing is written.

    One edit is made for it, as `weightpatch edit` makes it, and thrown away.

    Args:
        model: A folder that save_pretrained wrote, or a .gguf file.
        task: What the model does: translation is any encoder-decoder.
        source: The text, or prompt, of the trial edit.
        target: What it is to be answered by, or the name of a class; when not given, the model is to begin its answer
            with the second likeliest token, or to answer with the second likeliest class.
        keep_texts: Other texts that hold the trial edit back, one a line, as in `edit`.
        keep: How many of them hold it back, at most half; 64 when not given.
        settings: How to look for the edit.
        serving: How the model is loaded, and how it answers.
        json: Print facts as JSON alone.
    """
    from .. import edit as run
    from ..network import explain
    from ..patches import fingerprint

    if not source.strip():
        raise InvalidInput("--source was given an empty text; expected at least one word")
    texts = Texts() if keep_texts is None else read_texts(keep_texts).without([source])
    speaker, texts = served(task, model, serving, texts)
    network = speaker.answering.model
    told, constraint = (
        speaker.runner_up(source) if target is None else (target, speaker.asked([source], [target], 0.05))
    )
    parameters = settings.parameters or late_weights(network, inputs_of(constraint))
    rows, out = explain(network), console(json)
    out.print(_table(rows, network, parameters))
    good = [row for row in rows if row.editable]
    size = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e6
    out.print(f"{len(good)} of {len(rows)} parameters can be edited, {size:.1f} MB in all", markup=False)
    replay = _replay(network, parameters, inputs_of(constraint))
    out.print(_told(replay), markup=False)
    kept = texts.split(keep)[0]
    held_back = speaker.kept(kept.texts) if len(kept) else None
    found = run(
        network,
        constraint,
        settings.make(network, held_back, parameters),
        keep=held_back,
        parameters=parameters,
    )
    out.print(f"an edit  of {source!r} to {told!r}, held back by {len(kept)} texts\n         {found}", markup=False)
    peak = found.cost.peak_bytes
    memory = "memory not known" if peak is None else f"{peak / 1e6:.1f} MB of memory above the start"
    out.print(f"         took {found.cost.seconds:.2f} s and {memory}", markup=False)
    facts = {
        "fingerprint": fingerprint(network),
        "parameters": [
            {"name": r.name, "shape": list(r.shape), "dtype": r.dtype, "editable": r.editable, "reason": r.reason}
            for r in rows
        ],
        "moves": list(parameters),
        "replay": replay,
        "edit": {"source": source, "target": told, **facts_of(found)},
    }
    return Answer(facts, 0 if found.result.held else 1)


def _table(rows: Sequence[ParameterRow], model: nn.Module, parameters: Sequence[str]) -> Table:
    """List the parameters that move, and those that cannot."""
    from rich.table import Table

    from ..network import select

    moving, table = select(model, parameters), Table("parameter", "shape", "dtype", "moves", "why")
    for row in rows:
        if row.name in moving or not row.editable:
            moves = "yes" if row.name in moving else "no"
            table.add_row(row.name, "×".join(map(str, row.shape)), row.dtype, moves, row.reason)
    return table


def _replay(model: nn.Module, parameters: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Measure what a pass of one item costs in full, and where what cannot depend on the parameters is replayed."""
    import torch

    from ..network import Network

    network = Network(model, parameters)
    with network.isolated(), torch.no_grad():
        recording = network.record(inputs)
        full = _seconds(lambda: network.full(network.start)(**inputs))
        replayed = _seconds(lambda: network.run(network.start, recording))
    sequence = () if recording.plan is None else recording.plan.sequence
    return {
        "modules": list(dict.fromkeys(name for name, call in sequence if call >= 0)),
        "bytes": recording.nbytes,
        "seconds": {"full": full, "replayed": replayed},
        "full_passes_because": network.full_passes_because,
    }


def _seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(_PASSES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def _told(replay: Mapping[str, Any]) -> str:
    if replay["full_passes_because"]:
        return f"replays  nothing: {replay['full_passes_because']}"
    modules, seconds = replay["modules"], replay["seconds"]
    shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
    return (
        f"replays  {len(modules)} modules ({shown or 'none precedes what moves'}), {replay['bytes'] / 1e3:.1f} kB: "
        f"{1000 * seconds['replayed']:.1f} ms a pass of one text instead of {1000 * seconds['full']:.1f}"
    )
