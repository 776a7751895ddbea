"""Trains a model: ``python -m sdpnet.train [PRESET] [--fused] [-c FILE] [section.key=value …] [--resume [RUN]] [--out DIR]``.

Without arguments the preset ``digits``: a small SdP-Net on the handwritten digits in the package. The last line printed is
``done in <time>: run=<run folder> top1=<percent>%``. Exit codes: 0 done, 2 wrong use, 1 the run failed, 130 or 143 stopped by
Ctrl-C or SIGTERM with everything saved (``--resume`` goes on from there, bit for bit as if nothing had happened).
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import sdp_kernels
from sdpnet import checkpoint
from sdpnet.augment import augment, normalize
from sdpnet.checkpoint import CheckpointError, Progress
from sdpnet.config import Config, ConfigError, Resolved, dump, read_file, read_overrides, read_preset, resolve
from sdpnet.data import Batch, DataError, TrainOrder, fold
from sdpnet.ema import EMA
from sdpnet.evaluate import build_model, evaluate, open_data, pick_device
from sdpnet.loss import classification_loss
from sdpnet.meter import Meter, duration, plot_curves, write_metrics
from sdpnet.optim import FiniteGuard, build_optimizer, learning_rate, scaled_lr

RESUME_MAY_CHANGE = ("run.fused", "run.device", "run.threads", "run.check_every", "data.path", "data.threads", "data.eval_batch", "checkpoint.every_epochs", "checkpoint.keep")  # fmt: skip


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

    micro_batches: (images, targets, rng) each; every one counts by its samples, so k of them give the gradient of one big batch.
    It reads no value back from the device, so it also runs on meta tensors. A step that is not finite changes nothing but the guard.
    """
    samples = sum(len(targets) for _, targets, _ in micro_batches)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for images, targets, rng in micro_batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images, rng)
        loss = loss_of(logits, targets) * (len(targets) / samples)
        loss.backward()
        total = total + loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    guard.update(step, total, norm)
    if clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.defaults["fused"]:
        optimizer.found_inf = guard.tripped  # the fused kernel then leaves weights and moments as they are
    optimizer.step()
    ema.update(model, step, keep=guard.tripped)
    return total


# ---------------------------------------------------------------------------------------------------- a run
class Trainer:
    """Everything a run holds between two steps. ``progress`` says where it stands; all that is random follows from it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = pick_device(config.run.device)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.train_set, self.held_out = open_data(config, held_out=False), open_data(config, held_out=True)
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
        return learning_rate(step, peak=self.peak_lr, floor=self.peak_lr * schedule.min_lr, warmup_steps=warmup, cycle_steps=max(1, cycle), cycle_growth=schedule.cycle_growth)  # fmt: skip

    def micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Augmented, normalised images, targets and rng of one step, on the device, cut to data.micro_batch."""
        data, seed, parts = self.train_set, fold(self.config.run.seed, 3), []
        size = self.config.data.micro_batch or len(batch)
        for first in range(0, len(batch), size):
            part = slice(first, first + size)
            images = batch.images[part].to(self.device, non_blocking=True)
            draws = batch.draws[part].to(self.device, non_blocking=True)
            images = normalize(augment(images, draws, **self.config.augment.model_dump()), data.value_max, data.mean, data.std)
            rng = sdp_kernels.make_rng(seed, self.progress.step, first, device=self.device)
            parts.append((images, batch.labels[part].to(self.device, non_blocking=True), rng))
        return parts

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return classification_loss(logits, targets, **self.config.loss.model_dump())

    def train(self, should_stop: Callable[[int], bool] = lambda step: False) -> bool:
        """Trains from where progress stands to the end: True. False: stopped early after a finished step, everything saved."""
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
            loss = train_step(self.model, self.optimizer, self.ema, self.guard, parts, self.loss_of, step=step, lr=self.lr(step), clip=clip, bf16=self.bf16)  # fmt: skip
            loss_sum += loss * len(batch)
            progress.step, progress.position, progress.samples = step + 1, progress.position + 1, progress.samples + len(batch)
            self.meter.step(len(batch))
            if progress.step % check_every == 0:
                self.check_finite()
            if stop := should_stop(progress.step):
                break
        self.check_finite()
        progress.loss_sum = float(loss_sum)
        return not stop

    def finish_epoch(self) -> None:
        """Evaluates live and averaged weights, writes the epoch's row and curves, and moves progress to the next epoch."""
        progress = self.progress
        speed = self.meter.images_per_second()
        options = {"batch_size": self.config.data.eval_batch, "device": self.device, "bf16": self.bf16}
        live, averaged = evaluate(self.model, self.held_out, **options), evaluate(self.ema.module, self.held_out, **options)
        row = {"epoch": progress.epoch, "step": progress.step, "lr": self.lr(progress.step - 1)}
        row |= {"train_loss": progress.loss_sum / progress.samples, "val_loss": live["loss"], "top1": live["top1"], "top5": live["top5"]}
        row |= {"ema_loss": averaged["loss"], "ema_top1": averaged["top1"], "ema_top5": averaged["top5"]}
        row |= {"images_per_second": speed, "seconds": self.meter.seconds()}
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
                f"loss or gradient norm is not finite at epoch {epoch + 1}, step {step} (samples {first} … of the epoch's order, "
                f"lr {self.lr(step):.3g}); that step was not applied. Run folder with what was saved before: {self.folder}"
            )

    def save(self) -> None:
        self.progress.seconds = self.meter.seconds()
        if self.progress.rows:
            plot_curves(self.folder / "curves.png", self.progress.rows)
        checkpoint.save(self.folder, self.model, self.ema.module, self.optimizer, self.progress, self.config.checkpoint.keep)

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
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving (once more: stop at once)", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sdpnet.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="PRESET | section.key=value", help="a preset's name (default: digits); settings")
    parser.add_argument("-c", "--config", type=Path, help="YAML file over the preset")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=None, help="fused kernels (run.fused)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<name>-<time>)")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help="go on with the run in --out, or in this folder or checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print every value with its origin, and stop")
    options = parser.parse_intermixed_args(arguments)
    if options.resume and "=" in options.resume and not Path(options.resume).exists():
        options.words.append(options.resume)  # `--resume a.b=c`: the word after it is a setting, not a folder
        options.resume = ""
    return options


