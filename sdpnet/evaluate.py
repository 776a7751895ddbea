"""Top-1 and top-5 of a trained run on its held-out set: ``python -m sdpnet.evaluate RUN_FOLDER [--ema | --live]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from sdp_kernels import UnsupportedError
from sdpnet import checkpoint, create_model
from sdpnet.augment import normalize
from sdpnet.config import Config, ConfigError
from sdpnet.data import DataError, Digits, ImageFolder, evaluation_batches
from sdpnet.loss import classification_loss
from sdpnet.memory import keep_memory
from sdpnet.settings import read_file, resolve


def open_data(config: Config, held_out: bool) -> Digits | ImageFolder:
    """The training or the held-out set that a configuration names."""
    if config.data.source == "digits":
        return Digits(held_out, config.data.path)
    root = Path(config.data.path or ".") / ("val" if held_out else "train")
    return ImageFolder(root, config.data.image_size, config.data.crop_scale, config.data.threads)


def build_model(config: Config, dataset: Digits | ImageFolder) -> nn.Module:
    """The model of a configuration, with as many classes and channels as the data set has (unless the configuration
    says otherwise).

    Raises ConfigError when the model cannot be built or does not take the data: fewer classes, other channels, a size
    that its patches don't divide.
    """
    side = dataset.image_size
    fitting = {"num_classes": dataset.classes, "in_channels": dataset.channels, "image_size": side}
    options = {**fitting, **(config.model.model_extra or {})}
    try:
        model = create_model(config.model.name, fused=config.run.fused, **options)
        model.embedding.grid(torch.empty(1, dataset.channels, side, side, device="meta"))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {config.model.name} and the data do not fit: {error}") from None
    if model.config.num_classes < dataset.classes:  # the loss would take the labels beyond for no class at all
        raise ConfigError(
            f"model.num_classes: got {model.config.num_classes}, wanted at least the data's {dataset.classes}"
        )
    return model


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device: got {name!r}, but this machine has no usable CUDA device")
    return torch.device(name)


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Digits | ImageFolder, *, batch_size: int, device: torch.device, bf16: bool = False
) -> dict[str, float]:
    """{"loss", "top1", "top5" (percent), "samples"}: every sample once, sums weighted by samples.

    Leaves the model's mode as it was.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    count = 0
    for images, labels in evaluation_batches(dataset, batch_size):
        images = normalize(images.to(device, non_blocking=True), dataset.value_max, dataset.mean, dataset.std)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = classification_loss(logits, labels).double() * len(labels)
        sums += torch.stack([loss, best[:, 0].sum().double(), best.any(dim=1).sum().double()])
        count += len(labels)
    model.train(was_training)
    loss, top1, top5 = (sums / count).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5, "samples": count}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdpnet.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder written by sdpnet.train")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--ema", action="store_true", help="the averaged weights (default: those the run's configuration reports)"
    )
    which.add_argument("--live", action="store_true", help="the weights of the last step")
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=None, help="kernels to use (default: as in training)"
    )
    options = parser.parse_args(arguments)
    try:
        stored = read_file(options.run / "config.yaml")
        layers = [("run", stored)] + (
            [("command line", {"run.fused": options.fused})] if options.fused is not None else []
        )
        config = resolve(*layers).config
        averaged = options.ema or (config.ema.report and not options.live)
        device, dataset = pick_device(config.run.device), open_data(config, held_out=True)
        model = build_model(config, dataset)
        path = options.run / ("ema.safetensors" if averaged else "model.safetensors")
        weights = checkpoint.read_tensors(path)
        checkpoint.check_fits(model, weights, path)
        model.load_state_dict(weights)
        if device.type == "cpu":
            keep_memory()
        batch, bf16 = config.data.eval_batch, config.run.precision == "bf16"
        result = evaluate(model.to(device), dataset, batch_size=batch, device=device, bf16=bf16)
    except (ConfigError, DataError, checkpoint.CheckpointError, ImportError, UnsupportedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{path}: {result['samples']:,} samples, loss {result['loss']:.4f}, "
        f"top-5 {result['top5']:.2f}%, top-1 {result['top1']:.2f}%"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
