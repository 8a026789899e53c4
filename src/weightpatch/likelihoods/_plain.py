"""Likelihoods as plain values, for files."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidInput
from ._base import Likelihood, Of
from ._bernoulli import Bernoulli
from ._categorical import Categorical
from ._gaussian import Gaussian

__all__ = ["plain", "unplain"]


def plain(likelihood: Likelihood) -> dict[str, Any] | None:
    """Return a likelihood of this module as scalars and lists, for files; None for one that a user wrote."""
    if isinstance(likelihood, (Categorical, Bernoulli)):
        of = None if likelihood.of is None else likelihood.of.name
        return {"kind": type(likelihood).__name__.lower(), "dim": likelihood.dim, "of": of}
    if isinstance(likelihood, Gaussian):
        numbers = {name: getattr(likelihood, name) for name in ("scale", "tolerance")}
        return {"kind": "gaussian", "dim": likelihood.dim} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()
        }
    return None


def unplain(content: Any) -> Likelihood:
    """Read what `plain` returned; anything else is `InvalidInput`."""
    try:
        kind, dim = content["kind"], content["dim"]
        if dim is not None and type(dim) is not int:
            raise ValueError(f"dim is {dim!r}")
        if kind in ("categorical", "bernoulli"):
            of = None if content["of"] is None else Of[content["of"]]
            return Categorical(dim, of) if kind == "categorical" else Bernoulli(of, dim)
        if kind == "gaussian":
            scale, tolerance = (
                tuple(value) if isinstance(value, list) else value for value in (content["scale"], content["tolerance"])
            )
            return Gaussian(scale, tolerance, dim)
        raise ValueError(f"kind is {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"this is no likelihood that weightpatch wrote: {error}") from error
