"""The README's examples run as they stand, and what it names exists."""

import re
from pathlib import Path

import pytest

import sdp_kernels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run():
    assert len(EXAMPLES) >= 3
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), {})


def test_every_public_operator_has_an_example():
    named = set(re.findall(r"\bK\.(\w+)", "".join(EXAMPLES)))
    operators = {"kelu", "layer_norm_2d", "depthwise_conv2d", "linear", "register_attention", "dropout", "ConvMLP"}
    assert operators <= named
    assert named <= set(sdp_kernels.__all__) | {"conv_mlp"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
