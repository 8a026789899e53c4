"""Every example of a docstring runs and answers what it shows, alone in an empty folder.

An example knows the names of its module, `wp` and `torch`; a small classifier `model` of `images` (200, 1, 8, 8) whose
predictions are `labels`; an `image` of its own with the `label` that the model should give it, `fix`, which demands it,
and `keep`, all the others; and the folders `language-model` and `translator` of tiny text models.
"""

from __future__ import annotations

import doctest
import importlib
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import text_folders
import torch
from torch import nn

import weightpatch as wp

SOURCE = Path(wp.__file__).parent
FOLDERS = {"language-model": text_folders.language, "translator": text_folders.translator}
TEXTS = "Water is made of hydrogen and oxygen. The capital of France is Rome. Guten Morgen: Good morning"
WORDS = sorted(set(re.findall(r"\w+", TEXTS)))


def sources() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text()]


def name(path: Path) -> str:
    return ".".join(("weightpatch", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def examples(path: Path) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name(path)), name(path))
    return [test for test in found if test.examples]


def shared() -> dict[str, Any]:
    torch.manual_seed(0)
    layers = {"flatten": nn.Flatten(), "layer3": nn.Linear(64, 16), "relu": nn.ReLU(), "fc": nn.Linear(16, 10)}
    model = nn.Sequential(OrderedDict(layers)).eval()
    images, image = torch.rand(200, 1, 8, 8), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        labels, label = model(images).argmax(1), model(image).argsort(1)[:, -2]
    fix, keep = wp.constraints.Classified(image, label), wp.Locality(images)
    tensors = {"images": images, "labels": labels, "image": image, "label": label}
    return {"wp": wp, "torch": torch, "model": model, "fix": fix, "keep": keep, **tensors}


@pytest.mark.parametrize("path", sources(), ids=name)
def test_the_examples_of_docstrings_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tests = examples(path)
    assert sum(len(test.examples) for test in tests) == path.read_text().count(">>> "), "an example is not found"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        here = tmp_path / test.name
        here.mkdir()
        monkeypatch.chdir(here)
        for folder, make in FOLDERS.items():
            if f'"{folder}"' in (test.docstring or ""):
                make(here / folder, words=WORDS)
        test.globs = {**vars(importlib.import_module(name(path))), **shared()}
        told: list[str] = []
        runner.run(test, out=told.append)
        assert not told, "".join(told)
