"""How elementwise kernels walk several tensors of one shape and any strides: merged dimensions, four at a time."""

import itertools
from dataclasses import dataclass

from torch import Tensor

KERNEL_DIMENSIONS = 4


@dataclass(frozen=True)
class Tiling:
    """``sizes`` (first, second, rows, columns) and, per tensor, as many ``strides``.

    Columns are the first tensor's fastest dimension, rows the one in which another tensor is fastest, or else the next.
    ``offsets``, per launch and tensor, walk what dimensions are left: just 0 for up to four merged dimensions.
    """

    dense: bool
    sizes: tuple[int, int, int, int]
    strides: tuple[tuple[int, int, int, int], ...]
    offsets: tuple[tuple[int, ...], ...]


def merged(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride per tensor) of the dimensions in the first tensor's memory order, slowest first, neighbours merged
    where every tensor allows; dimensions of size 1 are left out."""
    dimensions = [(size, tuple(s[d] for s in strides)) for d, size in enumerate(shape) if size != 1]
    dimensions.sort(key=lambda d: d[1], reverse=True)
    out: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in dimensions:
        if out and all(outer == size * inner for outer, inner in zip(out[-1][1], steps, strict=True)):
            out[-1] = (out[-1][0] * size, steps)
        else:
            out.append((size, steps))
    return out


def tiling(tensors: list[Tensor]) -> Tiling:
    """The walk over ``tensors``, all of one shape; the first is the output."""
    dimensions = merged(tuple(tensors[0].shape), [t.stride() for t in tensors])
    count = len(tensors)
    one = (1, (0,) * count)
    dense = not dimensions or (len(dimensions) == 1 and set(dimensions[0][1]) == {1})
    columns = dimensions.pop() if dimensions else one
    rows = one
    if dimensions:  # where an input's stride is smallest, if that beats its stride along the columns
        best = min(
            range(len(dimensions)), key=lambda d: min(s or columns[1][i] for i, s in enumerate(dimensions[d][1]))
        )
        crosses = any(0 < s < c for s, c in zip(dimensions[best][1], columns[1], strict=True))
        rows = dimensions.pop(best if crosses else -1)
    # The kernel takes two more; the smallest of the rest are walked by separate launches.
    dimensions.sort(key=lambda d: d[0])
    walked, kept = dimensions[: max(0, len(dimensions) - 2)], dimensions[-2:]
    kept = [one] * (2 - len(kept)) + kept
    offsets = tuple(
        tuple(sum(i * steps[t] for i, (_, steps) in zip(index, walked, strict=True)) for t in range(count))
        for index in itertools.product(*(range(size) for size, _ in walked))
    )
    ordered = [*kept, rows, columns]
    return Tiling(
        dense,
        tuple(size for size, _ in ordered),
        tuple(tuple(steps[t] for _, steps in ordered) for t in range(count)),
        offsets,
    )
