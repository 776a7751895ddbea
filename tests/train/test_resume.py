"""A run that is stopped at any step and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch

from sdpnet import checkpoint, train
from sdpnet.checkpoint import CheckpointError
from sdpnet.meter import COLUMNS
from sdpnet.models import load_model
from sdpnet.settings import Resolved

STEPS = 8  # of the tiny recipe: two epochs of four


def everything(run) -> dict[str, torch.Tensor]:
    return (
        {f"model.{k}": v.clone() for k, v in run.model.state_dict().items()}
        | {f"ema.{k}": v.clone() for k, v in run.ema.module.state_dict().items()}
        | {f"optimizer.{k}": v.clone() for k, v in checkpoint.optimizer_tensors(run.optimizer).items()}
    )


def metrics(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [{k: row[k] for k in COLUMNS} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny):
    """State, metrics and folder of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    run = train.Trainer(tiny(), folder)
    assert run.train()
    return everything(run), metrics(folder), folder


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


# 0: before the first step; 4 and 8: an epoch's last step, not yet evaluated; the others: inside an epoch
@pytest.mark.parametrize("stops", [[0], [1], [4], [6], [8], [2, 3, 5]])
def test_resumed_is_bit_equal_to_unbroken(trainer, unbroken, tmp_path, stops):
    folder = tmp_path / "broken"
    run = trainer(folder=folder)
    for stop in stops:
        assert not run.train(lambda step, stop=stop: step >= stop)
        assert run.progress.step == stop
        run = trainer(folder=folder)  # nothing is carried over but the folder
        run.load(checkpoint.newest(folder))
    assert run.train()
    same(everything(run), unbroken[0])
    assert metrics(folder) == unbroken[1]
    assert run.progress.step == STEPS and len(unbroken[1]) == 2


def test_another_seed_is_another_run(trainer, unbroken):
    run = trainer("run.seed=1")
    run.train()
    assert any(not torch.equal(v, unbroken[0][k]) for k, v in everything(run).items())


def test_folder_has_what_it_should(unbroken):
    folder = unbroken[2]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(checkpoint.list_checkpoints(folder)) == 1 and not list(folder.rglob("*.tmp"))
    names = {name for name, *_ in unbroken[0].items()}
    for kind in ("model", "ema"):
        stored = checkpoint.read_tensors(folder / f"{kind}.safetensors")
        same(
            {f"{kind}.{k}": v for k, v in stored.items()},
            {k: v for k, v in unbroken[0].items() if k.startswith(f"{kind}.")},
        )
        assert {f"{kind}.{k}" for k in stored} <= names
    last = metrics(folder)[-1]
    assert last["ema_top1"] != last["top1"] or last["ema_loss"] != last["val_loss"]


# ---------------------------------------------------------------------------------------------------- broken files
def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(trainer):
    run = trainer()
    half = run.folder / "checkpoints" / ".step-00000007.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half of it")
    run.save()
    assert [p.name for p in half.parent.iterdir()] == ["step-00000000"]


