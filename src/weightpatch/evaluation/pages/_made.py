"""What the pages of edits share: what a patch weighs, and how it was made."""

from __future__ import annotations

from typing import Any

from ...editing import Edit
from ...patches import Patch

__all__ = ["facts", "made", "sizes"]


def made(edit: Edit) -> dict[str, Any]:
    """Return what the sections on costs and on how an edit was made show."""
    return {
        "manifest": None if edit.patch is None else edit.patch.manifest.to_json(),
        "constraint": edit.constraint.kind,
        "sizes": sizes(edit.patch),
    }


def facts(edit: Edit) -> dict[str, Any]:
    """Return what the JSON beside a page says of an edit itself."""
    patch = edit.patch
    return {
        "result": edit.result.name,
        "advice": edit.result.value,
        "steps": edit.steps,
        "violation": edit.violation,
        **edit.effects(),
        "cost": {"seconds": edit.cost.seconds, "peak_bytes": edit.cost.peak_bytes},
        "editor": repr(edit.editor),
        "constraint": edit.constraint.kind,
        "patch": None
        if patch is None
        else {"id": patch.id, "bytes": patch.nbytes, "tensors": sizes(patch), "manifest": patch.manifest.to_json()},
    }


def sizes(patch: Patch | None) -> list[dict[str, Any]]:
    """Say what the patch holds, largest first."""
    if patch is None:
        return []
    entries = {entry.name: entry for entry in patch.manifest.tensors}
    found = [
        {"name": name, "kind": operation.kind, "shape": list(entries[name].shape), "bytes": operation.nbytes}
        for name, operation in patch.operations.items()
    ]
    return sorted(found, key=lambda item: (-item["bytes"], item["name"]))
