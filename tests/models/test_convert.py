"""Conversion of the original's checkpoints: files, names, errors; nothing half-written, nothing overwritten unasked."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from golden import FILES, golden

from sdpnet import SdPNet, convert
from sdpnet.models.files import load_model, save_model
from sdpnet.original import config_from_original, entries, from_original, to_original

GELU = next(path for path in FILES if "gelu" in path.stem)


@pytest.fixture(scope="module")
def original():
    """(the original's options, state dict, input, logits)."""
    _, state, rest = golden(GELU)
    with safetensors.safe_open(str(GELU), "pt") as file:
        options = json.loads(file.metadata()["config"])
    return options, state, rest["input"], rest["logits"]


def write(path, state, options):
    """The original's checkpoint in the form that the file's suffix says."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, None if options is None else {"config": json.dumps(options)})
    else:
        torch.save({"model_state_dict": state, "model_config": options, "epoch": 3, "optimizer_state": {}}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_converted_model_gives_the_originals_logits(tmp_path, original, suffix, prefix):
    options, state, images, logits = original
    source = write(tmp_path / f"old{suffix}", {prefix + k: v for k, v in state.items()}, options)
    target = tmp_path / "model.safetensors"
    config = convert.convert(source, target)
    model = load_model(target).eval()
    assert model.config == config and config.registers == 4
    torch.testing.assert_close(model(images), logits, rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, target.name])


def test_averages_without_options_and_with_float_index_buffers(tmp_path, original):
    options, state, images, logits = original
    averages = {k: v.float() for k, v in state.items()}
    torch.save(averages, tmp_path / "ema_model.pt")
    with pytest.raises(ValueError, match="--config"):
        convert.convert(tmp_path / "ema_model.pt", tmp_path / "m.safetensors")
    (tmp_path / "config.yaml").write_text(f"model_config: {json.dumps(options)}\n")
    read = convert.read_options(tmp_path / "config.yaml")
    convert.convert(tmp_path / "ema_model.pt", tmp_path / "m.safetensors", options=read)
    torch.testing.assert_close(load_model(tmp_path / "m.safetensors").eval()(images), logits, rtol=1e-5, atol=1e-6)


def test_names_go_there_and_back(original):
    options, state, _, _ = original
    config = config_from_original(options, registers=5)
    back = to_original(from_original(state, config), config, {k: v.shape for k, v in state.items()})
    assert set(state) - set(back) == {k for k in state if not state[k].is_floating_point()}
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_tensor_of_ours_has_its_place(path):
    config, _, _ = golden(path)
    names = [entry.ours for entry in entries(config)]
    assert len(names) == len(set(names)) and set(names) == set(SdPNet(config).state_dict())


def test_smaller_grid_and_registers_cut_the_tables(original):
    options, state, _, _ = original
    config = config_from_original({**options, "max_image_size": [4, 4]}, registers=2, grid=(3, 2))
    ours = from_original(state, config)
    assert config.image_size == (24, 16)
    assert torch.equal(ours["embedding.position.rows"], state["embedding_layer.horizontal_embedding_layer.weight"][:3])
    assert torch.equal(ours["embedding.position.columns"], state["embedding_layer.vertical_embedding_layer.weight"][:2])
    assert torch.equal(ours["embedding.registers"], state["embedding_layer.register_embedding_layer.weight"][:2])


def test_neighbourhood_embedding(original):
    """The original adds AvgPool(bone[:, :, :H+k-1, :W+k-1]); registers are register_embedding_layer(register[:n+1])."""
    options, state, images, _ = original
    options = {**options, "conv_embedding": True, "conv_embedding_kernel_size": 3, "max_image_size": [4, 6]}
    state = {k: v for k, v in state.items() if not k.startswith("embedding_layer.")}
    generator = torch.Generator().manual_seed(0)
    state["embedding_layer.bone"] = torch.randn(1, 32, 7, 9, generator=generator)
    state["embedding_layer.register"] = torch.arange(1, 6, dtype=torch.int)
    state["embedding_layer.register_embedding_layer.weight"] = torch.randn(5, 32, generator=generator)
    config = config_from_original(options)
    assert config.registers == 4 and config.grid == (4, 6) and not config.position_trainable
    model = SdPNet(config)
    model.load_state_dict(from_original(state, config))
    assert "embedding.position.field" not in dict(model.named_parameters())
    wide = torch.cat([images, images[..., :16]], dim=-1)
    buffer = model.embedding(wide, (4, 6))
    pooled = torch.nn.AvgPool2d(3, stride=1)(state["embedding_layer.bone"][:, :, :6, :8])
    want = torch.nn.functional.conv2d(wide, state["conv_init.conv.weight"], stride=8) + pooled
    torch.testing.assert_close(buffer[:, 4:].transpose(1, 2).unflatten(2, (4, 6)), want)
    registers = torch.nn.functional.embedding(
        state["embedding_layer.register"][:4].long(), state["embedding_layer.register_embedding_layer.weight"]
    )
    assert torch.equal(buffer[0, :4], registers)
    with pytest.raises(ValueError, match="registers must be at most 4"):
        config_from_original(options, registers=5)


def test_rows_are_the_originals_horizontal_table():
    options = {"max_image_size": [4, 6], "patch_size": 8, "embedding_dim": 32}
    config = config_from_original(options)
    assert config.grid == (6, 4) and config.image_size == (48, 32)


def test_missing_unknown_and_misshapen_tensors_are_all_named(tmp_path, original):
    options, state, _, _ = original
    state = dict(state)
    del state["blocks.0.t_block.q_proj.weight"]
    state["blocks.7.t_block.q_proj.weight"] = torch.zeros(2)
    state["conv_init.conv.weight"] = torch.zeros(32, 3, 4, 4)
    state["embedding_layer.register_embedding_layer.weight"] = torch.zeros(3, 32)
    source = write(tmp_path / "old.safetensors", state, options)
    with pytest.raises(ValueError) as error:
        convert.convert(source, tmp_path / "new.safetensors")
    for text in (
        "missing blocks.0.t_block.q_proj.weight",
        "unknown blocks.7.t_block.q_proj.weight",
        "misshapen conv_init.conv.weight: 32×3×4×4, wanted 32×3×8×8",
        "misshapen embedding_layer.register_embedding_layer.weight: 3×32",
    ):
        assert text in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"embeding_dim": 32}, "did you mean 'embedding_dim'"),
        ({"n_head": 3}, "heads"),
        ({"activation": "gellu"}, "activation"),
        ({"conv_first": "yes"}, "conv_first"),
        ({"stochastic_depth_p": [0.0, 1.0]}, "drop_path"),
        ({"stochastic_depth_p": 0.1}, "stochastic_depth_p"),
        ({"max_image_size": 4}, "max_image_size"),
        ({"max_num_registers": 0}, "max_num_registers"),
    ],
    ids=str,
)
def test_wrong_options_of_the_original(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        config_from_original(options)


def damage(kind, tmp_path, original):
    options, state, _, _ = original
    path = tmp_path / ("old.pt" if "pickle" in kind else "old.safetensors")
    if kind == "absent":
        return path
    if kind == "code in a pickle":
        torch.save({"model_state_dict": state, "model_config": options, "more": subprocess.Popen}, path)
        return path
    if kind == "a list in a pickle":
        torch.save([1, 2], path)
        return path
    if kind == "a word in a pickle":
        torch.save({"a": "b"}, path)
        return path
    if kind == "a text for a pickle":
        path.write_text("root:x:0:0:root:/root:/bin/bash\n")
        return path
    if kind == "options that are no JSON":
        safetensors.torch.save_file(state, path, {"config": "{"})
        return path
    write(path, state, options)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "a cut pickle": whole[:1000]}[kind])
    return path


KINDS = ["absent", "empty", "cut", "options that are no JSON"]
KINDS += ["a text for a pickle", "a cut pickle", "code in a pickle", "a list in a pickle", "a word in a pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_named_and_nothing_is_written(tmp_path, original, kind, capsys):
    source = damage(kind, tmp_path, original)
    target = tmp_path / "model.safetensors"
    assert convert.main([str(source), str(target)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and str(source) in message and "Traceback" not in message
    assert not target.exists()


def test_nothing_is_overwritten_unless_asked(tmp_path, original, capsys):
    options, state, _, _ = original
    source, target = write(tmp_path / "old.pt", state, options), tmp_path / "model.safetensors"
    target.write_text("precious")
    assert convert.main([str(source), str(target)]) == 1
    assert target.read_text() == "precious" and "overwrite" in capsys.readouterr().err
    assert convert.main([str(source), str(target), "--overwrite", "--registers", "5"]) == 0
    assert load_model(target).config.registers == 5
    assert convert.main([str(source), str(tmp_path / "none" / "model.safetensors")]) == 1
    assert convert.main([str(source), str(tmp_path)]) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, original, monkeypatch):
    options, state, _, _ = original
    source, target = write(tmp_path / "old.pt", state, options), tmp_path / "model.safetensors"
    target.write_text("precious")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert.convert(source, target, overwrite=True)
    assert target.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_our_own_files(tmp_path, original):
    config, state, rest = golden(GELU)
    model = SdPNet(config).eval()
    save_model(model.state_dict(), config, tmp_path / "a.safetensors")
    assert torch.equal(load_model(tmp_path / "a.safetensors", fused=False).eval()(rest["input"]), model(rest["input"]))
    write(tmp_path / "b.safetensors", state, original[0])
    with pytest.raises(ValueError, match="metadata"):
        load_model(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is a model of sdpnet already"):
        convert.convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors")
    for options in ("{", "[]", '{"an option of tomorrow": 1}'):
        safetensors.torch.save_file(state, tmp_path / "e.safetensors", {"sdpnet_config": options})
        with pytest.raises(ValueError, match=r"e\.safetensors: its options"):
            load_model(tmp_path / "e.safetensors")
    half = {k: v for k, v in model.state_dict().items() if "head" not in k}
    save_model(half, config, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"head\.first\.weight"):
        load_model(tmp_path / "c.safetensors")


def test_command_line(tmp_path, original):
    options, state, _, _ = original
    source = write(tmp_path / "old.safetensors", state, None)
    (tmp_path / "config.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "sdpnet.convert", source, tmp_path / "new.safetensors", "--grid", "3", "4"]
    done = subprocess.run([*command, "--config", tmp_path / "config.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "24×32 px" in done.stdout
    assert load_model(tmp_path / "new.safetensors").config.grid == (3, 4)