def spoil(path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "changed", "empty", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_broken_checkpoint_is_refused_by_name_and_nothing_is_touched(trainer, tmp_path, name, how):
    if (name, how) == ("state.json", "changed"):
        how = "truncated"
    run = trainer()
    run.save()
    source = checkpoint.newest(run.folder)
    spoil(source / name, how)
    other = trainer("run.seed=5", folder=tmp_path / "other")
    before = everything(other)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        other.load(source)
    same(everything(other), before)


def test_checkpoint_of_another_model_is_refused(trainer, tmp_path):
    run = trainer()
    run.save()
    other = trainer("model.dim=32", folder=tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        other.load(checkpoint.newest(run.folder))


def test_killed_while_saving_leaves_the_old_checkpoint(trainer, monkeypatch):
    run = trainer()
    run.train(lambda step: step >= 2)
    whole = checkpoint.newest(run.folder)
    write = checkpoint.write_atomically

    def power_cut(path, data):
        if path.name == "optimizer.safetensors":
            raise OSError("power cut")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", power_cut)
    run.progress.step += 1
    with pytest.raises(OSError, match="power cut"):
        run.save()
    monkeypatch.undo()
    assert checkpoint.newest(run.folder) == whole
    other = trainer(folder=run.folder)
    other.load(whole)
    assert other.progress.step == 2
    other.progress.step = 3
    other.save()  # the half-written folder is in nobody's way
    assert checkpoint.newest(run.folder).name == "step-00000003"


def test_only_the_newest_are_kept(trainer):
    run = trainer("checkpoint.keep=2")
    for step in (9, 10, 11):
        run.progress.step = step
        run.save()
    assert [p.name for p in checkpoint.list_checkpoints(run.folder)] == ["step-00000010", "step-00000011"]


def test_resuming_from_an_older_checkpoint_overwrites_nothing(trainer, tmp_path, capsys):
    run = trainer("checkpoint.every_epochs=1", "checkpoint.keep=2")
    (run.folder / "config.yaml").write_text(Resolved(run.config, defaultdict(str)).describe())
    run.train()
    older, newer = checkpoint.list_checkpoints(run.folder)
    (run.folder / "checkpoints" / "step-notes").mkdir()  # not ours: neither read nor removed
    assert train.main(["--resume", str(older)]) == 2
    assert f"{newer} is newer" in capsys.readouterr().err
    newer.rename(tmp_path / "away")
    assert train.main(["--resume", str(older)]) == 0
    for name in checkpoint.TENSOR_FILES:
        assert (newer / name).read_bytes() == (tmp_path / "away" / name).read_bytes()


# ---------------------------------------------------------------------------------------------------- signals
def test_sigterm_saves_and_says_how_to_go_on(tmp_path, tiny_words):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "sdpnet.train",
        "digits",
        *tiny_words,
        "schedule.epochs=5000",
        "--out",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    last = out.strip().splitlines()[-1]
    assert last.startswith("stopped by SIGTERM at epoch") and last.endswith(f"--resume {folder}")
    state = json.loads((checkpoint.newest(folder) / "state.json").read_text())["progress"]
    assert state["step"] == state["epoch"] * 4 + state["position"] > 0
    assert f"step {state['step']} of 20000" in last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed_from_the_command_line(
    tmp_path, tiny_words, unbroken, capsys, monkeypatch, number
):
    """The signal comes inside a step; the step is finished, and the resumed command ends as the unbroken run did."""
    folder = tmp_path / "run"
    words = ["digits", *tiny_words, "--out", str(folder)]
    step = train.train_step

    def interrupted(*args, **options):
        if options["step"] == 4:
            signal.raise_signal(number)
        return step(*args, **options)

    monkeypatch.setattr(train, "train_step", interrupted)
    before = signal.getsignal(number)
    assert train.main(words) == 128 + number
    assert signal.getsignal(number) is before
    assert "step 5 of 8; saved" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.undo()
    assert train.main([*words, "--resume"]) == 0
    assert metrics(folder) == unbroken[1]
    for kind in ("model", "ema"):
        name = f"{kind}.safetensors"
        same(checkpoint.read_tensors(folder / name), checkpoint.read_tensors(unbroken[2] / name))
    assert "going on from step 5" in capsys.readouterr().out


def test_resuming_a_finished_run_only_says_so(tmp_path, tiny_words, capsys):
    words = [*tiny_words, "schedule.epochs=1", "schedule.warmup_epochs=0", "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_weights_of_a_run_load_on_their_own(unbroken):
    """model.safetensors and ema.safetensors say which model they are."""
    state, _, folder = unbroken
    for name in checkpoint.MODEL_FILES:
        model = load_model(folder / name)
        part = name.removesuffix(".safetensors")
        assert all(torch.equal(v, state[f"{part}.{k}"]) for k, v in model.state_dict().items())
