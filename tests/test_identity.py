"""Runs are continued by content: what has another one is told from it, part by part; in any process."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import weightpatch as wp
from weightpatch import likelihoods, statistics
from weightpatch._identity import UnidentifiedError, different, digest, identity
from weightpatch.editors import Adam, Auto, Budget, Gate, Metric, MinimumNorm, RMSProp, Rung, Shrink
from weightpatch.tasks import images

STRENGTH = 2


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


def reads_its_module(x: Tensor) -> Tensor:
    return x * STRENGTH


def calls_its_module(x: Tensor) -> Tensor:
    return reads_its_module(x) + 1


def kept_by_default(x: Tensor, by: float = 2.0, *, more: float = 0.0) -> Tensor:
    return x * by + more


class Turn:
    """What makes copies may be an object."""

    degrees = 3

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.shift * self.degrees


@dataclass(frozen=True)
class Own:
    make: Callable[[Any], Any]
    size: float = 1.0


def turning(degrees: int) -> type:
    return type("Turn", (Turn,), {"degrees": degrees, "__module__": __name__})


def metric(seed: int, shrinkage: float = 0.01) -> Metric:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    moments = statistics.second_moments(model, torch.randn(9, 3, generator=torch.Generator().manual_seed(seed)))
    return moments.metric(shrinkage)


def changed(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Return the same function with other defaults."""
    copy = type(function)(function.__code__, function.__globals__, function.__name__)  # type: ignore[attr-defined]
    copy.__kwdefaults__, copy.__defaults__ = {"more": 0.0, **settings}, (2.0,)
    return copy  # type: ignore[no-any-return]


ONE = metric(0)
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "numbers": (1.0, 2.0),
    "a truth and a number": (True, 1),
    "tensors": (torch.ones(3), torch.zeros(3)),
    "dtypes": (torch.ones(3), torch.ones(3).double()),
    "shapes": (torch.ones(3), torch.ones(3, 1)),
    "long arrays": (np.arange(9000), np.where(np.arange(9000) == 4500, 0, np.arange(9000))),
    "long lists": (list(range(200)), [*range(199), 0]),
    "keys": ({"a": 1}, {"b": 1}),
    "a list and a tuple of nothing": ({1}, {2}),
    "closures": (scaled(2), scaled(3)),
    "lambdas": (lambda x: x + 1, lambda x: x + 2),
    "names that are read": (lambda x: x.sin(), lambda x: x.cos()),
    "defaults": (changed(kept_by_default), changed(kept_by_default, more=1.0)),
    "partials": (functools.partial(kept_by_default, by=2), functools.partial(kept_by_default, by=3)),
    "methods": (Turn(1).__call__, Turn(2).__call__),
    "attributes": (Turn(1), Turn(2)),
    "attributes of the class": (turning(3)(1), turning(4)(1)),
    "patterns": (re.compile("a"), re.compile("a", re.IGNORECASE)),
    "generators' states": (random.Random(0), random.Random(1)),
    "torch's generators": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "modules that weigh the same": (nn.Sequential(nn.Tanh()), nn.Sequential(nn.ReLU())),
    "functions of torch": (torch.neg, torch.abs),
    "functions of weightpatch": (images.altered, statistics.second_moments),
    "settings": (RMSProp(lr=1e-2), RMSProp(lr=2e-2)),
    "kinds": (RMSProp(lr=1e-2), Adam(lr=1e-2)),
    "nested settings": (Shrink(RMSProp(lr=1e-2)), Shrink(RMSProp(lr=2e-2))),
    "metrics": (MinimumNorm(metric=ONE), MinimumNorm(metric=metric(1))),
    "shrinkages": (MinimumNorm(metric=ONE), MinimumNorm(metric=metric(0, 0.02))),
    "altered": (Auto(altered=scaled(2)), Auto(altered=scaled(3))),
    "budgets": (Auto(budget=Budget(0.1)), Auto(budget=Budget(0.2))),
    "rungs": (Auto((Rung("a", Gate("x")),)), Auto((Rung("a", Gate("x", 32)),))),
    "rungs' metrics": (Auto((Rung("a", MinimumNorm(metric=ONE)),)), Auto((Rung("a", MinimumNorm(metric=metric(1))),))),
    "functions in settings": (Own(scaled(2)), Own(scaled(3))),
    "likelihoods": (likelihoods.Gaussian(1.0), likelihoods.Gaussian(2.0)),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT)
