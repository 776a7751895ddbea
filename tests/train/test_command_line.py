"""python -m sdpnet.train and python -m sdpnet.evaluate, as a user meets them."""

from __future__ import annotations

import errno
import os
import re

import numpy as np
import pytest

from sdp_kernels import use_backend
from sdpnet import evaluate, train
from sdpnet.settings import read_preset, resolve


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_words):
    """A run folder made by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert train.main(["--fused", *tiny_words, "--out", str(folder)]) == 0
    return folder


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_last_line_ends_with_folder_and_top1(tmp_path, tiny_words, capsys):
    folder = tmp_path / "a"
    assert (
        train.main(["digits", *tiny_words, "schedule.epochs=1", "schedule.warmup_epochs=0", "--out", str(folder)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"done in .+: run={re.escape(str(folder))} top1=\d+\.\d\d%", lines[-1])
    assert re.search(r"epoch 1/1  loss \d.*top-1 [\d.]+ %.*img/s.*left", lines[-2])


def test_run_folder_is_named_after_recipe_and_time(tmp_path, tiny_words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main([*tiny_words, "schedule.epochs=1", "schedule.warmup_epochs=0", "run.name=abc"]) == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(names) == 2 and all(re.fullmatch(r"abc-\d{8}-\d{6}(-2)?", name) for name in names)
    assert "run=runs/abc-" in capsys.readouterr().out


def test_a_new_run_overwrites_nothing(finished, tiny_words, capsys):
    before = snapshot(finished)
    assert train.main([*tiny_words, "--out", str(finished)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert snapshot(finished) == before


def test_resolved_file_trains_the_same(finished, tmp_path, capsys):
    assert train.main(["-c", str(finished / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (finished / name).read_bytes()
    assert "fused: true" in (tmp_path / "b" / "config.yaml").read_text()


def test_print_config_shows_origins_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--print-config", "--fused", "optim.clip=2"]) == 0
    text = capsys.readouterr().out
    for line in (
        r"fused: true +# command line",
        r"clip: 2\.0 +# command line",
        r"eps: 1\.0e-08 +# default",
        r"name: digits +# preset digits",
    ):
        assert re.search(line, text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["digits", "digits"], "wanted one preset"),
        (["digis"], "did you mean 'digits'"),
        (["images"], "data.path: data.source=folder needs the folder that holds train/ and val/"),
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--resume"], "which run"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "--out", "nowhere"], "nowhere"),
        (["-c", "none.yaml"], "none.yaml"),
        (["data.path=none.csv.gz"], "none.csv.gz"),
        (["run.device=cuda:77"], "run.device"),
        (["model.num_classes=9"], "model.num_classes: got 9, wanted at least the data's 10"),
        (["model.in_channels=3"], "images must be (B, 3, H, W), got shape (1, 1, 8, 8)"),
        (["model.image_size=9", "model.patch_size=3"], "height must be a multiple of patch_size 3, got 8"),
        (["model.patch_size=3"], "image_size must be a multiple of patch_size, got height 8"),
    ],
)
def test_wrong_use_is_explained_and_leaves_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train.main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["optim.clip=4"], "cannot change optim.clip 5.0 → 4.0"),
        (["digits"], "cannot change"),
        (["--out", "elsewhere"], "different runs"),
    ],
)
def test_resume_of_something_else_is_refused(finished, words, message, capsys):
    before = snapshot(finished)
    assert train.main(["--resume", str(finished), *words]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(finished) == before


def test_the_first_line_names_the_kernels_that_run(finished, capsys):
    assert train.main(["--resume", str(finished)]) == 0
    assert "fused kernels (cpu)" in capsys.readouterr().out
    with use_backend("reference"):  # as where no library was built
        assert train.main(["--resume", str(finished)]) == 0
    assert "fused kernels (reference)" in capsys.readouterr().out
    with use_backend("cuda"):
        assert train.main(["--resume", str(finished)]) == 1
    assert "backend 'cuda' cannot run layer_norm_2d on cpu" in capsys.readouterr().err


def test_kernels_may_change_on_resume_and_a_setting_may_follow_it(finished, capsys):
    assert train.main(["--out", str(finished), "--no-fused", "--resume", "run.threads=1"]) == 0
    assert "unfused kernels" in capsys.readouterr().out


def test_evaluate_prints_the_runs_own_figure(finished, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(evaluate, "keep_memory", lambda: kept.append(True))
    row = (finished / "metrics.csv").read_text().splitlines()
    last = dict(zip(row[0].split(","), row[-1].split(","), strict=True))
    for flags, column, file in (([], "ema_top1", "ema"), (["--ema"], "ema_top1", "ema"), (["--live"], "top1", "model")):
        assert evaluate.main([str(finished), *flags]) == 0
        out = capsys.readouterr().out
        assert f"{file}.safetensors: 360 samples" in out and f"top-1 {float(last[column]):.2f}%" in out
        assert f"top-5 {float(last[column.replace('top1', 'top5')]):.2f}%" in out
    assert len(kept) == 3


def test_evaluate_names_what_is_missing_or_broken(finished, tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    data = (finished / "ema.safetensors").read_bytes()
    (tmp_path / "ema.safetensors").write_bytes(data[:-100])
    assert evaluate.main([str(tmp_path)]) == 2
    assert "ema.safetensors is broken" in capsys.readouterr().err


def test_images_from_folders_train_too(tmp_path, tiny_words, capsys):
    image_module = pytest.importorskip("PIL.Image")
    for part, count in (("train", 6), ("val", 3)):
        for label in range(2):
            folder = tmp_path / "data" / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 128, (40, 50, 3), dtype=np.uint8) + np.uint8(100 * label)
                image_module.fromarray(pixels).save(folder / f"{i}.png")
    words = [
        "images",
        *tiny_words,
        f"data.path={tmp_path / 'data'}",
        "data.image_size=16",
        "data.batch_size=5",
    ]
    assert train.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "12 to train on, 6 held out" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "run")]) == 0
    assert "6 samples" in capsys.readouterr().out

    broken = tmp_path / "data" / "val" / "class1" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"not an image")
    assert evaluate.main([str(tmp_path / "run")]) == 2
    assert "2.png" in capsys.readouterr().err
    broken.write_bytes(whole)
    (tmp_path / "data" / "train" / "class1" / "2.png").write_bytes(b"not an image")
    assert train.main([*words, "--out", str(tmp_path / "second")]) == 1
    assert "2.png" in capsys.readouterr().err
    (tmp_path / "data" / "val" / "class2").mkdir()
    assert train.main([*words, "--out", str(tmp_path / "third")]) == 2
    assert "different classes: class2" in capsys.readouterr().err and not (tmp_path / "third").exists()


def test_evaluate_says_why_a_backend_asked_for_cannot(finished, capsys):
    with use_backend("cuda"):
        assert evaluate.main([str(finished), "--fused"]) == 2
    assert "cuda: " in capsys.readouterr().err


def test_several_processes_are_refused_instead_of_training_the_same_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--out", str(tmp_path / "run")]) == 2
    assert "without torchrun" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_is_neither_resumed_nor_overwritten(tmp_path, tiny_words, capsys):
    (tmp_path / "config.yaml").write_text(resolve(("preset", read_preset("digits"))).describe())
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert "ended before its first" in capsys.readouterr().err
    assert train.main([*tiny_words, "--out", str(tmp_path)]) == 2
    assert "it has no checkpoint yet, another --out" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, tiny_words, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*tiny_words, "--out", str(tmp_path / "file" / "run")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_an_error_that_names_the_file(tmp_path, tiny_words, capsys, monkeypatch):
    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("optimizer.safetensors.tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert train.main([*tiny_words, "schedule.epochs=1", "schedule.warmup_epochs=0", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"cannot read or write: \[Errno 28\].*/optimizer\.safetensors'", error)
    assert not list(tmp_path.rglob("optimizer.safetensors*")) and not list(tmp_path.rglob("step-*"))
