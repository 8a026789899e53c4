"""The progress bar of evaluations and trainings, where there is a terminal and where there is none."""

from __future__ import annotations

import pytest

from weightpatch._terminal import bar


@pytest.mark.parametrize(("terminal", "wanted"), [("1", True), ("1", False), ("", True)])
def test_a_bar_is_shown_on_terminals_where_it_is_wanted(
    terminal: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", terminal)  # "" is as if there were none
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    with bar("editing", 5, 0, wanted) as show:
        show(3, "67% hold")
    said = capsys.readouterr()
    assert not said.out
    shown = all(part in said.err for part in ("editing", "3/5", "67% hold"))
    assert shown == (bool(terminal) and wanted)
    assert shown or not said.err
