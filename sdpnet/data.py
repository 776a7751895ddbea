"""Data sets and the order in which they are read.

Randomness is a pure function, never a state: the order of an epoch is ``permutation(seed, epoch)``, and whatever is
drawn for a sample (crop, shift, rotation …) comes from ``uniform(seed, epoch, position)``. A run can therefore be
taken up at any step, with any number of loader threads, from two integers: the epoch and the position in it.

A data set has ``classes``, ``channels``, ``image_size``, ``value_max``, ``mean``, ``std``, ``labels`` (int64 tensor)
and ``batch(indices, draws) -> uint8 (B, channels, H, W)``. ``draws`` (B, DRAWS) are uniform numbers in [0, 1), None
for evaluation.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DRAWS = 16  # uniform numbers per sample: 0-7 belong to the loader's crop, 8-15 to augment.py
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


# ---------------------------------------------------------------------------------------------------- randomness
def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64 tensors, whose products wrap modulo 2⁶⁴."""

    def shift(t: Tensor, n: int) -> Tensor:  # logical right shift
        return (t >> n) & ((1 << (64 - n)) - 1)

    x = (x ^ shift(x, 30)) * _MIX1
    x = (x ^ shift(x, 27)) * _MIX2
    return x ^ shift(x, 31)


def fold(seed: int, *words: int) -> int:
    """One 63-bit seed out of a seed and some integers; any change of any of them gives an unrelated one."""
    state = _mix(torch.tensor(_signed(seed)) + _GOLDEN)
    for word in words:
        state = _mix(state + _mix(torch.tensor(_signed(word)) + _GOLDEN))
    return int(state) & ((1 << 63) - 1)


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of one epoch: int64 (length,), a pure function of its arguments."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(fold(seed, 1, epoch)))


