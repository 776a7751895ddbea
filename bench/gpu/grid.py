"""Which problems the correctness part solves: sizes on both sides of every border of a kernel, layouts, gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

from sdp_kernels import ACTIVATIONS

from .subjects import DTYPES, Problem

FEW_CHANNELS = (1, 2, 3, 7, 8, 16, 17, 33, 64, 96, 250, 256, 384, 512, 768)
CHANNELS = (*FEW_CHANNELS, 1000, 1024, 1025, 1536, 2048, 2049, 3072, 4096, 4097)
MANY_CHANNELS = (8191, 8192)
PIXELS = ((7, 7), (1, 1), (16, 16), (5, 13), (14, 14), (1, 8), (9, 1))
PICTURES = ("contiguous", "channels_last")
ODD = ("gaps", "slice", "swapped", "batch last", "image rows")
GRADS = ("expanded", "expanded per sample", "swapped", "gaps")


def _kelu(dtype: str) -> list[Problem]:
    def p(*shape: int, **more) -> Problem:
        return Problem("kelu", shape, dtype, **more)

    found = [p(n) for n in (1, 7, 8, 255, 4096, 4097, 65537, 1_000_003)]
    found += [p(4, 96, h, w, layout=layout) for layout in PICTURES for h, w in ((1, 1), (7, 7), (16, 16))]
    found += [p(3, 40, 9, 11, layout=layout) for layout in ODD] + [p(3, 21, 40, layout=n) for n in ("gaps", "swapped")]
    found += [p(3, 40, 9, 11, layout=layout, grad=grad) for layout in PICTURES for grad in GRADS]
    found += [p(64, 768, 16, 16), p(0, 8, 4, 4), p(3, 0, 4)]
    return found


def _layer_norm(dtype: str) -> list[Problem]:
    def p(*shape: int, **more) -> Problem:
        return Problem("layer_norm_2d", shape, dtype, **more)

    sizes = cycle(PIXELS)
    found = [p(3, c, *next(sizes), layout=layout) for c in CHANNELS for layout in PICTURES]
    found += [p(2, c, *size, layout=layout) for c in MANY_CHANNELS for size in ((2, 3), (4, 4)) for layout in PICTURES]
    found += [p(3, c, h, h, layout=layout) for c in (96, 768) for h in (1, 7) for layout in PICTURES]
    found += [p(2, 21, c, layout="tokens") for c in (1, 24, 768, 1025, 8192)]
    found += [p(3, 21, 384, layout="tokens", registers=r, residual=e) for r in (0, 5, 21) for e in (False, True)]
    found += [p(3, 96, 7, 7, layout=layout, residual=True) for layout in (*PICTURES, "image rows")]
    found += [p(2, 2304, 5, 3, layout=layout, residual=True) for layout in PICTURES]
    found += [p(3, 40, 9, 11, layout=layout) for layout in ODD] + [p(3, 21, 40, layout=n) for n in ("gaps", "swapped")]
    found += [p(3, 40, 9, 11, layout=layout, grad=grad) for layout in PICTURES for grad in GRADS]
    found += [p(3, 21, 40, layout="tokens", registers=5, grad=grad) for grad in GRADS]
    found += [p(0, 8, 4, 4), p(0, 9, 8, layout="tokens"), p(2, 8, 0, 4)]
    found += [p(32, 768, 16, 16), p(32, 261, 768, layout="tokens")]
    if dtype != "float32":
        found += [p(3, 96, 7, 7, layout=layout, wide_parameters=True) for layout in PICTURES]
    return list(dict.fromkeys(found))


def _convolution(dtype: str) -> list[Problem]:
    def p(*shape: int, **more) -> Problem:
        return Problem("depthwise_conv2d", shape, dtype, **{"kernel": 7} | more)

    small, sizes = ((40, 7, 7), (17, 16, 16)), ((1, 1), (14, 14), (5, 23))
    found = [p(3, *shape, layout=n, kernel=k) for k in (3, 5, 7, 9) for shape in small for n in PICTURES]
    found += [p(3, c, *size, layout=n) for c in (1, 8, 96, 250) for size in sizes for n in PICTURES]
    found += [p(3, 16, 9, 11, layout=layout) for layout in ODD]
    found += [p(3, 16, 9, 11, layout=layout, grad=grad) for layout in PICTURES for grad in GRADS]
    found += [
        p(3, r + 20, c, layout="tokens", registers=r, kernel=k, normed=normed)
        for k, c in ((3, 48), (5, 65), (7, 48), (9, 33))
        for r in (0, 5)
        for normed in (False, True)
    ]
    found += [p(3, 40, 9, 11, layout=n, kernel=k, normed=True) for k in (3, 7) for n in (*PICTURES, "image rows")]
    found += [p(3, 25, 40, layout="tokens", registers=5, grad=grad) for grad in GRADS]
    found += [p(16, 261, 768, layout="tokens", registers=5, normed=normed) for normed in (False, True)]
    found += [p(0, 8, 4, 4), p(16, 384, 16, 16), p(16, 384, 16, 16, layout="channels_last")]
    return list(dict.fromkeys(found))


EPILOGUES = ("kelu", "gelu scale residual", "scale residual", "kelu scale residual masks", "masks")


def _linear(dtype: str) -> list[Problem]:
    def p(*shape: int, **more) -> Problem:
        return Problem("linear", shape, dtype, **more)

    found = [p(3, 21, 40, epilogue=name) for name in ACTIVATIONS]
    found += [p(3, 21, c, registers=r, epilogue=e) for c in (40, 33) for r in (0, 5) for e in EPILOGUES]
    found += [p(3, 21, 40, layout=layout, epilogue=EPILOGUES[1]) for layout in ("gaps", "slice", "swapped")]
    found += [p(3, 21, c, grad=g, epilogue=e) for c in (40, 33) for g in GRADS for e in EPILOGUES[:2]]
    found += [p(3, 8, 7, 7, epilogue=EPILOGUES[1]), p(5, 3, 1, 1, epilogue="gelu"), p(4, 96, epilogue="kelu scale")]
    found += [p(8, 261, c, registers=5, epilogue=e) for c in (384, 768) for e in EPILOGUES]
    own = [p(3, 21, c, registers=r, epilogue=e, own_gemm=True) for c in (40, 33) for r in (0, 5) for e in EPILOGUES]
    own += [p(3, 21, 40, layout=n, epilogue=EPILOGUES[1], own_gemm=True) for n in ("gaps", "slice", "swapped")]
    found += [*own, *(p(8, 261, 768, registers=5, epilogue=e, own_gemm=True) for e in EPILOGUES)]
    found += [p(0, 9, 8, epilogue="gelu"), p(2, 0, 8, epilogue="gelu")]
    if dtype != "float32":
        found += [p(3, 21, 40, registers=5, wide_parameters=True, epilogue=e) for e in EPILOGUES[1:3]]
    return list(dict.fromkeys(found))


def _attention(dtype: str) -> list[Problem]:
    def p(*shape: int, d: int = 64, **more) -> Problem:
        return Problem("register_attention", shape, dtype, kernel=d, **more)

    found = [p(2, 21, 2 * d, d=d) for d in (8, 24, 32, 40, 64, 72, 80, 96, 128)]
    found += [p(2, t, 128, registers=min(t, 5)) for t in (1, 16, 63, 64, 65, 128, 129, 196, 261, 272, 513, 1025)]
    limits = ("image_to_image", "registers_to_registers", "separate")
    blocks = [(d, t, r) for d in (64, 96) for t, r in ((70, 5), (140, 70))]
    found += [p(2, t, 2 * d, d=d, registers=r, epilogue=e) for d, t, r in blocks for e in limits]
    found += [p(2, t, 2 * d, d=d, epilogue="all masks") for d in (64, 96) for t in (63, 64)]
    found += [p(2, 21, 96, d=48, grad=g) for g in GRADS] + [p(2, 21, 96, d=48, layout=n) for n in ("gaps", "slice")]
    found += [p(16, 261, 768, registers=5), p(16, 261, 768, d=96, registers=5), p(0, 9, 64)]
    if dtype != "float32":
        found += [p(2, 70, 192, d=96, registers=5, wide_parameters=True)]
        lengths = (1, 16, 47, 48, 49, 64, 65, 96, 129, 197, 201, 257, 261, 272)
        found += [p(2, t, 2 * d, d=d, warpgroups=True) for d in (8, 32, 56, 64, 88, 96) for t in lengths]
        found += [p(16, 261, 768, d=d, registers=5, warpgroups=True) for d in (64, 96)]
        found += [p(2, 70, 192, d=96, wide_parameters=True, warpgroups=True)]
    return list(dict.fromkeys(found))


_GRIDS = {"kelu": _kelu, "layer_norm_2d": _layer_norm, "depthwise_conv2d": _convolution, "linear": _linear}
_GRIDS |= {"register_attention": _attention}


def problems(operator: str, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Problem]:
    """All of an operator's, dtype by dtype."""
    return [problem for dtype in dtypes for problem in _GRIDS[operator](dtype)]


