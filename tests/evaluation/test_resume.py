"""A run that was stopped continues from its file and ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightpatch as wp
from weightpatch import statistics
from weightpatch.constraints import Classified
from weightpatch.editors import Auto, Editor, Metric, MinimumNorm, RMSProp, Rung
from weightpatch.evaluation import Independent, Protocol, Report, Sequential
from weightpatch.evaluation.log import Log

EDITOR = RMSProp(lr=2e-2, max_steps=5)
KEPT = torch.randn(7, 4, generator=torch.Generator().manual_seed(9)), torch.ones(7, dtype=torch.bool)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=random), torch.randint(0, 4, (n,), generator=random)


def edits(n: int = 8) -> list[Classified]:
    x, y = data(n, 1)
    return [Classified(x[i : i + 1], y[i : i + 1]) for i in range(n)]


def run(path: Path | None, protocol: Protocol | None = None, **changes: Any) -> Report:
    given: dict[str, Any] = {"model": net(), "edits": edits(), "editor": EDITOR, "test": data(50, 2), **changes}
    model, some, editor = given.pop("model"), given.pop("edits"), given.pop("editor")
    return wp.evaluate(model, some, editor, results=path, protocol=protocol, parameters="2.*", **given)


def same(one: Report, two: Report) -> bool:
    """Equal but for what the edits cost."""

    def stripped(report: Report) -> Report:
        return replace(report, rows=tuple(replace(row, seconds=0.0, peak_bytes=None) for row in report.rows))

    return stripped(one) == stripped(two)


PROTOCOLS = (Independent(), Sequential((1, 3, 6)))


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
def test_every_place_to_stop(protocol: Protocol, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl", protocol)
    assert same(whole, run(None, protocol))
    content = (tmp_path / "whole.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    for kept in range(len(lines) + 1):
        for half in (b"", b'{"row": {"ind', b"\xff\xfe") if kept in (0, 1, 4) else (b"",):
            path = tmp_path / "runs" / "stopped.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(lines[:kept]) + half)
            assert same(run(path, protocol), whole)
            assert len(path.read_bytes().splitlines()) == len(lines)
    assert same(run(tmp_path / "whole.jsonl", protocol), whole)
    assert (tmp_path / "whole.jsonl").read_bytes() == content


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "deep" / "x.jsonl"
    first = run(path)
    assert run(path).rows == first.rows  # seconds too


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
def test_an_error_in_the_middle(protocol: Protocol, tmp_path: Path) -> None:
    mended = tmp_path / "mended"

    class Stumbling(wp.constraints.Constraint):
        def violation(self, function: Any) -> Tensor:
            if not mended.exists():
                raise KeyboardInterrupt
            return edits()[4].violation(function)

    stumbling = [*edits()[:4], Stumbling(), *edits()[5:]]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x.jsonl", protocol, edits=stumbling)
    rows = [line for line in (tmp_path / "x.jsonl").read_text().splitlines() if "row" in line]
    assert len(rows) == 4
    mended.touch()
    assert same(run(tmp_path / "x.jsonl", protocol, edits=stumbling), run(None, protocol))


SLOWLY = """
import sys, time
sys.path.insert(0, {tests!r})
import test_resume
from weightpatch.evaluation.log import Log
write = Log.append
def slowly(self, line):
    write(self, line)
    time.sleep(0.3)