def uniform(seed: int, epoch: int, positions: Tensor, draws: int = DRAWS) -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, draws): row i depends on (seed, epoch, positions[i]) only.

    positions: int64 (B,), the places of the samples in the epoch. Multiples of 2⁻²⁴.
    """
    rows = _mix(positions * _GOLDEN + _signed(fold(seed, 2, epoch)))
    columns = torch.arange(1, draws + 1, device=positions.device) * _GOLDEN
    bits = _mix(rows[:, None] + columns[None, :])
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


# ---------------------------------------------------------------------------------------------------- data sets
class DataError(ValueError):
    """A data set is missing, corrupt or not what was asked for; the message names the file."""


class Digits:
    """The 1,797 handwritten digits of 8×8 pixels that come with the package (source and licence: digits/README.md).

    ``held_out=True``: the 360 samples whose index is a multiple of 5; ``False``: the other 1,437.
    """

    classes, channels, image_size, value_max = 10, 1, 8, 16
    class_names = tuple("0123456789")
    mean, std = (0.3052,), (0.3763,)  # of the 1,437 training samples, in units of value_max

    def __init__(self, held_out: bool, path: str | Path | None = None) -> None:
        self.path = Path(path) if path else Path(str(resources.files("sdpnet"))) / "digits" / "digits.csv.gz"
        if not self.path.is_file():
            raise DataError(f"digits: file not found: {self.path}")
        try:
            lines = gzip.decompress(self.path.read_bytes()).decode().split()
            rows = np.array([line.split(",") for line in lines], dtype=np.float64)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(f"digits: {self.path} is corrupt: {error}") from error
        if rows.shape != (1797, 65) or rows.min() < 0 or rows[:, :64].max() > 16 or rows[:, 64].max() > 9:
            raise DataError(f"digits: {self.path} is corrupt: {rows.shape} values, wanted 1797 × (64 pixels, class)")
        table = torch.from_numpy(rows.astype(np.uint8))
        mine = (torch.arange(len(table)) % 5 == 0) == held_out
        self.images = table[mine, :64].reshape(-1, 1, 8, 8).contiguous()
        self.labels = table[mine, 64].long()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, draws: Tensor | None = None) -> Tensor:
        return self.images[indices]


class ImageFolder:
    """Images in ``root/<class name>/*.jpg|png|…``, decoded when they are asked for, by Pillow in threads.

    In training (``draws`` given) a random part of the image is cut out (area ``crop_scale``, aspect ratio 3/4 … 4/3)
    and resized to image_size; for evaluation the shorter side is resized to image_size / 0.875 and the middle is cut
    out. Names that begin with a dot (.ipynb_checkpoints, ._0.jpg) are no classes and no images. Raises DataError naming
    the folder or file that is missing or unreadable, ImportError without Pillow.
    """

    channels, value_max = 3, 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the customary ImageNet figures

    def __init__(
        self, root: str | Path, image_size: int, crop_scale: tuple[float, float] = (0.08, 1.0), threads: int = 1
    ) -> None:
        _pillow()
        self.root, self.image_size, self.crop_scale = Path(root), image_size, crop_scale
        if not self.root.is_dir():
            raise DataError(f"data.path: folder not found: {self.root}")
        self.class_names = tuple(sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != "."))
        self.files = [
            (file, label)
            for label, name in enumerate(self.class_names)
            for file in sorted((self.root / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES and not self._hidden(file)
        ]
        if not self.files:
            raise DataError(f"data.path: no images in {self.root} (wanted {self.root}/<class>/<name>.jpg|png|…)")
        self.classes = len(self.class_names)
        self.labels = torch.tensor([label for _, label in self.files])
        self._threads = ThreadPoolExecutor(threads)

    def _hidden(self, file: Path) -> bool:
        """Whether its name, or that of a folder it is in, begins with a dot."""
        return any(part.startswith(".") for part in file.relative_to(self.root).parts)

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor, draws: Tensor | None = None) -> Tensor:
        rows = [None] * len(indices) if draws is None else draws.tolist()
        return torch.stack(list(self._threads.map(self._load, indices.tolist(), rows)))

    def _load(self, index: int, draws: list[float] | None) -> Tensor:
        image_module, path, size = _pillow(), self.files[index][0], self.image_size
        try:
            with image_module.open(path) as file:
                if file.mode[0] in "IF":  # Pillow would clip them: 16-bit greys come out white, floats black
                    raise ValueError(f"its pixels have more than 8 bits (Pillow's mode {file.mode}); convert it first")
                image = file.convert("RGB")
        except Exception as error:  # what a decoder raises over a broken file is up to the decoder
            raise DataError(f"cannot read image {path}: {error}") from error
        box = _middle(*image.size) if draws is None else _random_box(*image.size, self.crop_scale, draws)
        # box= resizes straight from the original: no second resampling
        image = image.resize((size, size), image_module.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_classes(train: Digits | ImageFolder, held_out: Digits | ImageFolder, path: str | None) -> None:
    """Raises DataError when the two sets have different classes, or one that there is nothing to learn from."""
    different = sorted(set(train.class_names) ^ set(held_out.class_names))
    if different:
        raise DataError(f"data.path: train/ and val/ in {path} have different classes: {_few(different)}")
    counts = torch.bincount(train.labels, minlength=train.classes).tolist()
    empty = [name for name, count in zip(train.class_names, counts, strict=True) if not count]
    if empty:
        raise DataError(f"data.path: no images in these classes of {path}/train: {_few(empty)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "data.source=folder decodes images with Pillow, which is not installed: pip install pillow"
        ) from error
    return Image


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = 0.875 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, scale: tuple[float, float], draws: list[float]) -> tuple[float, ...]:
    area = width * height * (scale[0] + draws[0] * (scale[1] - scale[0]))
    ratio = (3 / 4) * (16 / 9) ** draws[1]  # log-uniform between 3/4 and 4/3
    w, h = min((area * ratio) ** 0.5, width), min((area / ratio) ** 0.5, height)
    left, top = draws[2] * (width - w), draws[3] * (height - h)
    return left, top, left + w, top + h


# ---------------------------------------------------------------------------------------------------- order
@dataclass(frozen=True)
class Batch:
    """Samples ``first`` … of one epoch. images uint8 (B, C, H, W), labels int64 (B,), draws float32 (B, DRAWS)."""

    first: int
    images: Tensor
    labels: Tensor
    draws: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class TrainOrder:
    """Reads a data set in the order permutation(seed, epoch), from any position on.

    The last batch of an epoch is short when the batch size does not divide the data set: every sample is seen once.
    One batch is read ahead in a thread, so that decoding and training overlap.
    """

    def __init__(self, dataset: Digits | ImageFolder, batch_size: int, seed: int) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.steps = -(-len(dataset) // batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order = permutation(self.seed, epoch, len(self.dataset))

        def read(step: int) -> Batch:
            start = step * self.batch_size
            indices = order[start : start + self.batch_size]
            draws = uniform(self.seed, epoch, torch.arange(start, start + len(indices)))
            return Batch(start, self.dataset.batch(indices, draws), self.dataset.labels[indices], draws)

        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(read, first_step) if first_step < self.steps else None
            for step in range(first_step, self.steps):
                batch = pending.result()
                pending = ahead.submit(read, step + 1) if step + 1 < self.steps else None
                yield batch


def evaluation_batches(dataset: Digits | ImageFolder, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 images, labels) of the whole data set in its own order, every sample exactly once."""
    for indices in torch.arange(len(dataset)).split(batch_size):
        yield dataset.batch(indices), dataset.labels[indices]
