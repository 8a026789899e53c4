"""Hand-made hostile files: each is refused with PatchDamaged, quickly and before anything large is allocated."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import math
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from weightpatch.errors import PatchDamaged, PatchError
from weightpatch.patches import Demand, Gate, Patch, Reading, Unrecorded, describe, fingerprint
from weightpatch.records import Record

KEY = "weightpatch-patch"
Edit = Callable[[dict[str, Any], dict[str, Any], dict[str, bytes]], None]


@functools.cache
def honest() -> Patch:
    """All kinds of operations: full (F16), lowrank, rows, sparse; two gates, BF16 and F32, and two demands.

    Their numbers are 0 to 3, 4 and 5, 6 and 7 for what the gates read, 8 and 9.
    """
    draw = torch.Generator().manual_seed(0)
    base = {
        "full": torch.zeros(3).half(),
        "low": torch.zeros(40, 30),
        "rows": torch.zeros(6, 5),
        "sparse": torch.zeros(300),
    }
    new = {name: tensor.clone() for name, tensor in base.items()}
    new["full"] += torch.tensor([1, 2, 3]).half()
    new["low"] += torch.outer(torch.randn(40, generator=draw), torch.randn(30, generator=draw))
    new["rows"][[1, 4]] = torch.randn(2, 5, generator=draw)
    new["sparse"][[3, 270]] = 1.0
    read = Reading("early", "mean", (2, 2), metric=torch.ones(3, 5).half(), centre=torch.zeros(5))
    gates = {
        "fc": Gate(torch.ones(2, 3), torch.tensor([0.0, 2]), torch.full((2, 4), -1.0), read),
        "body.0": Gate(*(part.bfloat16() for part in (torch.ones(1, 5), torch.ones(1), torch.ones(1, 1)))),
    }
    records = [
        Record("a/b", 1, {"on": torch.tensor([True, False]), "x": torch.ones(2, 2)}, {"margin": 0.5, "deep": [{}]}),
        Record("a/c", 2, {"x": torch.arange(3)}),
    ]
    return Patch.between(
        base,
        new,
        fingerprint=fingerprint(base),
        metrics={"drift": 0.5},
        gates=gates,
        context=("1" * 64, "2" * 64),
        requires=("1" * 64,),
        demands=[Demand(record, 1.5) for record in records],
        unrecorded=[Unrecorded("Says", "no data")],
    )


def forge(edit: Edit, *, sign: bool = True, dump: Callable[[Any], str] | None = None) -> bytes:
    """The honest patch with manifest, header and data edited, then laid out and signed as the format wants it."""
    data = honest().to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    manifest = json.loads(header.pop("__metadata__")[KEY])
    payload = {
        name: data[end + info["data_offsets"][0] : end + info["data_offsets"][1]] for name, info in header.items()
    }
    edit(manifest, header, payload)
    manifest.setdefault("id", "0" * 64)
    signed = isinstance(manifest["id"], str) and sign
    if signed:
        manifest["id"] = "0" * 64
    text = (dump or (lambda m: json.dumps(m, sort_keys=True, separators=(",", ":"))))(manifest)
    plain = json.dumps({"__metadata__": {KEY: text}, **header}, separators=(",", ":")).encode()
    plain += b" " * (-len(plain) % 8)
    found = len(plain).to_bytes(8, "little") + plain + b"".join(payload[name] for name in payload)
    return found.replace(b"0" * 64, hashlib.sha256(found).hexdigest().encode(), 1) if signed else found


def test_forging_nothing_gives_the_honest_file():
    data = forge(lambda manifest, header, payload: None)
    assert data == honest().to_bytes()
    assert [operation.kind for operation in Patch.from_bytes(data).operations.values()] == [
        "full",
        "lowrank",
        "rows",
        "sparse",
    ]
    assert list(Patch.from_bytes(data).gates) == ["body.0", "fc"]


def tensor(manifest, number, **fields):
    manifest["tensors"][number].update(fields)


def gate(manifest, number, **fields):
    manifest["gates"][number].update(fields)


def reading(manifest, number, **fields):
    manifest["readings"][number].update(fields)


def demand(manifest, number, **fields):
    manifest["demands"][number].update(fields)


def resize(header, payload, name, shape, data=None):
    """Give one tensor another shape, and all the offsets that follow from it."""
    sizes = {"F16": 2, "F32": 4, "F64": 8, "BF16": 2, "BOOL": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
    header[name]["shape"] = shape
    payload[name] = bytes(math.prod(shape) * sizes[header[name]["dtype"]]) if data is None else data
    end = 0
    for key in payload:
        header[key]["data_offsets"] = [end, end := end + len(payload[key])]


def values(dtype, *numbers):
    return np.array(numbers, dtype=dtype).tobytes()


EDITS: dict[str, Edit] = {
    "nan": lambda m, h, p: p.update({"0000.values": values("<f2", 1, np.nan, 3)}),
    "infinity": lambda m, h, p: p.update({"0000.values": values("<f2", 1, -np.inf, 3)}),
    "nan factor": lambda m, h, p: p.update({"0001.left": values("<f4", *[np.nan] * 40)}),
    "index out of range": lambda m, h, p: p.update({"0003.index": values("<i2", 3, 300)}),
    "index negative": lambda m, h, p: p.update({"0003.index": values("<i2", -1, 3)}),
    "index twice": lambda m, h, p: p.update({"0003.index": values("<i2", 3, 3)}),
    "index falling": lambda m, h, p: p.update({"0003.index": values("<i2", 270, 3)}),
    "row out of range": lambda m, h, p: p.update({"0002.index": values("u1", 1, 6)}),
    "index too wide": lambda m, h, p: (h["0002.index"].update(dtype="I16"), resize(h, p, "0002.index", [2])),
    "no rows": lambda m, h, p: (resize(h, p, "0002.values", [0, 5]), resize(h, p, "0002.index", [0])),
    "rank zero": lambda m, h, p: (resize(h, p, "0001.left", [40, 0]), resize(h, p, "0001.right", [0, 30])),
    "ranks differ": lambda m, h, p: resize(h, p, "0001.left", [40, 2]),
    "fewer values than rows": lambda m, h, p: resize(h, p, "0002.values", [1, 5]),
    "transposed": lambda m, h, p: h["0001.right"].update(shape=[30, 1]),
    "flattened": lambda m, h, p: h["0002.values"].update(shape=[10]),
    "scalar rows": lambda m, h, p: tensor(m, 2, shape=[]),
    "negative shape": lambda m, h, p: h["0000.values"].update(shape=[-3]),
    "negative shapes": lambda m, h, p: h["0002.values"].update(shape=[-2, -5]),
    "bool in shape": lambda m, h, p: h["0001.right"].update(shape=[True, 30]),
    "text in shape": lambda m, h, p: h["0000.values"].update(shape=["3"]),
    "float in shape": lambda m, h, p: h["0000.values"].update(shape=[3.0]),
    "null shape": lambda m, h, p: h["0000.values"].update(shape=None),
    "shape bomb": lambda m, h, p: h["0000.values"].update(shape=[2**62, 2**62]),
    "shape that wraps to zero": lambda m, h, p: h["0000.values"].update(shape=[2**32, 2**32]),
    "many dimensions": lambda m, h, p: h["0000.values"].update(shape=[3] + [1] * 1000),
    "manifest's shape bomb": lambda m, h, p: tensor(m, 3, shape=[2**62, 2**62, 2**62]),
    "manifest's bool shape": lambda m, h, p: tensor(m, 0, shape=[True]),
    "manifest's zero shape": lambda m, h, p: tensor(m, 0, shape=[0]),
    "overlap": lambda m, h, p: h["0001.right"].update(data_offsets=[0, 120]),
    "hole": lambda m, h, p: h["0000.values"].update(data_offsets=[x + 8 for x in h["0000.values"]["data_offsets"]]),
    "negative offset": lambda m, h, p: h["0000.values"].update(data_offsets=[-6, 0]),
    "offsets swapped": lambda m, h, p: h["0000.values"].update(data_offsets=h["0000.values"]["data_offsets"][::-1]),
    "bool offset": lambda m, h, p: h[next(iter(h))].update(data_offsets=[False, h[next(iter(h))]["data_offsets"][1]]),
    "one offset": lambda m, h, p: h["0000.values"].update(data_offsets=[0]),
    "no offsets": lambda m, h, p: h["0000.values"].pop("data_offsets"),
    "null offsets": lambda m, h, p: h["0000.values"].update(data_offsets=None),
    "more in an entry": lambda m, h, p: h["0000.values"].update(strides=[1]),
    "entry is a list": lambda m, h, p: h.update({"0000.values": []}),
    "unknown type": lambda m, h, p: h["0000.values"].update(dtype="F8_E4M3"),
    "other type of one width": lambda m, h, p: h["0000.values"].update(dtype="BF16"),
    "type is a list": lambda m, h, p: h["0000.values"].update(dtype=["F16"]),
    "manifest's other type": lambda m, h, p: tensor(m, 0, dtype="float32"),
    "manifest's unknown type": lambda m, h, p: tensor(m, 0, dtype="object"),
    "manifest's type is a list": lambda m, h, p: tensor(m, 0, dtype=["float16"]),
    "unknown kind": lambda m, h, p: tensor(m, 0, kind="gate"),
    "kind is a dict": lambda m, h, p: tensor(m, 0, kind={}),
    "other kind": lambda m, h, p: tensor(m, 2, kind="sparse"),
    "part missing": lambda m, h, p: (h.pop("0000.values"), p.pop("0000.values"), resize(h, p, "0002.index", [2])),
    "operation missing": lambda m, h, p: m["tensors"].pop(),
    "operations missing": lambda m, h, p: m["tensors"].clear(),
    "part nobody uses": lambda m, h, p: (h.update({"0019.values": {"dtype": "U8"}}), resize(h, p, "0019.values", [1])),
    "path as a part": lambda m, h, p: h.update({"../../etc/passwd": h.pop("0000.values")}),
    "part with another number": lambda m, h, p: h.update({"٠٠٠٠.values": h.pop("0000.values")}),
    "path as a tensor": lambda m, h, p: tensor(m, 0, name="../../etc/passwd"),
    "escape in a name": lambda m, h, p: tensor(m, 0, name="a\x1b[2J"),
    "long name": lambda m, h, p: tensor(m, 0, name="f" * 257),
    "name is a number": lambda m, h, p: tensor(m, 0, name=7),
    "name is a list": lambda m, h, p: tensor(m, 0, name=["full"]),
    "lone surrogate": lambda m, h, p: tensor(m, 0, name="\ud800"),
    "one name twice": lambda m, h, p: tensor(m, 1, name="full"),
    "another's name": lambda m, h, p: tensor(m, 0, also=["rows"]),
    "path in another name": lambda m, h, p: tensor(m, 0, also=["/a"]),
    "names out of order": lambda m, h, p: tensor(m, 0, name="zzz"),
    "digest too short": lambda m, h, p: tensor(m, 0, pre="00"),
    "digest is a number": lambda m, h, p: tensor(m, 0, post=0),
    "base is null": lambda m, h, p: m.update(base=None),
    "requires a path": lambda m, h, p: m.update(requires=["../../x"]),
    "requires twice": lambda m, h, p: m.update(requires=["1" * 64, "1" * 64]),
    "requires a dict": lambda m, h, p: m.update(requires={}),
    "older format": lambda m, h, p: m.update(format="weightpatch-patch/1"),
    "newer format": lambda m, h, p: m.update(format="weightpatch-patch/3"),
    "field missing": lambda m, h, p: m.pop("editor"),
    "field more": lambda m, h, p: m.update(code="print(1)"),
    "entry's field more": lambda m, h, p: tensor(m, 0, code="print(1)"),
    "metrics is a list": lambda m, h, p: m.update(metrics=[]),
    "metric is huge": lambda m, h, p: m.update(metrics={"a": 10**400}),
    "escape in the editor": lambda m, h, p: m.update(editor="\x1b]0;x\x07"),
    "tensors is text": lambda m, h, p: m.update(tensors="full"),
    "tensor is null": lambda m, h, p: m["tensors"].append(None),
    "id is a number": lambda m, h, p: m.update(id=3),
    "gate: nan key": lambda m, h, p: p.update({"0005.keys": values("<f4", *[1, np.nan] * 3)}),
    "gate: infinite radius": lambda m, h, p: p.update({"0005.radii": values("<f4", 0, np.inf)}),
    "gate: infinite value": lambda m, h, p: p.update({"0004.values": values("<u2", 0xFF80)}),
    "gate: negative radius": lambda m, h, p: p.update({"0005.radii": values("<f4", 0, -1)}),
    "gate: the smallest negative radius": lambda m, h, p: p.update({"0004.radii": values("<u2", 0x8001)}),
    "gate: transposed": lambda m, h, p: h["0005.keys"].update(shape=[3, 2]),
    "gate: flattened": lambda m, h, p: h["0005.values"].update(shape=[8]),
    "gate: radii in a column": lambda m, h, p: h["0005.radii"].update(shape=[2, 1]),
    "gate: fewer radii": lambda m, h, p: resize(h, p, "0005.radii", [1]),
    "gate: more values": lambda m, h, p: resize(h, p, "0005.values", [3, 4]),
    "gate: no keys": lambda m, h, p: [
        resize(h, p, f"0004.{part}", [0, *h[f"0004.{part}"]["shape"][1:]]) for part in ("keys", "radii", "values")
    ],
    "gate: no width": lambda m, h, p: resize(h, p, "0005.keys", [2, 0]),
    "gate: no out": lambda m, h, p: resize(h, p, "0005.values", [2, 0]),
    "gate: whole numbers": lambda m, h, p: h["0004.radii"].update(dtype="I16"),
    "gate: shape bomb": lambda m, h, p: h["0005.keys"].update(shape=[2, 2**62]),
    "gate: part missing": lambda m, h, p: (
        h.pop("0004.radii"),
        p.pop("0004.radii"),
        resize(h, p, "0004.keys", [1, 5]),
    ),
    "gate: part of an operation": lambda m, h, p: h.update({"0004.left": h.pop("0004.keys")}),
    "gate: not in the manifest": lambda m, h, p: m["gates"].pop(),
    "gate: none in the manifest": lambda m, h, p: m.pop("gates"),
    "gate: more in the manifest": lambda m, h, p: m["gates"].append({"layer": "z", "readings": [0]}),
    "gate: one name twice": lambda m, h, p: gate(m, 0, layer="fc"),
    "gate: out of order": lambda m, h, p: m["gates"].reverse(),
    "gate: path": lambda m, h, p: gate(m, 0, layer="../../etc/passwd"),
    "gate: escape": lambda m, h, p: gate(m, 0, layer="a\x1b[2J"),
    "gate: no name": lambda m, h, p: gate(m, 0, layer=""),
    "gate: name is a number": lambda m, h, p: gate(m, 0, layer=1),
    "gate: name is a list": lambda m, h, p: gate(m, 0, layer=["body.0"]),
    "gate: is text": lambda m, h, p: m.update(gates=["body.0", "fc"]),
    "gate: all are text": lambda m, h, p: m.update(gates="ab"),
    "gate: all are a dict": lambda m, h, p: m.update(gates={"body.0": 0, "fc": 1}),
    "gate: all are null": lambda m, h, p: m.update(gates=None),
    "gate: more than fit": lambda m, h, p: m.update(
        gates=[{"layer": f"{n:05}", "readings": [0]} for n in range(9997)], readings=m["readings"][:1]
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_forged_files_with_a_right_digest_are_refused(edit):
    with pytest.raises(PatchDamaged):
        Patch.from_bytes(forge(edit))


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


# Of what came with the second format: also the words, so that each is refused for its own reason
WORDS: dict[str, tuple[Edit, str]] = {
    "field missing": (lambda m, h, p: m.pop("unrecorded"), "has the fields"),
    "readings missing": (lambda m, h, p: m.pop("readings"), "has the fields"),
    "context: a path": (lambda m, h, p: m.update(context=["../x"]), "SHA-256"),
    "context: lacks what is required": (lambda m, h, p: m.update(context=["2" * 64]), "not in context"),
    "context: out of order": (lambda m, h, p: m["context"].reverse(), "rising order"),
    "context: text": (lambda m, h, p: m.update(context="1" * 64), "a list"),
    "metric: deep": (lambda m, h, p: m.update(metrics={"a": deep(16)}), "inside one another"),
    "metric: very deep": (lambda m, h, p: m.update(metrics={"a": deep(500)}), "inside one another"),
    "metric: long number": (lambda m, h, p: m.update(metrics={"a": [10**400]}), "401 digits"),
    "metric: infinite": (lambda m, h, p: m.update(metrics={"a": [math.inf]}), "holds Infinity"),
    "metric: beyond 64 bits": (lambda m, h, p: m.update(metrics={"a": {"b": 2**63}}), "finite number"),
    "metric: escape": (lambda m, h, p: m.update(metrics={"a": {"b": ["\x1b[2J"]}}), "printable"),
    "metric: escape in a name": (lambda m, h, p: m.update(metrics={"a": {"\x1b[2J": 1}}), "printable"),
    "metric: many": (lambda m, h, p: m.update(metrics={"a": [1] * 100_000}), "at most 100000 values"),
    "setting: a list": (lambda m, h, p: m.update(settings={"a": [1]}), "finite number or text"),
    "unrecorded: text": (lambda m, h, p: m.update(unrecorded=["Says"]), "has the fields"),
    "unrecorded: two lines": (lambda m, h, p: m["unrecorded"][0].update(reason="a\nid forged"), "printable"),
    "unrecorded: more": (lambda m, h, p: m["unrecorded"][0].update(code="x"), "has the fields"),
    "gate: no reading": (lambda m, h, p: gate(m, 1, readings=[]), "1 to 8 readings"),
    "gate: nine readings": (lambda m, h, p: gate(m, 1, readings=[1] * 9), "1 to 8 readings"),
    "gate: reading beyond the last": (lambda m, h, p: gate(m, 1, readings=[2]), "in order of use"),
    "gate: reading is true": (lambda m, h, p: gate(m, 1, readings=[True]), "1 to 8 readings"),
    "gate: reading is negative": (lambda m, h, p: gate(m, 1, readings=[-1]), "1 to 8 readings"),
    "gate: a lock without keys": (lambda m, h, p: gate(m, 1, readings=[1, 1]), "missing: 0005.keys.1"),
    "gate: keys of another width than the metric": (lambda m, h, p: gate(m, 0, readings=[0, 1]), "missing"),
    "gate: more": (lambda m, h, p: gate(m, 0, code="x"), "has the fields"),
    "reading: unused": (lambda m, h, p: gate(m, 1, readings=[0]), "in order of use"),
    "reading: twice": (
        lambda m, h, p: (m["readings"].__setitem__(1, m["readings"][0]), [drop(h, p, f"0007.{k}") for k in PARTS]),
        "a reading twice",
    ),
    "reading: out of order": (lambda m, h, p: m["readings"].reverse(), "nothing uses"),
    "reading: other pooling": (lambda m, h, p: reading(m, 1, pooling="max"), "none, mean, last, minimum"),
    "reading: pooling is a list": (lambda m, h, p: reading(m, 1, pooling=["mean"]), "pooling"),
    "reading: other distance": (lambda m, h, p: reading(m, 1, distance="l1"), "euclidean, cosine"),
    "reading: grid without mean": (lambda m, h, p: reading(m, 0, grid=[2]), "grid"),
    "reading: huge grid": (lambda m, h, p: reading(m, 1, grid=[2**70]), "digits"),
    "reading: large grid": (lambda m, h, p: reading(m, 1, grid=[2**40]), "grid"),
    "reading: grid is text": (lambda m, h, p: reading(m, 1, grid="22"), "a list"),
    "reading: other part": (lambda m, h, p: reading(m, 1, parts=["centre", "code"]), "parts"),
    "reading: parts out of order": (lambda m, h, p: reading(m, 1, parts=["metric", "centre"]), "parts"),
    "reading: part not in the manifest": (lambda m, h, p: reading(m, 1, parts=["metric"]), "nothing uses"),
    "reading: path": (lambda m, h, p: reading(m, 1, layer="../x"), "module name"),
    "reading: nan": (lambda m, h, p: p.update({"0007.metric": values("<f2", *[np.nan] * 15)}), "NaN"),
    "reading: vector": (lambda m, h, p: resize(h, p, "0007.metric", [3]), "expected metric"),
    "reading: other rank": (lambda m, h, p: resize(h, p, "0007.metric", [4, 5]), "metric gives 4"),
    "reading: other width": (lambda m, h, p: resize(h, p, "0007.metric", [3, 6]), "other widths"),
    "reading: number": (lambda m, h, p: resize(h, p, "0007.centre", []), "expected metric"),
    "reading: whole numbers": (lambda m, h, p: h["0007.metric"].update(dtype="I16"), "floating-point"),
    "demand: path as a kind": (lambda m, h, p: demand(m, 0, kind="../../x"), "AUTHOR/NAME"),
    "demand: class as a kind": (lambda m, h, p: demand(m, 0, kind="Classified"), "AUTHOR/NAME"),
    "demand: kind is a dict": (lambda m, h, p: demand(m, 0, kind={}), "AUTHOR/NAME"),
    "demand: version zero": (lambda m, h, p: demand(m, 0, version=0), "version"),
    "demand: version is true": (lambda m, h, p: demand(m, 0, version=True), "version"),
    "demand: version is text": (lambda m, h, p: demand(m, 0, version="1"), "version"),
    "demand: path as a tensor": (lambda m, h, p: demand(m, 0, tensors=["on", "x/../y"]), "name of a demand's tensor"),
    "demand: tensors out of order": (lambda m, h, p: demand(m, 0, tensors=["x", "on"]), "rising order"),
    "demand: tensor twice": (lambda m, h, p: demand(m, 0, tensors=["on", "on", "x"]), "rising order"),
    "demand: tensor is a number": (lambda m, h, p: demand(m, 0, tensors=[1]), "name of a demand's tensor"),
    "demand: tensor not in the file": (lambda m, h, p: demand(m, 0, tensors=["on", "x", "y"]), "missing: 0008.y"),
    "demand: tensor not in the manifest": (lambda m, h, p: demand(m, 0, tensors=["x"]), "nothing uses: 0008.on"),
    "demand: not in the manifest": (lambda m, h, p: m["demands"].pop(), "nothing uses: 0009.x"),
    "demand: scalars are a list": (lambda m, h, p: demand(m, 0, scalars=[]), "a dict"),
    "demand: deep scalars": (lambda m, h, p: demand(m, 0, scalars={"a": deep(16)}), "inside one another"),
    "demand: escape": (lambda m, h, p: demand(m, 0, scalars={"a": ["\x1b"]}), "printable"),
    "demand: before is whole": (lambda m, h, p: demand(m, 0, before=1), "violation before"),
    "demand: before is true": (lambda m, h, p: demand(m, 0, before=True), "violation before"),
    "demand: after is text": (lambda m, h, p: demand(m, 0, after="0.5"), "violation after"),
    "demand: after overflows": (lambda m, h, p: demand(m, 0, after=0.25), "violation after"),
    "demand: more": (lambda m, h, p: demand(m, 0, module="os"), "has the fields"),
    "demand: null": (lambda m, h, p: m["demands"].append(None), "has the fields"),
    "demand: nan": (lambda m, h, p: p.update({"0008.x": values("<f4", 1, 2, 3, np.nan)}), "NaN"),
    "demand: neither true nor false": (lambda m, h, p: p.update({"0008.on": values("u1", 1, 2)}), "true and false"),
    "demand: shape that no stride fits": (lambda m, h, p: resize(h, p, "0008.x", [0, 2**40, 2**40]), "impossible"),
    "demand: long name": (lambda m, h, p: h.update({f"0008.{'x' * 200}": h.pop("0008.x")}), "something else"),
}
PARTS = ("centre", "metric")


def drop(header, payload, name):
    header.pop(name), payload.pop(name)
    first = next(iter(payload))
    resize(header, payload, first, header[first]["shape"], payload[first])


@pytest.mark.parametrize(("edit", "words"), WORDS.values(), ids=WORDS.keys())
def test_each_is_refused_for_its_own_reason(edit, words):
    def dump(plain):
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).replace('"after":0.25', '"after":1e999')

    with pytest.raises(PatchDamaged, match=words):
        Patch.from_bytes(forge(edit, dump=dump))


HOSTILE = (
    *(None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "../x", "\x1b", "\ud800", "0" * 64, "1" * 64),
    *([], {}, [0], [[]], {"a": {}}, deep(15), deep(50), ["x", "y"], [True], "none", "mean", "cosine", "full", "F32"),
)
hostile = st.sampled_from(HOSTILE).map(copy.deepcopy)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in pairs] + [place for _, item in pairs for place in places(item)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_refused_or_is_a_patch_that_is_saved_as_it_is(data):
    """One or two places of manifest or header hold something else, are gone, or are there twice."""

    def edit(manifest, header, payload):
        for _ in range(data.draw(st.integers(1, 2))):
            holder, key = data.draw(st.sampled_from(places([manifest, header])[2:]))
            how = data.draw(st.sampled_from(["other", "gone", "more"]))
            if how == "gone" and len(holder) > 1:
                del holder[key]
            elif how == "more" and isinstance(holder, list):
                holder.append(holder[key])
            elif how == "more":
                holder[data.draw(st.sampled_from(["x", "id", "code", "0000.x", "0010.values"]))] = data.draw(hostile)
            else:
                holder[key] = data.draw(hostile)

    try:
        forged = forge(edit)
        patch = Patch.from_bytes(forged)
    except PatchDamaged:
        return
    assert patch.to_bytes() == forged
    assert Patch.from_bytes(patch.to_bytes()) == patch


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("../../evil", "x" * 100)
    return buffer.getvalue()


def saved_by_torch() -> bytes:
    torch.save({"w": torch.ones(3)}, buffer := io.BytesIO())
    return buffer.getvalue()


def twice(data: bytes, key: bytes) -> bytes:
    """The header's first such key is given again at its end."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip(b" ")
    info = header[header.index(key) :].split(b"}", 1)[0] + b"}"
    return raw(header[:-1] + b"," + info + b"}", data[end:])


