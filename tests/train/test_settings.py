"""Strict configuration: origins, coercion, ranges, and errors that name the nearest right key."""

from __future__ import annotations

import pytest
import yaml

from sdpnet import list_models
from sdpnet.config import ConfigError
from sdpnet.settings import dump, preset_names, read_file, read_overrides, read_preset, resolve


def config_of(*words: str):
    return resolve(("command line", read_overrides(words)))


def write(path, text: str):
    path.write_text(text)
    return path


def test_precedence_and_origins(tmp_path):
    file = write(tmp_path / "mine.yaml", "optim: {clip: 3, weight_decay: 0.3}\nloss:\n")
    resolved = resolve(
        ("preset digits", read_preset("digits")),
        ("mine.yaml", read_file(file)),
        ("command line", read_overrides(["optim.clip=1"])),
    )
    assert (resolved.config.optim.clip, resolved.config.optim.weight_decay) == (1.0, 0.3)
    assert [resolved.origins[f"optim.{k}"] for k in ("clip", "weight_decay", "eps")] == [
        "command line",
        "mine.yaml",
        "default",
    ]
    assert resolved.origins["run.name"] == "preset digits" and resolved.origins["model.dim"].startswith(
        ("model", "preset")
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_says_which_weights_count(name):
    values = read_preset(name)
    config = resolve(("preset", values), ("test", {"data.path": "where the pictures are"})).config
    assert config.run.name == name
    assert "ema.report" in values


def test_resolved_file_is_a_configuration_of_the_same_values(tmp_path):
    first = config_of(
        "optim.eps=1e-9", "model.drop_path=0.1", "model.image_size=[8, 16]", "data.path=null", "augment.flip=true"
    )
    text = first.describe()
    again = resolve(("file", read_file(write(tmp_path / "config.yaml", text))))
    assert dump(again.config) == dump(first.config)
    assert all("  # " in line for line in text.splitlines() if not line.endswith(":"))
    assert yaml.safe_load(text)["optim"]["eps"] == 1e-9


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("'1e-5'", 1e-5), ("2", 2.0), (".5", 0.5), ("1.5E+2", 150.0)])
def test_numbers_are_numbers(text, value):
    eps = config_of(f"optim.eps={text}").config.optim.eps
    assert isinstance(eps, float) and eps == value
    assert config_of(f"model.conv_eps={text}").config.model.model_extra["conv_eps"] == value


def test_numbers_in_files_too(tmp_path):
    file = write(tmp_path / "f.yaml", "optim:\n  eps: 1e-5\n  lr: '3e-4'\nmodel:\n  token_eps: 1e-4\n")
    config = resolve(("f", read_file(file))).config
    assert (config.optim.eps, config.optim.lr, config.model.model_extra["token_eps"]) == (1e-5, 3e-4, 1e-4)


@pytest.mark.parametrize(
    "word, near",
    [
        ("optim.lrr=1", "'optim.lr'"),
        ("optim.weight_decai=1", "'optim.weight_decay'"),
        ("lr=1", "'optim.lr'"),
        ("optimizer.lr=1", "'optim.lr'"),
        ("schedule.batch_size=4", "'data.batch_size'"),
        ("epoch=3", "'schedule.epochs'"),
        ("model.dimm=3", "'model.dim'"),
        ("model.name=sdpnet_digit", "sdpnet_digits"),
        ("schedules.warmup_epochs=1", "'schedule.warmup_epochs'"),
    ],
)
def test_unknown_key_names_the_nearest(word, near):
    with pytest.raises(ConfigError) as error:
        config_of(word)
    assert near in str(error.value) and "command line" in str(error.value)


def test_section_of_an_unknown_key_is_listed():
    with pytest.raises(ConfigError, match=r"section 'loss' has: kind, smoothing, class_reduction"):
        config_of("loss.zzz=1")


@pytest.mark.parametrize(
    "word, key",
    [
        ("optim.lr=.nan", "optim.lr"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.lr=0", "optim.lr"),
        ("optim.clip=-1", "optim.clip"),
        ("optim.betas=[0.9, 1.0]", "optim.betas"),
        ("optim.betas=0.9", "optim.betas"),
        ("ema.decay=1.0", "ema.decay"),
        ("loss.smoothing=1", "loss.smoothing"),
        ("loss.kind=mse", "loss.kind"),
        ("schedule.epochs=0", "schedule.epochs"),
        ("schedule.epochs=2.5", "schedule.epochs"),
        ("schedule.epochs=true", "schedule.epochs: got True (command line): a boolean is no value for it"),
        ("model.blocks=true", "blocks must be an integer, got True"),
        ("schedule.epochs=many", "schedule.epochs"),
        ("schedule.warmup_epochs=100", "schedule.warmup_epochs"),
        ("schedule.cycle_growth=0.5", "schedule.cycle_growth"),
        ("data.batch_size=0", "data.batch_size"),
        ("data.crop_scale=[0.5, 0.1]", "data.crop_scale"),
        ("data.source=folder", "data.path"),
        ("run.seed=-1", "run.seed"),
        ("run.device=tpu", "run.device"),
        ("run.name=a/b", "run.name"),
        ("run.fused=perhaps", "run.fused"),
        ("augment.rotate=.nan", "augment.rotate"),
        ("model.dropout=1.5", "dropout"),
        ("model.dropout=.nan", "model.dropout"),
        ("model.dim=wide", "model.dim"),
        ("model.dim=20", "dim"),
        ("model.activation=gelo", "gelu"),
    ],
)
def test_wrong_values_are_named(word, key):
    with pytest.raises(ConfigError) as error:
        config_of(word)
    assert key in str(error.value)


def test_message_has_value_and_origin():
    with pytest.raises(ConfigError, match=r"optim\.lr: got 'fast' \(command line\)"):
        config_of("optim.lr=fast")


@pytest.mark.parametrize(
    "text, word",
    [
        ("optim: {lr: 1, lr: 2}", "stands twice"),
        ("optim: [1, 2", "not valid YAML"),
        ("- 1", "wanted sections"),
        ("optim: 3", "'optim' wants keys"),
        ("optimm: {lr: 1}", "did you mean"),
        ("loss: {optim.lr: 1}", "unknown key"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, word):
    with pytest.raises(ConfigError, match=word) as error:
        resolve(("mine.yaml", read_file(write(tmp_path / "mine.yaml", text))))
    assert "mine.yaml" in str(error.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        read_preset("digit")
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        read_overrides(["optim.lr"])


@pytest.mark.parametrize("name", list_models())
def test_every_model_can_be_configured(name):
    config = config_of(f"model.name={name}").config
    assert config.model.model_extra["dim"] > 0 and "num_classes" not in config.model.model_extra