def settings(options: argparse.Namespace) -> tuple[Resolved, Path | None]:
    """The configuration, and the checkpoint to go on from. Resuming, the run's own config.yaml takes the preset's place."""
    presets = [word for word in options.words if "=" not in word]
    if len(presets) > 1:
        raise ConfigError(f"wanted one preset, got {' '.join(presets)}")
    layers = [(str(options.config), read_file(options.config))] if options.config else []
    layers.append(("command line", read_overrides(word for word in options.words if "=" in word)))
    if options.fused is not None:
        layers.append(("command line", {"run.fused": options.fused}))
    if options.resume is None:
        name = presets[0] if presets else "digits"
        return resolve((f"preset {name}", read_preset(name)), *layers), None
    if options.resume:
        source = Path(options.resume)
        run = source.parent.parent if (source / "state.json").is_file() else source
        if options.out and options.out.resolve() != run.resolve():
            raise ConfigError(f"--resume {source} and --out {options.out} are different runs; leave --out away")
        options.out = run
    elif options.out:
        source = options.out
    else:
        raise ConfigError("--resume: which run? Give --out DIR as before, or --resume RUN")
    stored = read_file(options.out / "config.yaml")
    resolved = resolve((f"run {options.out}", stored), *([(f"preset {presets[0]}", read_preset(presets[0]))] if presets else []), *layers)
    before, now = dump(resolve(("stored", stored)).config), dump(resolved.config)
    changed = [f"{k} {before.get(k)!r} → {v!r}" for k, v in now.items() if before.get(k) != v and k not in RESUME_MAY_CHANGE]
    if changed:
        raise ConfigError(f"--resume cannot change {'; '.join(changed)}: that would be another run (leave --resume away and give a new --out)")  # fmt: skip
    return resolved, checkpoint.newest(source)


def new_folder(wanted: Path | None, name: str) -> Path:
    """Where a new run goes. Raises ConfigError when it holds a run already: nothing is ever overwritten."""
    base = wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = base, 2
    while wanted is None and folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file")
    held = [n for n in ("config.yaml", "metrics.csv", "checkpoints", "model.safetensors") if (folder / n).exists()]
    if held:
        raise ConfigError(f"--out: {folder} already holds a run ({', '.join(held)}); --resume goes on with it, another --out starts a new one")  # fmt: skip
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
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
    except (ConfigError, DataError, CheckpointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    introduce(trainer, resolved, source)
    try:
        with stop_signals() as caught:
            finished = trainer.train(lambda step: bool(caught))
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not finished:
        place = f"epoch {trainer.progress.epoch + 1}, step {trainer.progress.step} of {trainer.total_steps}"
        print(f"stopped by {signal.Signals(caught[0]).name} at {place}; saved. Go on with: python -m sdpnet.train --resume {folder}")
        return 128 + caught[0]
    print(f"done in {duration(trainer.progress.seconds)}: run={folder} top1={trainer.top1():.2f}%")
    return 0


def introduce(trainer: Trainer, resolved: Resolved, source: Path | None) -> None:
    config, batch = trainer.config, trainer.config.data.batch_size
    rule = "as set" if config.optim.lr else f"= {config.optim.base_lr:g} · {batch}/512"
    print(f"{config.model.name}: {sum(p.numel() for p in trainer.model.parameters()):,} parameters, kernels {'fused' if config.run.fused else 'unfused'}, {config.run.precision} on {trainer.device}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"data: {config.data.source}, {len(trainer.train_set):,} to train on, {len(trainer.held_out):,} held out; {trainer.epochs} epochs × {trainer.order.steps} steps of {batch}; peak lr {trainer.peak_lr:g} ({rule})")  # fmt: skip
    print(f"run folder: {trainer.folder}" + (f", going on from step {trainer.progress.step} ({source})" if source else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
