"""The numbers to reach on an H200: time over the floor that the measured copy bandwidth sets, in bf16 at batch 256."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """``bound``: largest time ÷ floor; ``others``: of backends that have a bound of their own. ``paper``: the floor in
    µs for an H200 at 4.3 TB/s and 790 TFLOP/s, for comparison."""

    operator: str
    layout: str
    which: str
    bound: float
    paper: float
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    variant: str = ""
    registers: int = 0
    others: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.operator}{variant} {'×'.join(map(str, self.shape))} {self.layout} {self.which}"

    def bound_for(self, backend: str) -> float:
        return dict(self.others).get(backend, self.bound)


IMAGES, TOKENS, HEADS = (256, 768, 16, 16), (256, 261, 768), (256, 261, 3, 8, 96)
TRITON_ATTENTION = {"forward": (("triton", 2.0),), "backward": (("triton", 2.5),)}
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
    Goal("feed_forward", "tokens", "forward", 1.12, 846, TOKENS, variant="gelu"),
    Goal("feed_forward", "tokens", "backward", 1.15, 1690, TOKENS, variant="gelu"),
    Goal("conv_mlp", "tokens", "forward", 1.12, 993, TOKENS, variant="kelu", registers=5),
    Goal("conv_mlp", "tokens", "backward", 1.15, 2058, TOKENS, variant="kelu", registers=5),
    Goal("linear", "tokens", "forward", 1.12, 399, TOKENS, variant="expand-gelu"),
    Goal("linear", "tokens", "backward", 1.15, 798, TOKENS, variant="expand-gelu"),
    Goal("register_attention", "tokens", "forward", 1.4, 95.5, HEADS, others=TRITON_ATTENTION["forward"]),
    Goal("register_attention", "tokens", "backward", 1.9, 167, HEADS, others=TRITON_ATTENTION["backward"]),
)
REACHED, MISSED, UNMEASURED = "reached", "missed", "not measured"


def judged(rows: Iterable[dict], goals: Iterable[Goal] = GOALS) -> list[dict]:
    """Each goal with our time ÷ floor per backend; reached if the backend that is chosen automatically reaches it,
    which of those that were timed is the first."""
    ours = [row for row in rows if row["kind"] == "ours"]
    found = []
    for goal in goals:
        key = (goal.operator, goal.variant, list(goal.shape), goal.dtype, goal.layout, goal.which)
        keys = ("operator", "variant", "shape", "dtype", "layout", "pass")
        fitting = [r for r in ours if tuple(r.get(k, "") for k in keys) == key]
        fitting = [r for r in fitting if r.get("registers", 0) == goal.registers]
        ratios = {row["backend"]: row["time_over_floor"] for row in fitting}
        verdicts = {name: REACHED if ratio <= goal.bound_for(name) else MISSED for name, ratio in ratios.items()}
        found.append(
            {
                "goal": goal.name,
                "bound": goal.bound,
                "time_over_floor": ratios,
                "floor_us": fitting[0]["floor"] * 1e6 if fitting else None,
                "floor_us_on_paper": float(goal.paper),
                "verdict": next(iter(verdicts.values()), UNMEASURED),
                "verdicts": verdicts,
            }
        )
    return found


def lines(found: list[dict]) -> list[str]:
    """One line per goal, and how many are reached."""
    told = []
    for goal in found:
        ratios = ", ".join(
            f"{backend} {ratio:.3f}{'' if goal['verdicts'][backend] == REACHED else ' (missed)'}"
            for backend, ratio in goal["time_over_floor"].items()
        )
        told.append(f"{goal['verdict']:<12} ≤ {goal['bound']:.2f}  {ratios or '–':<40} {goal['goal']}")
    reached = sum(goal["verdict"] == REACHED for goal in found)
    return [*told, f"{reached} of {len(found)} goals reached"]