def tiny(operator: str) -> list[Problem]:
    """A few that take milliseconds even interpreted."""
    shapes = {
        "kelu": [
            Problem("kelu", (2, 5, 3, 4), "bfloat16", "channels_last"),
            Problem("kelu", (2, 5, 3, 4), "float32", "gaps", "expanded"),
        ],
        "layer_norm_2d": [
            Problem("layer_norm_2d", (2, 5, 3, 4), "float32", "contiguous", "swapped"),
            Problem("layer_norm_2d", (2, 6, 8), "bfloat16", "tokens", registers=2, residual=True),
            Problem("layer_norm_2d", (0, 8, 2, 2)),
        ],
        "depthwise_conv2d": [
            Problem("depthwise_conv2d", (2, 5, 4, 4), kernel=3),
            Problem("depthwise_conv2d", (2, 6, 5), "bfloat16", "tokens", registers=2, kernel=3, normed=True),
        ],
        "linear": [
            Problem("linear", (2, 6, 8), "bfloat16", registers=2, epilogue="kelu scale residual masks"),
            Problem("linear", (2, 3, 5), "float32", grad="swapped", epilogue="gelu"),
            Problem("linear", (2, 6, 8), "bfloat16", registers=2, epilogue="gelu scale residual", own_gemm=True),
        ],
    }
    shapes["register_attention"] = [
        Problem("register_attention", (2, 6, 16), "bfloat16", registers=2, kernel=8, epilogue="separate masks"),
        Problem("register_attention", (2, 5, 16), "float32", grad="swapped", kernel=16),
    ]
    return shapes[operator]


