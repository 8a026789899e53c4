from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, floats, same_bits

from weightpatch.patches.rounding import rounded, step


def nearest_even(value: float, dtype: torch.dtype) -> Fraction:
    """Slow oracle in exact arithmetic, for values inside the type's range."""
    bits = {torch.float16: (11, -24), torch.bfloat16: (8, -133)}[dtype]
    exact = Fraction(value)
    if not exact:
        return exact
    exponent = 0
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits[0] + 1, bits[1])
    return round(exact / unit) * unit  # round() of a Fraction is to even


@settings(max_examples=500)
@given(st.floats(-60000, 60000) | st.floats(-1e-4, 1e-4) | st.floats(-1e-38, 1e-38))
def test_half_types_are_rounded_once(value):
    for dtype in (torch.float16, torch.bfloat16):
        found = rounded(torch.tensor([value], dtype=torch.float64), dtype).item()
        assert Fraction(found) == nearest_even(value, dtype)


def test_a_value_that_two_roundings_get_wrong():
    value = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)  # just above a tie of float16
    assert rounded(value, torch.float16).item() == 1 + 2**-10
    assert value.float().half().item() == 1.0


def test_numpy_agrees_on_float16():
    values = floats(torch.float64, (20000,), 0)
    values = torch.cat(
        [values, torch.randn(20000, dtype=torch.float64), torch.randn(20000, dtype=torch.float64) * 1e-6]
    )
    with np.errstate(over="ignore", under="ignore"):
        expected = torch.from_numpy(values.numpy().astype(np.float16))
    assert same_bits(rounded(values, torch.float16), expected)


def test_values_of_the_type_itself_are_kept():
    for dtype in DTYPES:
        values = floats(dtype, (5000,), 1)
        assert same_bits(rounded(values.double(), dtype), values)


def test_steps_are_the_distance_to_the_next_larger_value():
    for dtype in (torch.float16, torch.float32, torch.float64):
        kind = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
        values = floats(dtype, (5000,), 2).abs()
        values = values[values < torch.finfo(dtype).max / 2]
        assert torch.equal(step(values), torch.from_numpy(np.spacing(values.numpy().astype(kind)).astype(np.float64)))
    values = torch.tensor([1.0, -1.0, 0.0, 3.0e-39], dtype=torch.bfloat16)
    assert step(values).tolist() == [2**-7, 2**-7, 2**-133, 2**-133]
