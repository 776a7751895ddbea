"""The model family: ``create_model(name, **overrides)`` and ``list_models()``.

The original's size table gives blocks, patch, kernel and dim. Its parameter counts cannot be reached from those
columns with the original's own block (2 ConvMLPs, ratios 4), so conv_blocks, the ratios and the head are chosen to come
near:

============ ====== ===== ====== === =========== ========== ========= ====== =========== ==================
name         blocks patch kernel dim conv_blocks conv_ratio ffn_ratio head   the table's here (1000 classes)
============ ====== ===== ====== === =========== ========== ========= ====== =========== ==================
sdpnet_xxs   7      16    7      128 3           4          4         tanh   55 M        6.1 M
sdpnet_s     12     16    7      512 3           2          2         simple 76 M        76.4 M
sdpnet_m     12     16    7      768 1           1          2         tanh   86 M        85.5 M
sdpnet_l     12     16    7      768 1           1.625      1.5       simple 86 M        85.7 M
sdpnet_xl    17     14    7      768 1           1.25       1         simple 101 M       100.8 M
============ ====== ===== ====== === =========== ========== ========= ====== =========== ==================

xxs is as near as 3 ConvMLPs and ratios of 4 allow: 55 M don't fit into 7 blocks of dim 128. The table's rows m and l
are the same; here l has more of its parameters in the ConvMLPs. ``sdpnet_xl_bench`` is the model of the speed figures
(116.0 M parameters, 181 GFLOP per image forward + backward), ``sdpnet_digits`` the small one for the digits in the
package.
"""

from __future__ import annotations

from typing import Any

from . import checks
from .config import SdPNetConfig
from .files import load_model, save_model
from .sdpnet import SdPNet

__all__ = [
    "SdPNet",
    "SdPNetConfig",
    "config_class",
    "create_model",
    "list_models",
    "load_model",
    "model_config",
    "save_model",
]

_CONFIGS: dict[str, SdPNetConfig] = {}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    return sorted(_CONFIGS)


def config_class(name: str) -> type[SdPNetConfig]:
    """The dataclass whose fields are the options of the model called ``name``; ValueError for an unknown name."""
    return type(_named(name))


def _named(name: str) -> SdPNetConfig:
    if name not in _CONFIGS:
        raise ValueError(checks.unknown_name("model", name, _CONFIGS))
    return _CONFIGS[name]


def model_config(name: str, **overrides: Any) -> SdPNetConfig:
    """The options behind a name, with some overridden.

    :raises ValueError: for an unknown name, with the nearest right one.
    :raises TypeError: for an unknown option, with the nearest right one.
    """
    return _named(name).replace(**overrides)


def create_model(name: str, *, num_classes: int | None = None, fused: bool = False, **overrides: Any) -> SdPNet:
    """A freshly initialised model.

    :param name: one of :func:`list_models`.
    :param num_classes: width of the logits; None keeps the name's own (1000, digits 10).
    :param fused: switches kernels only; see :meth:`SdPNet.set_fused`.
    :param overrides: options of :class:`SdPNetConfig`.
    :raises ValueError: unknown name, or an option out of range.
    :raises TypeError: unknown option, or one of a wrong type.
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return SdPNet(model_config(name, **overrides), fused=fused)


_CONFIGS.update(
    sdpnet_xxs=SdPNetConfig(
        blocks=7, patch_size=16, kernel_size=7, dim=128, heads=4, conv_blocks=3, conv_ratio=4, ffn_ratio=4, head="tanh"
    ),
    sdpnet_s=SdPNetConfig(
        blocks=12, patch_size=16, kernel_size=7, dim=512, heads=8, conv_blocks=3, conv_ratio=2, ffn_ratio=2,
        head="simple",
    ),
    sdpnet_m=SdPNetConfig(
        blocks=12, patch_size=16, kernel_size=7, dim=768, heads=8, conv_blocks=1, conv_ratio=1, ffn_ratio=2, head="tanh"
    ),
    sdpnet_l=SdPNetConfig(
        blocks=12, patch_size=16, kernel_size=7, dim=768, heads=8, conv_blocks=1, conv_ratio=1.625, ffn_ratio=1.5,
        head="simple",
    ),
    sdpnet_xl=SdPNetConfig(
        blocks=17, patch_size=14, kernel_size=7, dim=768, heads=8, conv_blocks=1, conv_ratio=1.25, ffn_ratio=1,
        head="simple",
    ),
    sdpnet_xl_bench=SdPNetConfig(
        blocks=6, patch_size=14, kernel_size=7, dim=768, heads=8, conv_blocks=2, conv_ratio=4, ffn_ratio=4, head="tanh",
        registers=5, dropout=0.0,
    ),
    # 1,797 handwritten digits, 8×8 pixels in one channel. Nothing is dropped: augmentation regularises so small a set.
    sdpnet_digits=SdPNetConfig(
        num_classes=10, in_channels=1, image_size=8, blocks=2, patch_size=2, kernel_size=3, dim=64, heads=4,
        conv_blocks=2, conv_ratio=2, ffn_ratio=2, activation="kelu", registers=2, head="simple", head_bias=True,
        dropout=0.0,
    ),
)  # fmt: skip