def repeatable(operator: str, rehearsal: bool) -> list[Problem]:
    """For determinism, torch.compile and graphs: a batch of several samples, in the layouts that training uses."""
    kernel = {"kernel": 3 if rehearsal else 7} if operator == "depthwise_conv2d" else {}
    if operator == "linear":
        shape, dtype = ((3, 6, 8), "float32") if rehearsal else ((8, 261, 384), "bfloat16")
        found = [Problem(operator, shape, dtype, registers=2, epilogue=e) for e in EPILOGUES[:2]]
        return [*found, *(replace(p, own_gemm=True) for p in found[1:] if not rehearsal)]
    if operator == "register_attention":
        shape, dtype = ((3, 6, 16), "float32") if rehearsal else ((8, 261, 768), "bfloat16")
        found = [Problem(operator, shape, dtype, registers=2, kernel=d) for d in ((8,) if rehearsal else (64, 96))]
        return [*found, *(replace(p, warpgroups=True) for p in found if not rehearsal)]
    if rehearsal:
        return [Problem(operator, (3, 8, 4, 4), "float32", **kernel)]
    found = [Problem(operator, (5, 96, 7, 7), "float32", **kernel)]
    found += [Problem(operator, (8, 384, 16, 16), "bfloat16", layout, **kernel) for layout in PICTURES]
    if operator == "layer_norm_2d":
        found += [Problem(operator, (2, 2304, 5, 4), "bfloat16", layout) for layout in PICTURES]
        found += [Problem(operator, (8, 261, 384), "bfloat16", "tokens", registers=5, residual=True)]
    if operator == "depthwise_conv2d":
        found += [Problem(operator, (8, 261, 384), "bfloat16", "tokens", registers=5, kernel=7, normed=True)]
    return found