def respaced() -> bytes:
    data = honest().to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return raw(json.dumps(json.loads(data[8:end])).encode(), data[end:])


FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "zeros": lambda: b"\0" * 4096,
    "pickle": lambda: pickle.dumps({"w": [1, 2, 3]}),
    "torch": saved_by_torch,
    "zip": zipped,
    "elf": lambda: b"\x7fELF\x02\x01\x01" + b"\0" * 4000,
    "empty object": lambda: raw(b"{}"),
    "list": lambda: raw(b"[]"),
    "null": lambda: raw(b"null"),
    "text": lambda: raw(b"hello"),
    "not ascii": lambda: raw('{"ä":1}'.encode()),
    "huge header": lambda: raw(b"{}", length=2**63),
    "largest header": lambda: raw(b"{}", length=2**64 - 1),
    "header over the limit": lambda: raw(b'{"a":"' + b"x" * 2**20 + b'"}'),
    "header longer than the file": lambda: raw(b"{}", length=1000),
    "odd header": lambda: struct.pack("<Q", 3) + b"{} ",
    "deep": lambda: raw(b"[" * 100_000),
    "deep objects": lambda: raw(b'{"a":' * 100_000),
    "long number": lambda: raw(b'{"a":' + b"9" * 100_000 + b"}"),
    "nan in the header": lambda: raw(b'{"a":NaN}'),
    "no metadata": lambda: raw(
        json.dumps({"0000.values": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    ),
    "other metadata": lambda: raw(json.dumps({"__metadata__": {"format": "pt"}}).encode()),
    "two metadata": lambda: raw(json.dumps({"__metadata__": {KEY: "{}", "format": "pt"}}).encode()),
    "metadata is a number": lambda: raw(json.dumps({"__metadata__": {KEY: 1}}).encode()),
    "manifest is a list": lambda: raw(json.dumps({"__metadata__": {KEY: "[]"}}).encode()),
    "manifest is deep": lambda: raw(json.dumps({"__metadata__": {KEY: "[" * 100_000}}).encode()),
    "manifest is a surrogate": lambda: raw(json.dumps({"__metadata__": {KEY: "\ud800"}}).encode()),
    "wrong digest": lambda: forge(lambda m, h, p: m.update(id="1" * 64), sign=False),
    "digest of others": lambda: forge(lambda m, h, p: m.update(editor="other"), sign=False),
    "nan in the manifest": lambda: forge(lambda m, h, p: m.update(metrics={"a": float("nan")})),
    "manifest with spaces": lambda: forge(lambda m, h, p: None, dump=lambda m: json.dumps(m, sort_keys=True)),
    "manifest out of order": lambda: forge(
        lambda m, h, p: None, dump=lambda m: json.dumps(dict(sorted(m.items(), reverse=True)), separators=(",", ":"))
    ),
    "key twice in the manifest": lambda: forge(
        lambda m, h, p: None,
        dump=lambda m: json.dumps(m, sort_keys=True, separators=(",", ":")).replace('"base"', '"editor":"x","base"', 1),
    ),
    "number written otherwise": lambda: forge(
        lambda m, h, p: None,
        dump=lambda m: json.dumps(m, sort_keys=True, separators=(",", ":")).replace("0.5", "5e-1"),
    ),
    "tensor twice": lambda: twice(honest().to_bytes(), b'"0000.values"'),
    "metadata twice": lambda: twice(honest().to_bytes(), b'"__metadata__"'),
    "header with spaces": respaced,
    "too many tensors": lambda: raw(
        json.dumps(
            {f"{n:05}": 0 for n in range(10_002)} | {"__metadata__": {KEY: "{}"}}, separators=(",", ":")
        ).encode()
    ),
    "polyglot": lambda: honest().to_bytes() + zipped(),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
def test_hostile_files_are_refused(make, tmp_path):
    path = tmp_path / "evil.patch.safetensors"
    path.write_bytes(make())
    began = time.perf_counter()
    for read in (Patch.load, describe):
        with pytest.raises(PatchDamaged, match=r"evil\.patch\.safetensors: not"):
            read(path)
    assert time.perf_counter() - began < 5


def test_a_huge_file_of_another_kind_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        file.write(b"PK\3\4" + b"\xff" * 60)
        file.truncate(2**40)
    with pytest.raises(PatchDamaged):
        Patch.load(path)


def test_only_regular_files_are_read_and_links_are_not_followed(tmp_path):
    honest().save(path := tmp_path / "a.patch.safetensors")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "link": "links are not followed",
        "dangling": "links are not followed",
        "pipe": "not a regular file",
        ".": "not a regular file",
        "nothing": "No such file",
    }.items():
        with pytest.raises(PatchError, match=words):
            Patch.load(tmp_path / name)
    with pytest.raises(PatchError):
        Patch.load("/dev/zero")


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_refused(seed):
    draw = np.random.default_rng(seed)
    data = honest().to_bytes()
    for _ in range(50):
        damaged = bytearray(data)
        for place in draw.integers(0, len(data), draw.integers(1, 20)):
            damaged[place] = draw.integers(0, 256)
        if damaged != data:
            with pytest.raises(PatchDamaged):
                Patch.from_bytes(bytes(damaged))
