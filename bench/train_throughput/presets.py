"""What is trained for the figures: a model that fits a laptop, and the one of the design's GPU goals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model by name with options, and the batch of a step."""

    model: str
    batch: int
    activations: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "cpu": Preset("sdpnet_xl_bench", 8, ("kelu", "gelu"), {"dim": 384, "blocks": 4, "patch_size": 14, "dropout": 0.0}),
    "sdpnet_xl_bench": Preset("sdpnet_xl_bench", 256, ("gelu", "kelu")),
    "tiny": Preset(
        "sdpnet_xl_bench",
        2,
        ("kelu",),
        {"dim": 32, "blocks": 1, "heads": 2, "image_size": 28, "num_classes": 10, "dropout": 0.0},
    ),
}
"""``cpu``: dim 384, 4 blocks, 16×16 tokens, batch 8. ``tiny`` is for tests and rehearsals: its times mean nothing."""

GOALS = {
    "cpu": {"kelu": {"eager": 3.0}, "gelu": {"eager": 2.0, "eager, compiled": 1.6}},
    "sdpnet_xl_bench": {"gelu": {"eager": 2.0, "eager, compiled": 1.3}},
}
"""Preset → activation → form → how many times its step may take of the best fused step at least."""
GOAL_MS = {"sdpnet_xl_bench": {"gelu": ("NVIDIA H200", 84.0)}}
