import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.tasks.images import altered, noise, rotations, shifts

SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


def moved(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Slow oracle: every pixel comes from its neighbour, clamped to the image."""
    height, width = image.shape[-2:]
    out = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            from_row = min(max(row - down, 0), height - 1)
            from_column = min(max(column - right, 0), width - 1)
            out[..., row, column] = image[..., from_row, from_column]
    return out


@given(SHAPES)
def test_shifts_are_up_down_left_right(shape: tuple[int, int, int, int]) -> None:
    images = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    expected = [moved(images, down, right) for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    assert torch.equal(shifts(images), torch.cat(expected))


def test_noise_is_reproducible_and_private() -> None:
    images = torch.zeros(50, 1, 28, 28)
    state = torch.get_rng_state()
    first, again, other = noise(images, 0.3, seed=1), noise(images, 0.3, seed=1), noise(images, 0.3, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() == pytest.approx(0.3, rel=0.02)
    assert abs(first.mean()) < 0.01
    assert torch.allclose(noise(images.double(), 0.3, seed=1), first.double())


def test_no_noise_is_the_image() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert torch.equal(noise(images, 0.0, seed=0), images)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_noise_refuses(std: float) -> None:
    with pytest.raises(InvalidInput, match="finite number of at least 0"):
        noise(torch.zeros(1, 1, 2, 2), std, seed=0)


@given(st.integers(1, 3), st.integers(2, 9))
def test_quarter_turns_are_exact(channels: int, side: int) -> None:
    images = torch.arange(2 * channels * side * side, dtype=torch.float64).reshape(2, channels, side, side)
    turned = rotations(images, (0.0, 90.0, 180.0, -90.0)).unflatten(0, (4, 2))
    for quarters, copy in enumerate(turned):
        expected = torch.rot90(images, quarters, (2, 3))  # counter-clockwise
        torch.testing.assert_close(copy, expected, rtol=0, atol=1e-9)


def test_rotation_keeps_shapes_round_in_wide_images() -> None:
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(81.0) - 40, indexing="ij")
    disc = torch.exp(-(rows**2 + columns**2) / 50)[None, None]
    torch.testing.assert_close(rotations(disc, (30.0,)), disc, rtol=0, atol=0.01)


def test_rotation_is_a_rotation_in_wide_images() -> None:
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(81.0) - 40, indexing="ij")
    angle = math.radians(20)
    spot = torch.exp(-(rows**2 + (columns - 12) ** 2) / 50)[None, None]
    # counter-clockwise on a screen whose rows go down
    expected = torch.exp(-((rows + 12 * math.sin(angle)) ** 2 + (columns - 12 * math.cos(angle)) ** 2) / 50)[None, None]
    torch.testing.assert_close(rotations(spot, (20.0,)), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("degrees", [(), (math.nan,), (0.0, math.inf)])
def test_rotations_refuse(degrees: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="finite angle"):
        rotations(torch.zeros(1, 1, 2, 2), degrees)


def test_altered_is_the_documented_seven() -> None:
    images = torch.randn(3, 1, 8, 8)
    out = altered(images)
    assert out.shape == (21, 1, 8, 8)
    parts = out.split([12, 6, 3])
    assert torch.equal(parts[0], shifts(images))
    assert torch.equal(parts[1], rotations(images, (-5.0, 5.0)))
    assert torch.equal(parts[2], noise(images, 0.1, 0))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, 0, 2)]
)
def test_not_images(images: torch.Tensor) -> None:
    with pytest.raises(ShapeMismatch, match="expected floating point of shape"):
        altered(images)
