"""The model against its equations, written again on pictures with torch.nn.functional alone."""

import pytest
import torch
from torch.nn import functional as F

from sdpnet import SdPNet, SdPNetConfig

CONFIG = SdPNetConfig(
    num_classes=6, in_channels=2, image_size=(12, 8), patch_size=2, dim=16, blocks=2, conv_blocks=2, kernel_size=5,
    heads=2, registers=3, conv_ratio=3, ffn_ratio=2, activation="kelu", depthwise_bias=True, pointwise_bias=True,
    head_bias=True, dropout=0.0,
)  # fmt: skip


def kelu(x, a=3.5):
    inside = x / 2 * (1 + x / a + torch.sin(torch.pi * x / a) / torch.pi)
    return torch.where(x < -a, 0.0, torch.where(x > a, x, inside))


def norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def conv_mlp(w, at, x, c):
    def norm_2d(name, x):
        return norm(w, at + name, x.permute(0, 2, 3, 1), c.conv_eps).permute(0, 3, 1, 2)

    def pointwise(name, x):
        return F.conv2d(x, w[f"{at}{name}.weight"][:, :, None, None], w[f"{at}{name}.bias"])

    def scale(name):
        return 1 if c.layer_scale is None else w[at + name][:, None, None]

    depthwise = F.conv2d(
        norm_2d("norm1", x), w[f"{at}depthwise.weight"], w[f"{at}depthwise.bias"], padding="same", groups=x.shape[1]
    )
    x = x + scale("scale1") * kelu(pointwise("pointwise", depthwise))
    return x + scale("scale2") * pointwise("project", kelu(pointwise("expand", norm_2d("norm2", x))))


def encoder(w, at, x, registers, c):
    dim, h, wd = x.shape[1:]
    t = torch.cat([registers, x.flatten(2).transpose(1, 2)], 1)
    s1, s2 = (1, 1) if c.layer_scale is None else (w[f"{at}scale1"], w[f"{at}scale2"])
    q, k, v = (norm(w, f"{at}norm1", t, c.token_eps) @ w[f"{at}qkv.weight"].T).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (c.heads, -1)).transpose(1, 2) for z in (q, k, v))
    if c.qk_norm:
        q, k = norm(w, f"{at}q_norm", q, c.token_eps), norm(w, f"{at}k_norm", k, c.token_eps)
    attention = (q @ k.transpose(-1, -2) / (dim // c.heads) ** 0.5).softmax(-1) @ v
    t = t + s1 * (attention.transpose(1, 2).flatten(2) @ w[f"{at}out.weight"].T)
    h_in = norm(w, f"{at}norm2", t, c.token_eps)
    hidden = kelu(h_in @ w[f"{at}up.weight"].T + w[f"{at}up.bias"])
    if c.gated_ffn:
        hidden = hidden * (h_in @ w[f"{at}gate.weight"].T)
    t = t + s2 * (hidden @ w[f"{at}down.weight"].T + w[f"{at}down.bias"])
    r = c.registers
    return t[:, r:].transpose(1, 2).unflatten(2, (h, wd)), t[:, :r]


def position(w, c):
    h, wd = c.grid
    if c.position == "axial":
        rows, columns = w["embedding.position.rows"], w["embedding.position.columns"]
        return torch.stack([torch.stack([rows[i] + columns[j] for j in range(wd)]) for i in range(h)]).permute(2, 0, 1)
    k, field = c.position_kernel, w["embedding.position.field"]
    assert field.shape == (c.dim, h + k, wd + k)
    means = [field[:, i : i + k, j : j + k].mean((1, 2)) for i in range(h) for j in range(wd)]
    return torch.stack(means, -1).unflatten(1, (h, wd))


def forward(w, x, c):
    weight = w["embedding.patch.weight"].unflatten(1, (c.in_channels, *c.patch_size))
    x = F.conv2d(x, weight, stride=c.patch_size) + position(w, c)
    x = kelu(x) if c.embedding_activation == "kelu" else x
    registers = w["embedding.registers"].expand(x.shape[0], -1, -1)
    for i in range(c.blocks):
        at = f"blocks.{i}."
        if not c.conv_first:
            x, registers = encoder(w, f"{at}encoder.", x, registers, c)
        for j in range(c.conv_blocks):
            x = conv_mlp(w, f"{at}convs.{j}.", x, c)
        if c.conv_first:
            x, registers = encoder(w, f"{at}encoder.", x, registers, c)
    x, registers = encoder(w, "encoder.", x, registers, c)
    if c.head == "mean":
        return x.mean((2, 3)) @ w["head.first.weight"].T + w["head.first.bias"]
    y = norm(w, "head.norm", registers.mean(1), c.token_eps) @ w["head.first.weight"].T + w["head.first.bias"]
    return y if c.head == "simple" else torch.tanh(y) @ w["head.second.weight"].T + w["head.second.bias"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_first": False, "head": "simple", "layer_scale": 0.7},
        {"gated_ffn": True, "head": "mean", "embedding_activation": "kelu"},
        {"position": "neighbourhood", "position_kernel": 3, "qk_norm": False, "layer_scale": 0.2},
        {"position": "neighbourhood", "position_kernel": 4, "position_trainable": False, "gated_ffn": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_model_is_its_equations(options, fused):
    torch.manual_seed(0)
    config = CONFIG.replace(**options)
    model = SdPNet(config, fused=fused).double()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    x = torch.randn(2, 2, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), forward(model.state_dict(), x, config), rtol=1e-9, atol=1e-9)
