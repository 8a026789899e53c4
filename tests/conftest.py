from __future__ import annotations

import hypothesis
import pytest
import torch
import zoo

# Timings on a shared machine say nothing, and a suite that every change must pass has to give one answer.
hypothesis.settings.register_profile("weightpatch", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("weightpatch")


@pytest.fixture(params=zoo.CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> zoo.Case:
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    zoo.seed()  # what a test draws does not depend on which tests ran before
