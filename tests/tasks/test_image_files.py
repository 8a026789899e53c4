"""Loaders on tiny files that the tests write themselves."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weightpatch.errors import InvalidInput, MissingExtra, ShapeMismatch
from weightpatch.tasks.images import _npz, cifar10, idx, image_folder, load, npz

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10
LABELS = np.array([2, 0], dtype=np.uint8)


def encoded(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def written(folder: Path, images: bytes = encoded(IMAGES), labels: bytes = encoded(LABELS)) -> tuple[Path, Path]:
    paths = folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    paths[0].write_bytes(images)
    paths[1].write_bytes(labels)
    return paths


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gzip"])
def test_idx(tmp_path: Path, pack: type[bytes]) -> None:
    data = idx(*written(tmp_path, pack(encoded(IMAGES)), pack(encoded(LABELS))), mean=0.5, std=0.25)
    expected = (torch.from_numpy(IMAGES).unsqueeze(1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(data.images, expected)
    assert data.labels.tolist() == [2, 0]
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x89PNG\r\n\x1a\n", "expected 00000803"),
        (encoded(LABELS), "begins with 00000801"),
        (encoded(IMAGES)[:9], "ends inside its header"),
        (encoded(IMAGES)[:-1], "announces 24 bytes .* and holds only 23"),
        (encoded(IMAGES) + b"\0", "holds more"),
        (gzip.compress(encoded(IMAGES))[:-12], "is damaged"),
        (gzip.compress(encoded(IMAGES))[:-8] + b"\0" * 8, "is damaged"),
        (b"\x1f\x8b\x08\x00" + b"\0" * 6 + b"\xff" * 9, "is damaged"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "more than"),
        (encoded(IMAGES[:1]), "1 images and .* 2 labels"),
    ],
    ids=["empty", "png", "labels", "header", "short", "long", "cut", "sum", "gzip", "huge", "counts"],
)
def test_idx_refuses(tmp_path: Path, images: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        idx(*written(tmp_path, images))


def test_idx_reads_no_more_of_a_bomb_than_announced(tmp_path: Path) -> None:
    bomb = gzip.compress(encoded(IMAGES) + bytes(200 << 20), compresslevel=1)
    with pytest.raises(InvalidInput, match="announces 24 bytes"):
        idx(*written(tmp_path, bomb))


def test_idx_needs_a_name_for_every_label(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there are 2 classes"):
        idx(*written(tmp_path), classes=("cat", "dog"))


GREY = np.array([[[0, 51], [102, 255]]] * 2, dtype=np.uint8)
COLOUR = np.arange(2 * 2 * 5 * 3, dtype=np.uint8).reshape(2, 2, 5, 3)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (GREY, GREY[:, None] / 255),
        (GREY[..., None], GREY[:, None] / 255),
        (GREY.astype(np.float64) / 255, GREY[:, None] / 255),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2) / 255),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2) / 255),
    ],
)
@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
def test_npz(tmp_path: Path, images: np.ndarray, expected: np.ndarray, names: tuple[str, str]) -> None:
    np.savez_compressed(tmp_path / "a.npz", **{names[0]: images, names[1]: np.array([1, 0], dtype=np.int16)})
    data = npz(tmp_path / "a.npz")
    torch.testing.assert_close(data.images, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)
    assert data.labels.tolist() == [1, 0]
    assert data.labels.dtype == torch.int64


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY, "label": LABELS}, r"holds the arrays \['images', 'label'\]"),
        ({"images": GREY, "labels": np.array([Malicious(), 1], dtype=object)}, "cannot be read"),
        ({"images": GREY, "labels": LABELS[:1]}, "2 images and 1 labels"),
        ({"images": GREY, "labels": LABELS.astype(np.float32)}, "expected integers"),
        ({"images": GREY.astype(np.float32), "labels": LABELS}, r"expected floats in \[0, 1\]"),
        ({"images": GREY * np.float32("nan"), "labels": LABELS}, r"expected floats in \[0, 1\]"),
        ({"images": GREY.astype(np.int64), "labels": LABELS}, "images are int64"),
        ({"images": GREY[..., None].repeat(4, -1), "labels": LABELS}, "1 or 3 channels"),
        ({"images": GREY[0], "labels": LABELS}, "1 or 3 channels"),
    ],
)
def test_npz_refuses(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InvalidInput, match=message):
        npz(tmp_path / "a.npz")


def test_npz_refuses_other_files_and_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(InvalidInput, match=r"cannot be read as a \.npz file"):
        npz(path)
    np.savez(path, images=GREY, labels=LABELS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InvalidInput, match=r"cannot be read as a \.npz file"):
        npz(path)
    np.savez_compressed(path, images=np.zeros((50, 100, 100), np.uint8), labels=np.zeros(50, np.int64))
    monkeypatch.setattr(_npz, "_MOST_BYTES", 100_000)
    with pytest.raises(InvalidInput, match="unpacks to"):
        npz(path)


def records(labels: list[int], seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).integers(0, 256, (len(labels), 3073), dtype=np.uint8)
    made[:, 0] = labels
    return made


def test_cifar10(tmp_path: Path) -> None:
    first, second, test = records([3, 9], 1), records([0], 2), records([5], 3)
    for name, made in (("data_batch_1", first), ("data_batch_2", second), ("test_batch", test)):
        (tmp_path / f"{name}.bin").write_bytes(made.tobytes())
    train = cifar10("train", tmp_path, mean=0.0, std=1.0)
    expected = np.concatenate([first, second])[:, 1:].reshape(3, 3, 32, 32)
    torch.testing.assert_close(train.images * 255, torch.from_numpy(expected).float())
    assert train.labels.tolist() == [3, 9, 0]
    assert train.classes[3] == "cat"
    held = cifar10("test", tmp_path)
    red = torch.from_numpy(test[:, 1:1025]).float() / 255
    torch.testing.assert_close(held.images[:, 0].flatten(1), (red - 0.4914) / 0.2470)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has 0 bytes"), (b"\0" * 3072, "has 3072 bytes"), (b"\x0a" * 3073, "has the label 10")],
)
def test_cifar10_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match="binary version"):
        cifar10("test", tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        cifar10("test", tmp_path)


def photos(folder: Path, **sizes: tuple[int, int]) -> Path:
    for name, size in sizes.items():
        (folder / name[0]).mkdir(exist_ok=True)
        Image.new("RGB", size, (255, 102, 0)).save(folder / name[0] / f"{name}.png")
    return folder


def test_image_folder(tmp_path: Path) -> None:
    photos(tmp_path, b2=(4, 3), a1=(4, 3), b1=(4, 3))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = image_folder(tmp_path, mean=(0.5, 0.0, 0.0), std=(0.5, 0.4, 1.0))
    assert data.images.shape == (3, 3, 3, 4)
    torch.testing.assert_close(data.images[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert data.labels.tolist() == [0, 1, 1]
    assert data.classes == ("a", "b")
    assert data.names == ("a/a1.png", "b/b1.png", "b/b2.png") and data[data.labels == 1].names == data.names[1:]


def test_image_folder_orders_labels_by_classes(tmp_path: Path) -> None:
    photos(tmp_path, a1=(2, 2), b1=(2, 2))
    data = image_folder(tmp_path, classes=("b", "other", "a"))
    assert data.labels.tolist() == [0, 2]
    with pytest.raises(InvalidInput, match=r"subfolders \['a'\], which are no classes"):
        image_folder(tmp_path, classes=("b",))


def test_image_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.array([[0, 255, 51], [102, 3, 4]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    data = image_folder(tmp_path)
    torch.testing.assert_close(data.images * 255, torch.from_numpy(pixels).float()[None, None])
    Image.new("RGB", (3, 2)).save(tmp_path / "a" / "2.png")
    assert image_folder(tmp_path).images.shape == (2, 3, 2, 3)


def test_image_folder_brings_images_to_one_size(tmp_path: Path) -> None:
    photos(tmp_path, a1=(40, 30), a2=(10, 20))
    with pytest.raises(InvalidInput, match="pass size"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, size=8).images.shape == (2, 3, 8, 8)


def test_image_folder_cuts_out_the_middle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "a" / "1.png")
    assert torch.equal(image_folder(tmp_path, size=4).images, torch.ones(1, 1, 4, 4))


def test_image_folder_turns_photos_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (5, 2))
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / "a" / "1.jpg", exif=turned)
    assert image_folder(tmp_path).images.shape == (1, 3, 5, 2)


def test_image_folder_refuses(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="no images in its subfolders"):
        image_folder(tmp_path)
    photos(tmp_path, a1=(2, 2))
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    with pytest.raises(InvalidInput, match=r"2\.png cannot be read as an image"):
        image_folder(tmp_path)
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "a1.png").read_bytes()[:50])
    with pytest.raises(InvalidInput, match=r"2\.png cannot be read as an image"):
        image_folder(tmp_path)


def test_image_folder_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, a1=(2, 2))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"pip install \"weightpatch\[images\]\""):
        image_folder(tmp_path)


def test_load_sees_the_format(tmp_path: Path) -> None:
    kinds = {name: tmp_path / name for name in ("idx", "cifar", "folder", "empty")}
    for path in kinds.values():
        path.mkdir()
    written(kinds["idx"])
    (kinds["cifar"] / "test_batch.bin").write_bytes(records([7]).tobytes())
    photos(kinds["folder"], a1=(2, 2), b1=(2, 3))
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    assert load(kinds["idx"]).images.shape == (2, 1, 3, 4)
    assert load(kinds["idx"], mean=1.0, classes=("x", "y", "z")).classes == ("x", "y", "z")
    assert load(kinds["cifar"]).labels.tolist() == [7]
    assert load(kinds["folder"], size=2).labels.tolist() == [0, 1]
    assert load(tmp_path / "a.npz", mean=0.5, std=0.5).images.min() == -1
    for path in (kinds["empty"], tmp_path / "nothing"):
        with pytest.raises(InvalidInput, match="expected"):
            load(path)
    with pytest.raises(InvalidInput, match="data_batch"):
        load(kinds["cifar"], split="train")
    with pytest.raises(ShapeMismatch, match="do not fit"):
        load(tmp_path / "a.npz", mean=(0.1, 0.2, 0.3))
