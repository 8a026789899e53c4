"""Nothing in the source can run what it reads, and using patches opens no connection."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def dangers(text: str) -> list[str]:
    """Imports of pickle and its kin, calls of eval and its kin, and torch.load without weights_only=True."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if MODULES & set(name.split("."))]
        elif isinstance(node, ast.Attribute) and node.attr in MODULES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = name.endswith("torch.load") or "weights_only" in said
            if name.removeprefix("builtins.") in BUILTINS or (unsafe and said.get("weights_only") != "True"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_that_runs_data(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch.serialization import pickle",
        "torch.serialization.pickle.loads(x)",
        "eval('1')",
        "exec(x)",
        "builtins.exec(x)",
        "torch.load(p)",
        "torch.load(p, weights_only = False)",
        "load(p, weights_only=flag)",
    ],
)
def test_the_rule_finds(text):
    assert dangers(text)


@pytest.mark.parametrize(
    "text", ["model.eval()", "torch.compile(model)", "evaluate(x)", "'pickle'", "torch.load(p, weights_only=True)"]
)
def test_the_rule_leaves(text):
    assert not dangers(text)


def test_importing_applying_and_saving_open_no_connection(tmp_path):
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a socket was made")
socket.socket.__init__ = refuse
import torch
import weightpatch
from weightpatch.patches import Patch, fingerprint
model = torch.nn.Linear(3, 2)
patch = Patch.between(dict(model.state_dict()), {"bias": model.bias + 1}, fingerprint=fingerprint(model))
patch.save(sys.argv[1])
Patch.load(sys.argv[1]).apply(model)
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
