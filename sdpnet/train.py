"""Trains a model.

    python -m sdpnet.train [PRESET] [--fused] [-c FILE] [section.key=value …] [--out DIR] [--resume [RUN]]

Without arguments the preset `digits`: a small SdP-Net on the handwritten digits in the package. The preset `images` is
for pictures in data.path/{train,val}/<class>/. A run is one process on one device. The last line printed is
`done in <time>: run=<run folder> top1=<percent>%`. Exit codes: 0 done, 2 wrong use, 1 the run failed, 130 or 143
stopped by Ctrl-C or SIGTERM with everything saved; --resume goes on from there, bit for bit as if nothing had happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import sdp_kernels
from sdp_kernels.backends import choose
from sdpnet import checkpoint
from sdpnet.augment import augment, normalize
from sdpnet.checkpoint import CheckpointError, Progress
from sdpnet.command_line import new_folder, parse, settings
from sdpnet.config import Config, ConfigError
from sdpnet.data import Batch, DataError, TrainOrder, check_classes, fold
from sdpnet.ema import EMA
from sdpnet.evaluate import build_model, evaluate, open_data, pick_device
from sdpnet.loss import classification_loss
from sdpnet.memory import keep_memory
from sdpnet.meter import Meter, duration, plot_curves, write_metrics
from sdpnet.optim import FiniteGuard, build_optimizer, learning_rate, scaled_lr


class TrainingError(RuntimeError):
    """The run cannot go on: the loss is not finite, or the run folder is not what it should be."""


# ---------------------------------------------------------------------------------------------------- one step
def train_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    ema: EMA,
    guard: FiniteGuard,
    micro_batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    step: int,
    lr: float,
    clip: float = 0.0,
    bf16: bool = False,
) -> Tensor:
    """Forward, loss, backward, clip, AdamW, EMA: one step; returns its mean loss (fp32 scalar, on the device).

    micro_batches: (images, targets, rng) each; every one counts by its samples, so k of them give the gradient of one
    big batch. It reads no value back from the device, so it also runs on meta tensors. A step that is not finite
    changes nothing but the guard.
    """
    samples = sum(len(targets) for _, targets, _ in micro_batches)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for images, targets, rng in micro_batches:
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
            logits = model(images, rng)
        loss = loss_of(logits, targets) * (len(targets) / samples)
        loss.backward()
        total = total + loss.detach()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    guard.update(step, total, norm)
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.defaults["fused"]:
        optimizer.found_inf = guard.tripped  # the fused kernel then leaves weights and moments as they are
    optimizer.step()
    ema.update(step, keep=guard.tripped)
    return total


# ---------------------------------------------------------------------------------------------------- a run
class Trainer:
    """Everything a run holds between two steps.

    ``progress`` says where it stands; all that is random follows from it.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = pick_device(config.run.device)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.train_set, self.held_out = open_data(config, held_out=False), open_data(config, held_out=True)
        check_classes(self.train_set, self.held_out, config.data.path)
        torch.manual_seed(fold(config.run.seed, 0))
        self.model = build_model(config, self.train_set).to(self.device).train()
        self.ema = EMA(self.model, config.ema.decay)
        optim = config.optim
        self.optimizer = build_optimizer(self.model, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps)
        self.guard = FiniteGuard(self.device)
        self.order = TrainOrder(self.train_set, config.data.batch_size, config.run.seed)
        self.progress = Progress()
        self.bf16 = config.run.precision == "bf16"
        self.epochs, self.total_steps = config.schedule.epochs, config.schedule.epochs * self.order.steps
        self.peak_lr = optim.lr or scaled_lr(optim.base_lr, config.data.batch_size)

    def lr(self, step: int) -> float:
        schedule = self.config.schedule
        warmup = round(schedule.warmup_epochs * self.order.steps)
        cycle = round(schedule.cycle_epochs * self.order.steps) if schedule.cycle_epochs else self.total_steps - warmup
        return learning_rate(
            step,
            peak=self.peak_lr,
            floor=self.peak_lr * schedule.min_lr,
            warmup_steps=warmup,
            cycle_steps=max(1, cycle),
            cycle_growth=schedule.cycle_growth,
        )

    def micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Augmented, normalised images, targets and rng of one step, on the device, cut to data.micro_batch."""
        data, seed, parts = self.train_set, fold(self.config.run.seed, 3), []
        size = self.config.data.micro_batch or len(batch)
        for first in range(0, len(batch), size):
            part = slice(first, first + size)
            images = batch.images[part].to(self.device, non_blocking=True)
            draws = batch.draws[part].to(self.device, non_blocking=True)
            images = normalize(
                augment(images, draws, **self.config.augment.model_dump()), data.value_max, data.mean, data.std
            )
            rng = sdp_kernels.make_rng(seed, self.progress.step, first, device=self.device)
            parts.append((images, batch.labels[part].to(self.device, non_blocking=True), rng))
        return parts

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return classification_loss(logits, targets, **self.config.loss.model_dump())

    def train(self, should_stop: Callable[[int], bool] = lambda step: False) -> bool:
        """Trains from where progress stands to the end: True.

        False: stopped early after a finished step, everything saved.
        """
        progress = self.progress
        self.meter = Meter(self.total_steps, progress.step, progress.seconds)
        try:
            while progress.epoch < self.epochs:
                if not self.train_epoch(should_stop):
                    self.save()
                    return False
                self.finish_epoch()
                if progress.epoch == self.epochs or progress.epoch % self.config.checkpoint.every_epochs == 0:
                    self.save()
            return True
        finally:
            self.meter.close()

    def train_epoch(self, should_stop: Callable[[int], bool]) -> bool:
        """The rest of the epoch that progress stands in; False when should_stop said so."""
        progress, clip = self.progress, self.config.optim.clip
        loss_sum = torch.full((), progress.loss_sum, dtype=torch.float64, device=self.device)
        check_every = 1 if self.device.type == "cpu" else self.config.run.check_every
        self.meter.begin_epoch()
        stop = should_stop(progress.step)
        for batch in () if stop else self.order.epoch(progress.epoch, progress.position):
            step = progress.step
            parts = self.micro_batches(batch)
            loss = train_step(
                self.model,
                self.optimizer,
                self.ema,
                self.guard,
                parts,
                self.loss_of,
                step=step,
                lr=self.lr(step),
                clip=clip,
                bf16=self.bf16,
            )
            loss_sum += loss * len(batch)
            progress.step, progress.position, progress.samples = (
                step + 1,
                progress.position + 1,
                progress.samples + len(batch),
            )
            self.meter.step(len(batch))
            if progress.step % check_every == 0:
                self.check_finite()
            if stop := should_stop(progress.step):
                break
        self.check_finite()
        progress.loss_sum, progress.seconds = float(loss_sum), self.meter.seconds()
        return not stop

    def finish_epoch(self) -> None:
        """Evaluates live and averaged weights, writes the epoch's row and curves, and moves progress to the next
        epoch.
        """
        progress = self.progress
        speed = self.meter.images_per_second()
        options = {"batch_size": self.config.data.eval_batch, "device": self.device, "bf16": self.bf16}
        live, averaged = (
            evaluate(self.model, self.held_out, **options),
            evaluate(self.ema.module, self.held_out, **options),
        )
        row = {"epoch": progress.epoch, "step": progress.step, "lr": self.lr(progress.step - 1)}
        row |= {
            "train_loss": progress.loss_sum / progress.samples,
            "val_loss": live["loss"],
            "top1": live["top1"],
            "top5": live["top5"],
        }
        row |= {"ema_loss": averaged["loss"], "ema_top1": averaged["top1"], "ema_top5": averaged["top5"]}
        progress.seconds = self.meter.seconds()
        row |= {"images_per_second": speed, "seconds": progress.seconds}
        progress.rows.append(row)
        progress.best = max(progress.best, self.top1())  # for the record; no weights are chosen by it
        progress.epoch, progress.position, progress.loss_sum, progress.samples = progress.epoch + 1, 0, 0.0, 0
        write_metrics(self.folder / "metrics.csv", progress.rows)
        self.meter.epoch_line(row, self.epochs, progress.step)

    def top1(self) -> float:
        """Of the newest epoch, by the weights that the configuration chose to report."""
        return self.progress.rows[-1]["ema_top1" if self.config.ema.report else "top1"]

    def check_finite(self) -> None:
        step = self.guard.first_bad_step()
        if step is not None:
            epoch, position = divmod(step, self.order.steps)
            first = position * self.config.data.batch_size
            raise TrainingError(
                f"loss or gradient norm is not finite at epoch {epoch + 1}, step {step} (samples {first} … of the "
                f"epoch's order, lr {self.lr(step):.3g}); that step was not applied. What was saved before it is in "
                f"{self.folder}"
            )

    def save(self) -> None:
        if self.progress.rows:
            plot_curves(self.folder / "curves.png", self.progress.rows)
        checkpoint.save(
            self.folder, self.model, self.ema.module, self.optimizer, self.progress, self.config.checkpoint.keep
        )

    def load(self, folder: Path) -> None:
        self.progress = checkpoint.load(folder, self.model, self.ema.module, self.optimizer)


# ---------------------------------------------------------------------------------------------------- command line
@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C and SIGTERM only put themselves on the list; the second time they act as usual."""
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        print(
            f"\n{signal.Signals(number).name}: finishing the step, then saving (once more: stop at once)",
            file=sys.stderr,
        )

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments, __doc__)
    try:
        if os.environ.get("WORLD_SIZE") not in (None, "", "1"):  # under torchrun: each process would train its own run
            raise ConfigError("a run is one process on one device; start it without torchrun")
        resolved, source = settings(options)
        config = resolved.config
        if options.print_config:
            print(resolved.describe(), end="")
            return 0
        if source is None:
            folder = new_folder(options.out, config.run.name)
            trainer = Trainer(config, folder)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(folder / "config.yaml", resolved.describe().encode())
        else:
            folder = options.out
            trainer = Trainer(config, folder)
            trainer.load(source)
    except (ConfigError, DataError, CheckpointError, ImportError, OSError) as error:  # OSError: a folder to write to
        print(f"error: {error}", file=sys.stderr)
        return 2
    if trainer.device.type == "cpu":
        keep_memory()
    try:
        introduce(trainer, source)
        with stop_signals() as caught:
            finished = trainer.train(lambda step: bool(caught))
    except (TrainingError, DataError, sdp_kernels.UnsupportedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot read or write: {error}; what was saved before is whole", file=sys.stderr)
        return 1
    if not finished:
        place = f"epoch {trainer.progress.epoch + 1}, step {trainer.progress.step} of {trainer.total_steps}"
        print(
            f"stopped by {signal.Signals(caught[0]).name} at {place}; saved. "
            f"Go on with: python -m sdpnet.train --resume {folder}"
        )
        return 128 + caught[0]
    print(f"done in {duration(trainer.progress.seconds)}: run={folder} top1={trainer.top1():.2f}%")
    return 0


def introduce(trainer: Trainer, source: Path | None) -> None:
    """Three lines on what is about to be trained, on what, and where it goes."""
    config, batch = trainer.config, trainer.config.data.batch_size
    parameters = sum(p.numel() for p in trainer.model.parameters())
    weight = next(trainer.model.parameters())
    kernels = f"fused kernels ({choose('layer_norm_2d', weight)})" if config.run.fused else "unfused kernels"
    rule = "as set" if config.optim.lr else f"= {config.optim.base_lr:g} · {batch}/512"
    print(
        f"{config.model.name}: {parameters:,} parameters, {kernels}, {config.run.precision} on "
        f"{trainer.device}, {torch.get_num_threads()} CPU threads"
    )
    print(
        f"data: {config.data.source}, {len(trainer.train_set):,} to train on, {len(trainer.held_out):,} held out; "
        f"{trainer.epochs} epochs × {trainer.order.steps} steps of {batch}; peak lr {trainer.peak_lr:g} ({rule})"
    )
    start = f", going on from step {trainer.progress.step} ({source})" if source else ""
    print(f"run folder: {trainer.folder}{start}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
