from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, KINDS, change, floats, same_bits

from weightpatch.errors import NonFinite, NotEditable, ShapeMismatch
from weightpatch.patches import Full, LowRank, Patch, Rows, Sparse, base_fingerprint, encode
from weightpatch.patches.rounding import rounded

SHAPES = ((), (1,), (7,), (300,), (5, 3), (2, 3, 4), (1, 40), (40, 1), (300, 2), (64, 48))


@settings(max_examples=300)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(KINDS), st.integers(0, 2**32), st.booleans())
def test_every_operation_reproduces_the_new_tensor(dtype, shape, kind, seed, exact):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    new = change(base, seed + 1, kind)
    operation = encode(base, new, exact=exact)
    assert operation is not None or same_bits(base, new)
    if operation is not None:
        assert operation.nbytes <= new.numel() * new.element_size()
        made = operation.on(base)
        assert same_bits(made, rounded(operation.add(base.double().clone(), base), dtype))
        if exact or not isinstance(operation, LowRank):
            assert same_bits(made, new)
        else:
            scale = torch.maximum(base.abs(), new.abs()).double().clamp_min(new.double().square().mean().sqrt())
            steps = 1 if dtype.itemsize == 2 else 8
            assert ((made.double() - new.double()).abs() <= steps * torch.finfo(dtype).eps * scale).all()


@settings(max_examples=200)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 2**32), st.integers(0, 2**32))
def test_any_bit_pattern_is_reproduced_exactly(dtype, shape, first, second):
    base, new = floats(dtype, shape, first), floats(dtype, shape, second)
    operation = encode(base, new, exact=True)
    assert same_bits(new, base if operation is None else operation.on(base))


def test_the_sign_of_zero_is_a_change():
    base = torch.zeros(1000)
    new = base.clone()
    new[17] = -0.0
    operation = encode(base, new)
    assert isinstance(operation, Sparse)
    assert operation.index.tolist() == [17]
    assert same_bits(operation.on(base), new)


def test_the_smallest_operation_is_chosen():
    base = torch.randn(100, 50)
    some, row = base.clone(), base.clone()
    some[3, 4], row[7] = 1.5, 0.25
    assert isinstance(sparse := encode(base, some), Sparse)
    assert (sparse.index.dtype, sparse.nbytes) == (torch.int16, 2 + 4)
    assert isinstance(rows := encode(base, row), Rows)
    assert (rows.index.dtype, rows.nbytes) == (torch.uint8, 1 + 200)
    assert isinstance(low := encode(base, base + torch.outer(torch.randn(100), torch.randn(50))), LowRank)
    assert low.nbytes == (100 + 50) * 4
    assert isinstance(full := encode(base, torch.randn(100, 50)), Full)
    assert full.nbytes == 100 * 50 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_edits_of_low_rank_stay_small_in_every_type(dtype, rank):
    """Ten float32 steps, as an editor makes them, on weights of any type; large enough for the randomised finder."""
    draw = torch.Generator().manual_seed(rank)
    base = (torch.randn(400, 300, generator=draw) * 0.05).to(dtype)
    inputs = torch.rand(rank, 300, generator=draw).to(torch.float64 if dtype == torch.float64 else torch.float32)
    weights = base.to(inputs.dtype)
    for step in range(10):
        error = torch.randn(400, generator=draw).to(inputs.dtype) * 0.01
        weights = weights - 0.05 * torch.outer(error, inputs[step % rank])
    operation = encode(base, weights.to(dtype))
    assert isinstance(operation, LowRank)
    assert operation.left.shape == (400, rank)


def test_factors_of_float32_weights_are_finer_where_float32_would_lose_some():
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randint(1, 10, shape, generator=draw).float() for shape in ((192, 3), (3, 300)))
    model = torch.nn.Linear(300, 192, bias=False)
    torch.nn.init.zeros_(model.weight)
    new = left @ right  # whole numbers: exact, and of no float32 factors of equal size
    operation = encode(model.weight.detach(), new, exact=True)
    assert isinstance(operation, LowRank)
    assert operation.left.dtype == operation.right.dtype == torch.float64
    own = dict(model.state_dict())
    patch = Patch.between(own, {"weight": new}, exact=True, fingerprint=base_fingerprint(model))
    assert same_bits(Patch.from_bytes(patch.to_bytes()).result(own)["weight"], new)
    assert patch.nbytes < new.numel() * 4 / 5


def test_the_callers_random_numbers_and_inputs_stay():
    base = torch.randn(300, 300)
    new = base + torch.outer(torch.randn(300), torch.randn(300))
    copies, state = (base.clone(), new.clone()), torch.get_rng_state()
    encode(base, new)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(base, copies[0])
    assert same_bits(new, copies[1])


def test_layouts_and_gradients_do_not_matter():
    base = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    new = base.detach().clone()
    new[2] += 1
    operation = encode(base, new)
    assert isinstance(operation, Rows)
    assert same_bits(operation.on(base.detach()), new.contiguous())


@pytest.mark.parametrize(
    ("base", "new", "error"),
    [
        (torch.zeros(3), torch.zeros(4), ShapeMismatch),
        (torch.zeros(3), torch.zeros(3).half(), ShapeMismatch),
        (torch.zeros(3), torch.tensor([0, 1, float("nan")]), NonFinite),
        (torch.zeros(3), torch.tensor([0, 1, float("inf")]), NonFinite),
        (torch.tensor([0, 1, float("nan")]), torch.zeros(3), NonFinite),
        (torch.zeros(3).long(), torch.ones(3).long(), NotEditable),
        (torch.zeros(3).cfloat(), torch.ones(3).cfloat(), NotEditable),
    ],
)
def test_what_cannot_be_encoded_is_refused(base, new, error):
    with pytest.raises(error):
        encode(base, new)