Log.append = slowly
test_resume.run(__import__("pathlib").Path({path!r}))
"""


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    code = SLOWLY.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 4):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= path.read_bytes().count(b"\n") < 9
    assert same(run(path), run(None))


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"model": nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))}, "model is"),
    ({"edits": edits()[:7]}, "edits is"),
    ({"edits": [*edits()[:7], Classified(edits()[7].inputs, edits()[7].labels, margin=0.1)]}, "edits is"),
    ({"editor": RMSProp(lr=1e-2, max_steps=5)}, "editor.lr is 0.02 there and 0.01 now"),
    ({"test": data(50, 3)}, "test is"),
    ({"keep": wp.Locality(data(3, 3)[0])}, "keep is None there"),
    ({"altered": torch.neg}, "altered is None there and '_VariableFunctionsClass.neg"),
    ({"protocol": Sequential()}, "protocol is Independent"),
]


@pytest.mark.parametrize(
    ("changes", "says"), OTHERS, ids=[says.split()[0] + str(i) for i, (_, says) in enumerate(OTHERS)]
)
def test_another_run_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    run(tmp_path / "x.jsonl")
    before = (tmp_path / "x.jsonl").read_bytes()
    with pytest.raises(wp.errors.InvalidInput, match="another run") as caught:
        run(tmp_path / "x.jsonl", **changes)
    assert says in str(caught.value)
    assert (tmp_path / "x.jsonl").read_bytes() == before


def metric(seed: int) -> Metric:
    return statistics.second_moments(net(), data(30, seed)[0]).metric()


def shifted(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + by


def climbing(editor: Editor) -> Auto:
    return Auto((Rung("the only one", editor),))


UNBOUND, BOUND = wp.Locality(*KEPT), wp.Locality(*KEPT, net()(KEPT[0]).detach())
WORDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "metrics": (
        {"editor": MinimumNorm(metric=metric(5))},
        {"editor": MinimumNorm(metric=metric(6))},
        "editor.metric.layers.0.weight.second is ",
    ),
    "rungs": (
        {"editor": climbing(RMSProp(lr=1e-2))},
        {"editor": climbing(RMSProp(lr=2e-2))},
        "rungs[0].editor.lr is 0.01",
    ),
    "altered": ({"altered": shifted(0.1)}, {"altered": shifted(0.2)}, "altered is "),
    "models": ({"model": nn.Sequential(*net(), nn.Tanh())}, {"model": nn.Sequential(*net(), nn.ReLU())}, "model is "),
    "localities": (
        {"keep": wp.Locality(*KEPT, None)},
        {"keep": wp.Locality(*KEPT, net()(KEPT[0]))},
        "keep.answers is None",
    ),
}


@pytest.mark.parametrize(("one", "two", "says"), WORDS.values(), ids=WORDS)
def test_a_run_that_reads_the_same_is_another_one(
    one: dict[str, Any], two: dict[str, Any], says: str, tmp_path: Path
) -> None:
    first = run(tmp_path / "x.jsonl", **one)
    with pytest.raises(wp.errors.InvalidInput, match="another run") as caught:
        run(tmp_path / "x.jsonl", **two)
    assert says in str(caught.value)
    assert run(tmp_path / "x.jsonl", **one).rows == first.rows


def test_what_cannot_be_told_apart_is_not_continued(tmp_path: Path) -> None:
    lock = threading.Lock()

    def locked(x: Tensor) -> Tensor:
        with lock:
            return x

    whole = run(tmp_path / "x.jsonl", altered=locked)
    assert same(run(None, altered=locked), whole)
    with pytest.raises(wp.errors.InvalidInput, match="altered cannot be told apart.* lock") as caught:
        run(tmp_path / "x.jsonl", altered=locked)
    assert "Name another file" in str(caught.value)


@pytest.mark.parametrize("content", [b"hello\nworld\n", b"[1]\n", b"{}\n{}}\n", b"\x89PNG\r\n\x1a\n\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(wp.errors.InvalidInput, match="name another file"):
        run(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == content


def test_a_sequence_that_cannot_be_repeated_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    run(path, Sequential((2,)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["row"]["steps"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    with pytest.raises(wp.errors.InvalidInput, match="cannot be continued"):
        run(path, Sequential((2,)))


def test_every_line_is_on_the_disk_before_the_next_is_begun(tmp_path: Path) -> None:
    with Log(tmp_path / "x.jsonl", {"a": 1}) as log:
        log.start(b=2)
        log.append({"row": 1})
        assert (tmp_path / "x.jsonl").read_text() == '{"a": 1, "b": 2}\n{"row": 1}\n'
    with Log(tmp_path / "x.jsonl", {"a": 1}) as again:
        again.start(b=3)
        assert (again.header, again.lines) == ({"a": 1, "b": 2}, [{"row": 1}])
