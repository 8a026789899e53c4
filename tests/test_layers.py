"""Who may import whom: the arrows of docs/architecture.md, and no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "weightpatch"
LAYERS = (
    {"_version", "errors", "_cost"},
    {"_readings"},
    {"_calling", "bounds", "gates", "likelihoods", "records"},
    {"constraints", "effects"},
    {"locality", "verdict"},
    {"network", "patches"},
    {"_identity", "_terminal", "problem", "remembering"},
    {"editors"},
    {"statistics"},
    {"preparing"},
    {"outcome"},
    {"checking"},
    {"making"},
    {"editing"},
    {"evaluation"},
    {"training"},
    {"tasks"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ALLOWED_ABOVE = {"patches": {"errors", "_version", "_readings", "gates", "records"}}


def imports(path: Path) -> set[str]:
    """Top-level parts of weightpatch that a file imports, also inside functions."""
    package = ("weightpatch", *path.relative_to(SOURCE).with_suffix("").parts)
    if path.name == "__init__.py":
        package = package[:-1]
        here = package
    else:
        here = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            names = [full] if len(full) > 1 else [(*full, alias.name) for alias in node.names]
            found |= {name[1] for name in names if name[0] == "weightpatch" and len(name) > 1}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("weightpatch.")}
    return found


def test_every_part_has_a_layer():
    parts = {
        p.stem if p.is_file() else p.name for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert parts - {"__init__", "__main__"} == set(RANK)


def test_imports_point_downwards():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for other in imports(path) - {part}:
            allowed = ALLOWED_ABOVE.get(part)
            if other in RANK and (RANK[other] >= RANK[part] or (allowed is not None and other not in allowed)):
                wrong.append(f"{path.relative_to(SOURCE)} imports {other}")
    assert not wrong


def test_nothing_heavy_is_imported_for_the_command_line():
    for path in (SOURCE / "cli").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            assert not any(name.split(".")[0] in ("torch", "numpy", "matplotlib") for name in names if name), path


MADE = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
MADE |= {"tensor", "zeros"}


def test_what_makes_a_tensor_says_on_which_device():
    """Else it lands on the default device of whoever calls, and not where the model is, or the generator."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        parameters = {id(node.args[0]) for node in calls(tree, "nn") if node.args and node.func.attr == "Parameter"}
        for node in calls(tree, "torch"):
            told = any(keyword.arg == "device" for keyword in node.keywords)
            if node.func.attr in MADE and not told and id(node) not in parameters:
                wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def calls(tree: ast.AST, module: str) -> list[ast.Call]:
    """Calls of functions of a module."""
    named = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [node for node in named if isinstance(node.func.value, ast.Name) and node.func.value.id == module]
