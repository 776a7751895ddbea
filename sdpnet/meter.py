"""What a run shows and writes down: the progress bar, a line per epoch, metrics.csv, curves.png."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sdpnet.checkpoint import write_atomically

COLUMNS = ("epoch", "step", "lr", "train_loss", "val_loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5")
TIMES = ("images_per_second", "seconds")  # the columns that differ between two equal runs


def duration(seconds: float) -> str:
    """9.4 → '9.4 s', 83 → '1:23', 7261 → '2:01:01'"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def write_metrics(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """The whole table, atomically: after a resume it holds no epoch twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS + TIMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def plot_curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Loss, top-1 and learning rate over the epochs, as a PNG."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # late: half a second that a run's start need not wait for
    from matplotlib.figure import Figure

    epochs = [row["epoch"] + 1 for row in rows]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss", {"training": "train_loss", "held out": "val_loss", "held out, averaged weights": "ema_loss"}),
        ("top-1, %", {"held out": "top1", "held out, averaged weights": "ema_top1"}),
        ("learning rate", {"": "lr"}),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for label, column in lines.items():
            axes.plot(
                epochs, [row[column] for row in rows], label=label or None, marker="." if len(rows) < 20 else None
            )
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


class Meter:
    """Progress bar over all steps of the run (on a terminal) and one printed line per epoch."""

    def __init__(self, total_steps: int, done_steps: int, seconds_before: float) -> None:
        self.bar = tqdm(
            total=total_steps,
            initial=done_steps,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=None,
            file=sys.stderr,
        )
        self.start = time.perf_counter()
        self.seconds_before = seconds_before
        self.total, self.first_step = total_steps, done_steps
        self._clock, self._images = 0.0, 0
        self._since = self.start

    def seconds(self) -> float:
        """Of the whole run, including what came before a resume."""
        return self.seconds_before + time.perf_counter() - self.start

    def begin_epoch(self) -> None:
        self._images, self._since = 0, time.perf_counter()

    def step(self, images: int) -> None:
        self._images += images
        self.bar.update()

    def images_per_second(self) -> float:
        """Of the epoch's training part so far (loading included, evaluation not)."""
        return self._images / max(time.perf_counter() - self._since, 1e-9)

    def epoch_line(self, row: dict[str, float], epochs: int, step: int) -> None:
        done = step - self.first_step
        left = (time.perf_counter() - self.start) / done * (self.total - step) if done else 0.0
        self.say(
            f"epoch {row['epoch'] + 1:>{len(str(epochs))}}/{epochs}  "
            f"loss {row['train_loss']:.4f}  held out {row['val_loss']:.4f}  "
            f"top-1 {row['top1']:.2f} %  ema {row['ema_top1']:.2f} %  lr {row['lr']:.2e}  "
            f"{row['images_per_second']:,.0f} img/s  {duration(left)} left"
        )

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
