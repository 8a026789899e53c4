"""Every code block of the README and the docs runs: Python in one namespace a page, commands in one folder a page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
NOT_CODE = {"text", "json"}


def run_command(line: str, folder: Path) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,]+)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in known for group in extras for extra in group.split(",")), line
    elif words[0] in ("weightpatch", "python"):
        command = [sys.executable, *(["-m", "weightpatch"] if words[0] == "weightpatch" else []), *words[1:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    else:
        raise AssertionError(f"a command that no test can run: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"docs_{page.stem}"}
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, str(page), "exec"), namespace)
        elif language in ("sh", "bash"):
            for line in re.sub(r"\\\n\s*", "", code).splitlines():
                if line.strip() and not line.startswith("#"):
                    run_command(line, tmp_path)
        else:
            assert language in NOT_CODE, f"{page.name} has a block of {language}"


def test_pictures_and_links_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_measured_tables_are_the_stored_ones():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "readme_table.py"), "--check"], check=True)