def test_what_has_another_content_is_told_apart(pair: tuple[Any, Any]):
    one, two = (json.loads(json.dumps(identity(value))) for value in pair)
    assert different("x", one, two)
    assert digest(pair[0]) != digest(pair[1])
    for value in pair:
        assert not different("x", json.loads(json.dumps(identity(value))), identity(value))
        assert digest(value) == digest(value)


def test_what_a_function_reads_of_its_module_counts(monkeypatch: pytest.MonkeyPatch):
    before = [digest(function) for function in (reads_its_module, calls_its_module, kept_by_default)]
    monkeypatch.setitem(globals(), "STRENGTH", 3)
    after = [digest(function) for function in (reads_its_module, calls_its_module, kept_by_default)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_equal_content_is_the_same():
    assert digest(scaled(2)) == digest(scaled(2))
    assert digest(Own(scaled(2))) == digest(replace(Own(scaled(2)), size=1.0))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(turning(3)(1)) == digest(turning(3)(1))
    assert digest(torch.ones(4).double()[::2]) == digest(torch.ones(2).double())
    layer = replace(next(iter(ONE.layers.values())), _made={})
    empty = digest(layer)
    layer.inverse(torch.ones(1))
    assert digest(layer) == empty  # what was computed meanwhile does not count


def test_what_holds_itself_is_identified():
    one: list[Any] = [1]
    one.append(one)
    two: list[Any] = [2]
    two.append(two)
    assert digest(one) == digest(one) != digest(two)

    def countdown(n: int) -> int:
        return countdown(n - 1) if n else 0

    assert digest(countdown) == digest(countdown)


@pytest.mark.parametrize("value", [threading.Lock(), (i for i in range(3)), sys.stdout], ids=lambda v: type(v).__name__)
def test_what_has_no_content_is_not_even_the_same_as_itself(value: Any):
    with pytest.raises(UnidentifiedError, match="without content"):
        digest(Own(lambda: value))
    found = identity(RMSProp(lr=1e-2)) | {"lr": identity([value])}
    (told,) = different("editor", found, found)
    assert "editor.lr cannot be told apart" in told and type(value).__qualname__ in told


def test_the_part_that_differs_is_named():
    one = Auto((Rung("a", Gate("x")), Rung("b", Shrink(MinimumNorm(metric=ONE)))), Budget(0.1))
    two = Auto((Rung("a", Gate("x")), Rung("b", Shrink(MinimumNorm(metric=metric(1))))), Budget(0.2))
    told = different("editor", identity(one), identity(two))
    assert [line.partition(" is ")[0] for line in told] == [
        "editor.rungs[1].editor.editor.metric.layers.0.weight.second",
        "editor.rungs[1].editor.editor.metric.layers.0.weight.power",
        "editor.rungs[1].editor.editor.metric.layers.2.weight.second",
        "editor.rungs[1].editor.editor.metric.layers.2.weight.power",
        "editor.budget.changed",
    ]
    assert told[-1] == "editor.budget.changed is 0.1 there and 0.2 now"


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(ANYTHING, ANYTHING)
def test_plain_values_are_the_same_only_where_they_are_equal(one: Any, two: Any):
    equal = repr(one) == repr(two) or digest(one) == digest(two)
    assert equal == (digest(one) == digest(two))
    if digest(one) == digest(two):
        assert one == two
        assert not different("x", json.loads(json.dumps(identity(one))), identity(two))


PROCESS = """
import sys
import test_identity as t
some = {"a", "b", "c"}, lambda x: x in {"a", "b", "c"}
print(t.digest([t.scaled(2), t.Turn(1), t.reads_its_module, some, t.Own(t.scaled(1))]))
"""


def test_another_process_says_the_same():
    sources = Path(wp.__file__).parents[1]
    paths = os.pathsep.join(map(str, (Path(__file__).parent, sources)))
    found = {
        subprocess.run(
            [sys.executable, "-c", PROCESS],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65
