from __future__ import annotations

from pathlib import Path

import pytest
import text_folders as folders


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny text models, by task."""
    home = tmp_path_factory.mktemp("models")
    return {task: make(home / task) for task, make in folders.MAKE.items()}
