"""Data sets, the seekable order, augmentation."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch

from sdpnet.augment import affine, affine_matrices, augment, normalize
from sdpnet.data import (
    DataError,
    Digits,
    ImageFolder,
    TrainOrder,
    check_classes,
    evaluation_batches,
    fold,
    permutation,
    uniform,
)


def test_digits_are_the_published_ones():
    held_out, train = Digits(held_out=True), Digits(held_out=False)
    assert (len(held_out), len(train)) == (360, 1437)
    assert held_out.labels.bincount().tolist() == [42, 28, 26, 48, 38, 39, 30, 26, 36, 47]
    assert train.images.max() == 16 and train.images.shape == (1437, 1, 8, 8)
    digest = hashlib.sha256(train.path.read_bytes()).hexdigest()
    assert digest in (train.path.parent / "README.md").read_text()
    scaled = train.images.double() / 16
    assert (scaled.mean().item(), scaled.std().item()) == pytest.approx((Digits.mean[0], Digits.std[0]), abs=1e-4)


@pytest.mark.parametrize("content", [None, b"", b"not gzip"])
def test_missing_or_corrupt_digits_are_named(tmp_path, content):
    path = tmp_path / "mine.csv.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"mine\.csv\.gz"):
        Digits(held_out=True, path=path)


def test_truncated_digits_are_named(tmp_path):
    path = tmp_path / "mine.csv.gz"
    path.write_bytes(Digits(held_out=True).path.read_bytes()[:30000])
    with pytest.raises(DataError, match=r"mine\.csv\.gz is corrupt"):
        Digits(held_out=True, path=path)


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    a = permutation(1, 2, 1000)
    assert torch.equal(a.sort().values, torch.arange(1000))
    assert torch.equal(a, permutation(1, 2, 1000))
    assert not torch.equal(a, permutation(1, 3, 1000)) and not torch.equal(a, permutation(2, 2, 1000))
    assert fold(0, 1, 2) != fold(0, 2, 1)


def test_draws_depend_on_seed_epoch_and_position_only():
    whole = uniform(5, 3, torch.arange(100))
    assert torch.equal(whole[40:60], uniform(5, 3, torch.arange(40, 60)))
    assert whole.min() >= 0 and whole.max() < 1
    assert not torch.equal(whole, uniform(5, 4, torch.arange(100))) and not torch.equal(
        whole, uniform(6, 3, torch.arange(100))
    )


def test_draws_are_uniform_and_independent():
    u = uniform(0, 0, torch.arange(20000)).double()
    assert u.mean(dim=0) == pytest.approx(np.full(16, 0.5), abs=0.01) and u.var(dim=0) == pytest.approx(
        np.full(16, 1 / 12), abs=0.003
    )
    correlation = torch.corrcoef(torch.cat([u.T, u.roll(1, 0).T[:1]]))
    assert (correlation - torch.eye(17)).abs().max() < 0.03


def test_any_position_can_be_sought():
    data = Digits(held_out=False)
    order = TrainOrder(data, 100, seed=7)
    whole = list(order.epoch(4))
    assert [len(b) for b in whole] == [100] * 14 + [37]
    assert sum(b.labels.sum() for b in whole) == data.labels.sum()
    for sought, wanted in zip(order.epoch(4, 12), whole[12:], strict=True):
        assert sought.first == wanted.first
        for name in ("images", "labels", "draws"):
            assert torch.equal(getattr(sought, name), getattr(wanted, name))
    assert list(order.epoch(4, 15)) == []


def test_evaluation_sees_each_sample_once():
    data = Digits(held_out=True)
    labels = torch.cat([labels for _, labels in evaluation_batches(data, 77)])
    assert torch.equal(labels, data.labels)


def test_augmentation_is_per_sample_and_of_whole_batches():
    images, draws = Digits(held_out=False).images[:1].expand(8, 1, 8, 8), uniform(0, 0, torch.arange(8))
    amounts = {"shift": 0.2, "rotate": 20, "scale": 0.2, "shear": 0.1, "flip": True}
    out = augment(images, draws, **amounts)
    assert out.shape == (8, 1, 8, 8)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 8
    assert torch.equal(out[3:5], augment(images[3:5], draws[3:5], **amounts))
    assert augment(images, draws, shift=0.0, flip=False) is images


def test_affine_moves_as_it_says():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 1, 2] = 1.0
    draws = torch.full((1, 16), 0.5)
    assert torch.allclose(
        affine(image, affine_matrices(draws, shift=0.3, rotate=90, scale=1, shear=1)), image, atol=1e-6
    )
    draws[0, 8] = 1.0  # the input cell lies 0.2 of the side to the right: content moves one cell to the left
    assert torch.allclose(affine(image, affine_matrices(draws, shift=0.2)), image.roll(-1, 3), atol=1e-5)
    draws[0, 8], draws[0, 11] = 0.5, 1.0  # a right angle
    assert torch.allclose(affine(image, affine_matrices(draws, rotate=90)), torch.rot90(image, 1, (2, 3)), atol=1e-5)
    draws[0, 11], draws[0, 13] = 0.5, 0.0
    image[0, 0, 1, 0] = 3.0
    assert torch.allclose(affine(image, affine_matrices(draws, flip=True)), image.flip(3), atol=1e-5)


def test_normalize():
    images = torch.tensor([0, 16], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert normalize(images, 16, (0.25,), (0.5,)).flatten().tolist() == [-0.5, 1.5]


# ---------------------------------------------------------------------------------------------------- image folder
@pytest.fixture
def folder(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.random.default_rng(label * 2 + i).integers(0, 256, (40 + 10 * i, 60, 3), dtype=np.uint8)
            image_module.fromarray(pixels).save(tmp_path / name / f"{i}.{'png' if i else 'jpg'}")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


def test_image_folder(folder):
    data = ImageFolder(folder, 24, threads=2)
    assert (len(data), data.classes, data.class_names) == (6, 3, ("ant", "bee", "cat"))
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    images = data.batch(torch.tensor([5, 0]))
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 24, 24)
    draws = uniform(0, 0, torch.arange(2))
    assert torch.equal(data.batch(torch.tensor([5, 0]), draws)[1:], data.batch(torch.tensor([0]), draws[1:]))
    assert not torch.equal(data.batch(torch.tensor([5, 0]), draws), images)


def test_unreadable_image_is_named(folder):
    (folder / "bee" / "0.jpg").write_bytes(b"\xff\xd8 cut short")
    with pytest.raises(DataError, match=r"bee.0\.jpg"):
        ImageFolder(folder, 24).batch(torch.arange(6))


@pytest.mark.parametrize("name, pixels", [("deep.png", np.uint16), ("real.tif", np.float32)])
def test_pixels_of_more_than_8_bits_are_refused_instead_of_clipped(folder, name, pixels):
    image_module = pytest.importorskip("PIL.Image")
    image_module.fromarray(np.full((40, 40), 300, dtype=pixels)).save(folder / "bee" / name)
    with pytest.raises(DataError, match=rf"{name}.*more than 8 bits"):
        ImageFolder(folder, 24).batch(torch.arange(7))


def test_an_image_too_large_to_decode_is_named(folder, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("PIL.Image"), "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"ant.0\.jpg.*exceeds limit"):
        ImageFolder(folder, 24).batch(torch.arange(6))


def test_hidden_names_are_neither_classes_nor_images(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "bee" / "._0.jpg").write_bytes(b"a Mac's notes on 0.jpg")
    (folder / "bee" / ".ipynb_checkpoints").mkdir()
    (folder / "bee" / ".ipynb_checkpoints" / "0-checkpoint.jpg").write_bytes((folder / "bee" / "0.jpg").read_bytes())
    data = ImageFolder(folder, 24)
    assert data.class_names == ("ant", "bee", "cat") and len(data) == 6


def test_classes_that_differ_or_are_empty_are_named(folder, tmp_path_factory):
    train, other = ImageFolder(folder, 24), tmp_path_factory.mktemp("val")
    check_classes(train, train, "data")
    for name in ("ant", "bee", "dog"):
        (other / name).mkdir()
    (other / "ant" / "0.jpg").write_bytes((folder / "ant" / "0.jpg").read_bytes())
    with pytest.raises(DataError, match="different classes: cat, dog"):
        check_classes(train, ImageFolder(other, 24), "data")
    (other / "dog").rename(other / "cat")
    held_out = ImageFolder(other, 24)
    check_classes(train, held_out, "data")  # nothing to ask about a class is no mistake
    with pytest.raises(DataError, match="no images in these classes of data/train: bee, cat"):
        check_classes(held_out, train, "data")


def test_missing_or_empty_folder_is_named(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere", 24)
    with pytest.raises(DataError, match="no images"):
        ImageFolder(tmp_path, 24)


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        ImageFolder(tmp_path, 24)
