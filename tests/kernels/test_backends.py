"""How a backend is chosen, asked for and refused; libraries that are stale, missing or set wrongly; the info table."""

from __future__ import annotations

import logging

import pytest
import torch
from _cases import CASES, cpu_backends
from _layouts import normal
from _subprocess import python
from torch._subclasses import FakeTensorMode

import sdp_kernels as sk
from sdp_kernels import backends, info
from sdp_kernels._device import type_of_device
from sdp_kernels.backends import BACKENDS, UnsupportedError, choose
from sdp_kernels.ops._contract import OPERATORS

X = torch.zeros(2, 3, 4, 5)
ONE_OF_EACH = {case.operator: case for case in reversed(CASES)}
needs_cpu = pytest.mark.skipif(BACKENDS["cpu"].absent is not None, reason=f"cpu: {BACKENDS['cpu'].absent}")


def call(operator: str, backend: str | None = None, dtype: torch.dtype = torch.float32):
    case = ONE_OF_EACH[operator]
    return case.call(backend, *case.inputs(dtype))


@pytest.mark.parametrize("operator", OPERATORS)
def test_automatic_choice_is_the_first_that_can(operator):
    can = [n for n, b in BACKENDS.items() if not b.unsupported_reasons(operator, "cpu", torch.float32)]
    assert choose(operator, X) == can[0]
    assert set(can) == {n for n in cpu_backends(operator) if BACKENDS[n].absent is None}


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda:0", "xpu:1"])
def test_type_of_device(device):
    with FakeTensorMode():
        x = torch.empty(3, device=device)
    assert type_of_device(x) == device.partition(":")[0]


@needs_cpu
def test_kernels_are_chosen_where_there_are_some():
    assert choose("kelu", X) == choose("layer_norm_2d", X) == "cpu"


@pytest.mark.parametrize("operator", OPERATORS)
def test_argument_forces_and_refuses(operator):
    for name in BACKENDS:
        if name in cpu_backends(operator) and BACKENDS[name].absent is None:
            call(operator, name)
            continue
        with pytest.raises(UnsupportedError) as error:
            call(operator, name)
        message = str(error.value)
        assert repr(name) in message and operator in message and "torch.float32" in message
        for other, backend in BACKENDS.items():
            reasons = backend.unsupported_reasons(operator, "cpu", torch.float32)
            assert f"  {other}: {'; '.join(reasons) or 'can'}" in message.splitlines()


@pytest.mark.parametrize("operator", OPERATORS)
def test_forced_backend_runs_every_operator_it_has(operator):
    for name in cpu_backends(operator):
        if BACKENDS[name].absent is None:
            with sk.use_backend(name):
                call(operator)


@pytest.mark.parametrize("operator", OPERATORS)
def test_forced_backend_that_cannot_is_refused(operator):
    for name in BACKENDS.keys() - set(cpu_backends(operator)) - {"composed"}:
        with sk.use_backend(name), pytest.raises(UnsupportedError, match=name):
            call(operator)


@pytest.mark.parametrize("operator", [op for op in OPERATORS if "composed" not in cpu_backends(op)])
def test_parts_of_composed_operators_choose_for_themselves(operator):
    with sk.use_backend("composed"):
        call(operator)
    with pytest.raises(UnsupportedError, match="composed"):
        call(operator, "composed")


def test_unknown_names_are_told_the_known_ones():
    for ask in (lambda: sk.kelu(X, backend="cpuu"), lambda: sk.use_backend("cpuu").__enter__()):
        with pytest.raises(ValueError, match=r"cpu, .*reference, got 'cpuu'"):
            ask()


@pytest.mark.parametrize("operator", [*OPERATORS, "activation"])
def test_unknown_name_is_refused_by_every_operator(operator):
    with pytest.raises(ValueError, match="backend must be one of"):
        sk.activation(X, "gelu", backend="cpuu") if operator == "activation" else call(operator, "cpuu")


def test_argument_goes_before_the_context_and_contexts_nest_and_end(monkeypatch):
    monkeypatch.setattr(backends, "_forced", None)
    automatic = choose("kelu", X)
    with sk.use_backend("reference"):
        assert choose("kelu", X) == "reference"
        assert choose("kelu", X, automatic) == automatic
        with sk.use_backend(None):
            assert choose("kelu", X) == automatic
        assert choose("kelu", X) == "reference"
        with pytest.raises(RuntimeError, match="mine"), sk.use_backend(None):
            raise RuntimeError("mine")
        assert choose("kelu", X) == "reference"
    assert choose("kelu", X) == automatic


@needs_cpu
def test_backward_runs_on_the_forwards_backend():
    x = normal(100, dtype=torch.float32, scale=2).requires_grad_()
    y = sk.kelu(x, backend="cpu")
    with sk.use_backend("reference"):
        (inside,) = torch.autograd.grad(y.sum(), x)
    (outside,) = torch.autograd.grad(sk.kelu(x, backend="cpu").sum(), x)
    (reference,) = torch.autograd.grad(sk.kelu(x, backend="reference").sum(), x)
    assert torch.equal(inside, outside) and not torch.equal(inside, reference)


