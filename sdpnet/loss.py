"""Classification losses that accept class indices or soft targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(targets: Tensor, classes: int, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1 − s)·t + s/K of shape (B, K). targets: int64 (B,) class indices, or (B, K) probabilities."""
    if targets.ndim == 1:
        # F.one_hot looks at the values: a wait for the device, impossible on meta tensors. A comparison does not.
        targets = targets[:, None] == torch.arange(classes, device=targets.device)
    return targets.to(dtype) * (1.0 - smoothing) + smoothing / classes


def classification_loss(
    logits: Tensor, targets: Tensor, *, kind: str = "ce", smoothing: float = 0.0, class_reduction: str = "sum"
) -> Tensor:
    """Mean over the samples, a scalar in fp32 (fp64 for fp64 logits).

    logits (B, K); targets int64 (B,) or soft (B, K). kind "ce": −Σ t·log softmax(z). kind "bce": every class is a
    yes/no question, Σ −t·log σ(z) − (1 − t)·log(1 − σ(z)), summed (class_reduction "sum": gradients as large as CE's)
    or averaged ("mean") over the classes. Raises ValueError for an unknown kind or shapes that do not fit.
    """
    if kind not in ("ce", "bce"):
        raise ValueError(f"kind: got {kind!r}, wanted 'ce' or 'bce'")
    if class_reduction not in ("sum", "mean"):
        raise ValueError(f"class_reduction: got {class_reduction!r}, wanted 'sum' or 'mean'")
    fits = targets.shape == logits.shape if targets.ndim == 2 else targets.shape == logits.shape[:1]
    if logits.ndim != 2 or not fits:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)} for logits of {tuple(logits.shape)}, wanted (B,) or (B, K)"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    wanted = soft_targets(targets, logits.shape[1], smoothing, logits.dtype)
    if kind == "ce":
        return -(wanted * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
    per_class = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (per_class.sum(dim=1) if class_reduction == "sum" else per_class.mean(dim=1)).mean()
