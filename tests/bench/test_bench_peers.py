"""Other libraries: found, told apart from namesakes, and refused with a reason."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from bench import peers
from bench.cases import Case, UnusableError


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make importable packages from a mapping of file to content; whatever of that name is really there is hidden."""

    def make(files: dict[str, str]) -> None:
        tops = {name.partition("/")[0].removesuffix(".py") for name in files}
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        for loaded in list(sys.modules):
            if loaded.partition(".")[0] in tops:
                monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    yield make
    for loaded in list(sys.modules):
        if getattr(sys.modules[loaded], "__file__", None) and str(tmp_path) in str(sys.modules[loaded].__file__):
            del sys.modules[loaded]


@pytest.fixture
def absent(monkeypatch):
    """Nothing but the standard finders' answer "not there" for these names."""
    real = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n.partition(".")[0] in names else real(n, *a)
        )

    return hide


def reason(name: str, device: str = "cuda") -> str:
    with pytest.raises(UnusableError) as caught:
        peers.find(name, device)
    return str(caught.value)


APEX = "apex/normalization/fused_layer_norm.py"
NVIDIA = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    APEX: "def fused_layer_norm_affine(x, weight, bias, shape, eps): return x",
}


@pytest.mark.parametrize("name", list(peers.DEVICES))
def test_an_absent_library_is_told(name, absent) -> None:
    absent("timm", "liger_kernel", "quack", "apex", "xformers")
    assert reason(name).startswith("not installed")


def test_the_registrys_apex_is_recognised_and_not_used(install) -> None:
    install({"apex/__init__.py": "", "apex/models.py": ""})
    assert "not NVIDIA's" in reason("apex") and "unrelated project" in reason("apex")


def test_nvidias_apex_without_its_extension_is_told(install, monkeypatch) -> None:
    install(NVIDIA)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)  # makes importing it fail
    assert "without its compiled extension" in reason("apex")


def test_nvidias_apex_with_its_extension_is_found(install) -> None:
    install(NVIDIA | {"fused_layer_norm_cuda.py": ""})
    assert peers.find("apex").__name__ == "fused_layer_norm_affine"
    assert reason("apex", "cpu") == "runs on cuda only, not on cpu"


def test_a_library_that_does_not_import_is_a_reason(install) -> None:
    install({"liger_kernel/__init__.py": "raise OSError('libcuda.so.1: cannot open')"})
    told = reason("Liger-Kernel")
    assert "installed, but" in told and "OSError: libcuda.so.1: cannot open" in told


def test_a_version_without_the_function_is_a_reason(install) -> None:
    install({"timm/__init__.py": "", "timm/layers.py": ""})
    assert reason("timm", "cpu") == "this version of timm has no timm.layers.LayerNorm2d"


def test_timm_runs_its_own_code_on_our_parameters(install) -> None:
    install({
        "timm/__init__.py": "",
        "timm/layers.py": "import torch\n"
        "class LayerNorm2d(torch.nn.LayerNorm):\n"
        "    def forward(self, x):\n"
        "        return x * self.weight[:, None, None] + self.eps\n",
    })  # fmt: skip
    function = peers.layer_norm("timm", Case("layer_norm_2d", (1, 2, 1, 1)), eps=0.5)
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    y = function(torch.ones(1, 2, 1, 1), weight, torch.nn.Parameter(torch.zeros(2)))
    assert y.flatten().tolist() == [2.5, 3.5]
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert gradient.tolist() == [1.0, 1.0]


def test_survey_lists_every_library_with_a_reason_or_none(absent) -> None:
    absent("liger_kernel", "quack", "apex", "xformers")
    rows = {peer.name: peer for peer in peers.survey("cpu")}
    assert set(rows) == set(peers.DEVICES)
    assert all(rows[name].reason.startswith("not installed") for name in ("Liger-Kernel", "quack", "apex", "xformers"))
    table = peers.table(list(rows.values())).splitlines()
    assert len(table) == 1 + len(rows) and table[0].startswith("library")
