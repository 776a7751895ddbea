"""The numbers to reach on an H200: time over the floor that the measured copy bandwidth sets, in bf16 at batch 256."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """``bound``: largest time ÷ floor. ``paper``: the floor in µs for an H200 at 4.3 TB/s, for comparison."""

    operator: str
    layout: str
    which: str
    bound: float
    paper: float
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    variant: str = ""

    @property
    def name(self) -> str:
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.operator}{variant} {'×'.join(map(str, self.shape))} {self.layout} {self.which}"


IMAGES = (256, 768, 16, 16)
GOALS = (
    Goal("kelu", "contiguous", "forward", 1.05, 47, IMAGES),
    Goal("kelu", "contiguous", "backward", 1.05, 70, IMAGES),
    Goal("kelu", "contiguous", "forward", 1.05, 187, (256, 3072, 16, 16)),
    Goal("kelu", "contiguous", "backward", 1.05, 281, (256, 3072, 16, 16)),
    Goal("layer_norm_2d", "channels_last", "forward", 1.08, 47, IMAGES),
    Goal("layer_norm_2d", "channels_last", "backward", 1.20, 70, IMAGES),
    Goal("layer_norm_2d", "contiguous", "forward", 1.15, 47, IMAGES),
    Goal("layer_norm_2d", "contiguous", "backward", 1.30, 70, IMAGES),
    Goal("depthwise_conv2d", "channels_last", "forward", 1.25, 46.8, IMAGES, variant="k7"),
    Goal("depthwise_conv2d", "channels_last", "backward", 1.35, 70.2, IMAGES, variant="k7"),
)
REACHED, MISSED, UNMEASURED = "reached", "missed", "not measured"


def judged(rows: Iterable[dict], goals: Iterable[Goal] = GOALS) -> list[dict]:
    """Each goal with our time ÷ floor per backend; reached if the backend that is chosen automatically reaches it."""
    ours = [row for row in rows if row["kind"] == "ours"]
    found = []
    for goal in goals:
        key = (goal.operator, goal.variant, list(goal.shape), goal.dtype, goal.layout, goal.which)
        keys = ("operator", "variant", "shape", "dtype", "layout", "pass")
        fitting = [r for r in ours if tuple(r.get(k, "") for k in keys) == key]
        ratios = {row["backend"]: row["time_over_floor"] for row in fitting}
        first = next(iter(ratios.values()), None)
        verdict = UNMEASURED if first is None else REACHED if first <= goal.bound else MISSED
        found.append(
            {
                "goal": goal.name,
                "bound": goal.bound,
                "time_over_floor": ratios,
                "floor_us": fitting[0]["floor"] * 1e6 if fitting else None,
                "floor_us_on_paper": float(goal.paper),
                "verdict": verdict,
            }
        )
    return found


def lines(found: Iterable[dict]) -> list[str]:
    """One line per goal."""
    told = []
    for goal in found:
        ratios = ", ".join(f"{backend} {ratio:.3f}" for backend, ratio in goal["time_over_floor"].items()) or "–"
        told.append(f"{goal['verdict']:<12} ≤ {goal['bound']:.2f}  {ratios:<30} {goal['goal']}")
    return told
