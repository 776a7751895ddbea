"""Philox4x32-10 in plain PyTorch: dropout and drop-path masks as a pure function of where they are used.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants as in Random123.
Key = the 64-bit seed. Counter = (position // 4, sample, step, layer · 4 + stream); word ``position % 4`` of the block.
"""

import torch
from torch import Tensor

DROPOUT, DROP_PATH, ATTENTION = 0, 1, 2
"""Streams: what a mask is for. One operator call may draw from several with the same ``layer``."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 × 32 bit product; int64 wraps modulo 2⁶⁴, so its bits are the unsigned product's."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds on int64 tensors that hold 32-bit words (broadcast against each other); returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(rng: Tensor, layer: int, stream: int, samples: int, positions: int) -> Tensor:
    """32 random bits for each (sample, position): int64 (samples, positions), values in [0, 2³²).

    ``rng`` is int64 (seed, step, first_sample) on the device where the words are wanted.
    """
    seed, step, first_sample = rng.unbind()
    block = torch.arange((positions + 3) // 4, device=rng.device)
    sample = (torch.arange(samples, device=rng.device) + first_sample)[:, None] & _MASK
    place = torch.full_like(step, layer * 4 + stream)
    words = philox((block, sample, step & _MASK, place), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :positions]


def keep_mask(rng: Tensor, layer: int, stream: int, samples: int, positions: int, rate: float, dtype) -> Tensor:
    """(samples, positions) of 0 (probability ``rate``) and 1 / (1 − rate), so that the mean is 1."""
    threshold = min(round(rate * 2**32), _MASK)  # a rate next to 1 must not round to a word that no draw reaches
    words = random_words(rng, layer, stream, samples, positions)
    return (words >= threshold).to(dtype) * (1 / (1 - rate))


def dropout(x: Tensor, rate: float, rng: Tensor, layer: int, stream: int = DROPOUT) -> Tensor:
    """x (B, …) with each element kept or dropped on its own; ``position`` counts row-major within the sample."""
    mask = keep_mask(rng, layer, stream, x.shape[0], x[0:1].numel(), rate, torch.float32)
    return (x * mask.view(x.shape)).to(x.dtype)


def drop_path_mask(rng: Tensor, rate: float, layer: int, samples: int, branch: int = 0) -> Tensor:
    """(samples,) fp32 of 0 and 1 / (1 − rate): whole samples dropped from residual branch number ``branch``."""
    return keep_mask(rng, layer, DROP_PATH, samples, branch + 1, rate, torch.float32)[:, branch].contiguous()
