"""Draws docs/kelu.png: KeLü beside GELU, with their derivatives. Run: python docs/plot_kelu.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from sdp_kernels import kelu


def curve(function, x):
    """Values and derivative of an element-wise function on the points x."""
    x = x.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def main() -> None:
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, function, colour in (("KeLü", kelu, "#c0392b"), ("GELU", F.gelu, "#2c6fbb")):
        y, slope = curve(function, x)
        style = {"color": colour, "label": name, "linewidth": 2}
        left.plot(x, y, **style)
        right.plot(x, slope, **style)
    for axes, title in ((left, "f(x)"), (right, "f′(x)")):
        axes.axvspan(-3.5, 3.5, color="#000000", alpha=0.04, label="|x| < a = 3.5")
        axes.set(title=title, xlabel="x", xlim=(-5, 5))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    figure.savefig(Path(__file__).with_name("kelu.png"), dpi=120)


if __name__ == "__main__":
    main()