def test_meta_tensors_run_on_the_reference():
    """So that a model's shapes can be computed without memory."""
    for operator, case in ONE_OF_EACH.items():
        inputs = [x.to("meta").requires_grad_() for x in case.inputs(torch.float32)]
        real = case.call(None, *case.inputs(torch.float32))
        if "masks" in case.name:
            continue  # their rng is on the CPU
        out = case.call(None, *inputs)
        for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (out, real)), strict=True):
            assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype, operator


def test_falling_back_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_reported", set())
    monkeypatch.setattr(backends, "_forced", None)
    for name in ("cpu", "composed"):
        monkeypatch.setattr(BACKENDS[name], "absent", f"{name} is out")
    with caplog.at_level(logging.INFO, logger="sdp_kernels"):
        for _ in range(3):
            sk.kelu(X)
            sk.kelu(X, backend="reference")
        sk.kelu(X.to("meta"))
        sk.linear(X, torch.zeros(2, 5))
    first, second = ((r.levelname, r.getMessage()) for r in caplog.records)
    assert first[0] == "WARNING" and "kelu" in first[1] and "cpu is out" in first[1]
    assert second[0] == "INFO" and "linear" in second[1]


def test_environment_forces():
    code = "import torch, sdp_kernels.backends as b; print(b.choose('kelu', torch.zeros(1)))"
    for value, wanted in (("reference", "reference"), ("", choose("kelu", X))):
        done = python("-c", code, SDP_KERNELS_BACKEND=value)
        assert done.returncode == 0 and done.stdout.split() == [wanted], done.stderr


def test_environment_with_an_unknown_name_fails_the_import():
    done = python("-c", "import sdp_kernels", SDP_KERNELS_BACKEND="tritn")
    assert done.returncode != 0
    assert "ValueError" in done.stderr and "SDP_KERNELS_BACKEND" in done.stderr and "'tritn'" in done.stderr
    assert all(name in done.stderr for name in BACKENDS)


def test_environment_with_a_backend_that_cannot_is_refused_at_the_call():
    code = "import torch, sdp_kernels; sdp_kernels.kelu(torch.zeros(1))"
    done = python("-c", code, SDP_KERNELS_BACKEND="cuda")
    assert done.returncode != 0 and "UnsupportedError" in done.stderr and "reference: can" in done.stderr


STALE = """
import importlib.util, pathlib, sys
import torch
where = pathlib.Path(importlib.util.find_spec("sdp_kernels").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("sdp_kernels._schema_hash", where / "_schema_hash.py")
module = sys.modules["sdp_kernels._schema_hash"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.hash_of = lambda schemas: "0123456789abcdef"  # as if the schemas had changed since the build
import sdp_kernels
from sdp_kernels.backends import BACKENDS
print(BACKENDS["cpu"].absent)
print(BACKENDS["cpu"].unsupported_reasons("kelu", "cpu", torch.float32))
assert not BACKENDS["cpu"].operators
assert sdp_kernels.kelu(torch.ones(3)).shape == (3,)
try:
    sdp_kernels.kelu(torch.ones(3), backend="cpu")
except sdp_kernels.UnsupportedError as error:
    print(error)
"""


@needs_cpu
def test_stale_library_is_refused_with_its_reason():
    done = python("-c", STALE)
    assert done.returncode == 0, done.stderr
    absent, reasons, error = done.stdout.split("\n", 2)
    assert all("stale" in text and "0123456789abcdef" in text and "pip install" in text for text in (absent, reasons))
    assert f"cpu: {absent}" in error


MISSING = """
import sys
sys.modules["sdp_kernels._C"] = None  # the import fails as if it had not been built
import torch, sdp_kernels
from sdp_kernels import info
from sdp_kernels.backends import BACKENDS
assert BACKENDS["cpu"].absent and not BACKENDS["cpu"].operators
x = torch.linspace(-4, 4, 9, requires_grad=True)
sdp_kernels.kelu(x).sum().backward()
print(BACKENDS["cpu"].absent)
print(info.report())
"""


def test_nothing_needs_a_library():
    done = python("-c", MISSING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] in "\n".join(done.stdout.splitlines()[1:])


def test_info_lists_every_operator_on_every_backend():
    done = python("-m", "sdp_kernels.info")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split() == list(BACKENDS))
    rows = {words[0]: words[1:] for words in (line.split() for line in lines[header + 1 : header + 1 + len(OPERATORS)])}
    assert rows.keys() == OPERATORS.keys()
    for operator, cells in rows.items():
        assert len(cells) == len(BACKENDS) and set(cells) <= {"yes", "no"}, operator
        assert cells[list(BACKENDS).index("reference")] == "yes"
    assert torch.__version__ in done.stdout and "_C" in done.stdout


def test_every_no_of_the_table_has_a_reason():
    report = info.report()
    for operator, cells in info.table().items():
        for name, why in cells.items():
            assert why == [] or f"{name}: {'; '.join(why)}" in report, (operator, name)
        assert cells["reference"] == []
