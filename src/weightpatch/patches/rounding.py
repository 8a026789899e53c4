"""Exactly one rounding from float64 to a tensor's own type, and the size of its steps."""

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """The values' bit patterns as integers of the same width; tells 0.0 from -0.0."""
    return values.view(BITS[values.element_size()])


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values in another type, to nearest even, rounded once.

    Converting to a half type directly would round twice, by way of float32. Rounding to odd on the way (the sticky last
    bit keeps "not exactly") makes the second rounding the right one: Boldo & Melquiond, "When double rounding is odd".
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    middle = values.to(torch.float32)
    found, back = middle.view(torch.int32), middle.to(torch.float64)
    found -= (back.abs() > values.abs()).to(torch.int32)  # towards zero
    found |= (back != values).to(torch.int32)
    return middle.to(dtype)


def step(values: Tensor) -> Tensor:
    """The distance, in float64, from each value's magnitude to the next larger one of its type."""
    limits = torch.finfo(values.dtype)
    exponent = torch.frexp(values.to(torch.float64)).exponent
    steps = torch.ldexp(torch.full_like(values, limits.eps, dtype=torch.float64), exponent - 1)
    smallest = limits.smallest_normal * limits.eps
    return torch.where(values == 0, smallest, steps.clamp_min(smallest))
