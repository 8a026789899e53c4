import pytest
import torch

from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.tasks.images import LabelledImages
from weightpatch.tasks.images._labelled import normalised


def some(n: int = 5) -> LabelledImages:
    return LabelledImages(torch.arange(4.0 * n).reshape(n, 1, 2, 2), torch.arange(n) % 3, ("a", "b", "c"))


def test_slicing_keeps_images_and_labels_together() -> None:
    data = some()
    part = data[1:4]
    assert len(part) == 3
    assert torch.equal(part.images, data.images[1:4])
    assert torch.equal(part.labels, data.labels[1:4])
    assert part.classes == data.classes
    wrong = data[data.labels == 1]
    assert torch.equal(wrong.images, data.images[[1, 4]])
    assert len(data[5:]) == 0
    assert data[1:4][torch.tensor([2, 0])].names == (3, 1) and wrong.names == (1, 4)
    with pytest.raises(InvalidInput, match="2 names for 5 images"):
        LabelledImages(data.images, data.labels, data.classes, ("x", "y"))
    assert repr(data) == "LabelledImages(float32(5, 1, 2, 2), 3 classes)"


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 2, 2), torch.zeros(2).long(), ShapeMismatch, "expected float32 of shape"),
        (torch.zeros(2, 1, 2, 2).double(), torch.zeros(2).long(), ShapeMismatch, "expected float32 of shape"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(3).long(), ShapeMismatch, r"expected int64 of shape \(2,\)"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2), ShapeMismatch, r"expected int64 of shape \(2,\)"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]), InvalidInput, "expected 0 to 1"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([-1, 0]), InvalidInput, "from -1 to 0"),
    ],
)
def test_refuses(images: torch.Tensor, labels: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LabelledImages(images, labels, ("a", "b"))


def test_normalised_is_its_formula_and_leaves_its_input() -> None:
    pixels = torch.tensor([[[[0.0]], [[51.0]], [[255.0]]]])
    out = normalised(pixels, (0.0, 0.1, 0.5), (1.0, 0.1, 0.25))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 1.0, 2.0]))
    assert pixels.flatten().tolist() == [0, 51, 255]


def test_normalised_refuses() -> None:
    with pytest.raises(ShapeMismatch, match="do not fit images of 3 channels"):
        normalised(torch.zeros(1, 3, 2, 2), (0.0, 0.0), 1.0)
    with pytest.raises(InvalidInput, match="expected positive"):
        normalised(torch.zeros(1, 3, 2, 2), 0.0, 0.0)
