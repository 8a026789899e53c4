"""The public names are settled: nothing is added or lost without a decision."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import weightpatch as wp


def test_root_names_are_few_sorted_and_there():
    assert wp.__all__ == sorted(wp.__all__)
    assert len(wp.__all__) <= 18
    for name in wp.__all__:
        assert getattr(wp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wp.nothing


@pytest.mark.parametrize(
    "module",
    [
        "bounds",
        "constraints",
        "editors",
        "evaluation",
        "likelihoods",
        "locality",
        "network",
        "patches",
        "records",
        "statistics",
        "tasks.images",
        "tasks.language",
        "training",
        "verdict",
    ],
)
def test_namespaces_have_what_they_say(module: str):
    loaded = importlib.import_module(f"weightpatch.{module}")
    assert loaded.__all__ == sorted(loaded.__all__)
    for name in loaded.__all__:
        assert getattr(loaded, name).__doc__, name


def test_import_is_light_and_changes_nothing():
    code = (
        "import sys, random; before = random.getstate(); import weightpatch; assert 'torch' not in sys.modules;"
        "import torch; seed, threads = torch.initial_seed(), torch.get_num_threads();"
        "import weightpatch.editing, weightpatch.evaluation, logging;"
        "assert random.getstate() == before and torch.initial_seed() == seed and torch.get_num_threads() == threads;"
        "assert not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
