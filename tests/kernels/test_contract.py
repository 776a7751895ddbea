"""Schemas, fakes and strides of every registered kernel, and the hash that ties a library to them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from _cases import CASES, backend_params
from _layouts import layouts, normal
from torch._subclasses import FakeTensorMode

import sdp_kernels
from sdp_kernels._schema_hash import hash_of, read_schemas, schema_hash
from sdp_kernels.backends import BACKENDS
from sdp_kernels.ops import _contract
from sdp_kernels.ops._contract import NAMESPACES, OPERATORS, current_schema_hash

OPS = Path(sdp_kernels.__file__).parent / "ops"
KERNELS = [kernel for kernels in OPERATORS.values() for kernel in kernels]
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
needs_cpu = pytest.mark.skipif(BACKENDS["cpu"].absent is not None, reason=f"cpu: {BACKENDS['cpu'].absent}")


def kernel(name: str):
    return getattr(torch.ops.sdp_kernels_cpp, name).default


def kernel_calls(record) -> dict[str, list[tuple]]:
    """Arguments of every kernel call that the cases' forward and backward passes make on the cpu backend."""
    calls: dict[str, list[tuple]] = {}
    original = _contract.launch

    def spy(backend, name, *args):
        calls.setdefault(name, []).append(tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args))
        return original(backend, name, *args)

    for module in (getattr(sdp_kernels.ops, operator) for operator in OPERATORS):
        if hasattr(module, "launch"):
            record.setattr(module, "launch", spy)
    for case in CASES:
        if OPERATORS[case.operator]:
            leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
            out = case.call("cpu", *leaves)
            sum((y * y).sum() for y in (out if isinstance(out, tuple) else (out,))).backward()
    return calls


@pytest.fixture
def calls(monkeypatch):
    return kernel_calls(monkeypatch)


def test_schemas_stand_in_every_namespace():
    for namespace in NAMESPACES:
        for name in KERNELS:
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            text = str(schema).removeprefix(f"{namespace}::").replace("SymInt", "int")
            assert text.startswith(name), text
            assert not schema.is_mutable, text
            assert all(r.alias_info is None for r in schema.returns), text


def test_every_kernel_has_a_forward_and_a_backward():
    for operator, kernels in OPERATORS.items():
        backwards = {name for name in kernels if name.endswith("_bwd")}
        assert {name.replace("_fwd", "_bwd") for name in kernels} == backwards, operator
        assert all(name.endswith(("_fwd", "_bwd")) for name in kernels)


def test_schema_needs_a_fake():
    with pytest.raises(ValueError, match="fake"):
        _contract.define("unheard_of", {"unheard_of_fwd": "(Tensor x) -> Tensor"}, {})
    assert "unheard_of" not in OPERATORS


@needs_cpu
def test_library_holds_every_kernel_of_an_operator_or_none():
    for name in KERNELS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"sdp_kernels_cpp::{name}", "CPU")
        users = {operator for operator, kernels in OPERATORS.items() if name in kernels}
        assert registered == (users <= BACKENDS["cpu"].operators), name
    assert {"kelu", "layer_norm_2d", "depthwise_conv2d", "linear", "conv_mlp"} <= BACKENDS["cpu"].operators


@needs_cpu
def test_opcheck(calls):
    assert calls.keys() >= set(KERNELS)
    for name, samples in calls.items():
        for arguments in samples:
            torch.library.opcheck(kernel(name), arguments, test_utils=OPCHECKS)


@needs_cpu
def test_strides_and_dtypes_equal_the_fakes(calls):
    """In every layout of every tensor argument, one at a time and all together."""
    for name, samples in calls.items():
        for arguments in samples:
            places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.dim() >= 3]
            for layout in layouts(arguments[places[0]]):
                for chosen in ([places[0]], places[1:], places):
                    odd = list(arguments)
                    for i in chosen:
                        versions = layouts(odd[i])
                        if odd[i].shape == arguments[places[0]].shape:  # statistics stay as a kernel made them
                            odd[i] = versions[layout]
                    compare_with_fake(name, odd)


def compare_with_fake(name: str, arguments: list) -> None:
    real = kernel(name)(*arguments)
    with FakeTensorMode() as mode:
        fake = kernel(name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    both = zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True)
    for i, (a, b) in enumerate(both):
        got, wanted = (a.shape, a.stride(), a.dtype, a.storage_offset()), (b.shape, b.stride(), b.dtype, 0)
        assert got == wanted, f"{name} output {i}: {got}, its fake {wanted}"


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 1, 3, 1)], ids=str)
def test_strides_of_degenerate_pictures(shape):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = normal(*shape, dtype=torch.float32).contiguous(memory_format=memory_format)
        compare_with_fake("kelu_fwd", [x])
        compare_with_fake("kelu_bwd", [x, x])
        compare_with_fake("layer_norm_2d_fwd", [x, None, torch.ones(shape[1]), torch.ones(shape[1]), 1e-6, 0])


@pytest.mark.parametrize("backend", backend_params("layer_norm_2d"))
def test_statistics_are_single_precision(backend):
    if BACKENDS[backend].namespace is None:
        return  # keeps none
    x, ones = normal(2, 6, 3, 4, dtype=torch.bfloat16), torch.ones(6)
    y, mean, rstd, total = kernel("layer_norm_2d_fwd")(x, None, ones, ones, 1e-6, 0)
    assert (y.dtype, mean.dtype, rstd.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert total.numel() == 0
    torch.testing.assert_close(mean, x.float().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, (x.float().var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=1e-6)


@needs_cpu
def test_backward_keeps_what_the_docstring_says():
    """KeLü: x and nothing else. LayerNorm2d: x or the sum, the weight, and 8 bytes per pixel."""
    kept: list[torch.Tensor] = []
    x = normal(2, 6, 4, 5, dtype=torch.bfloat16).requires_grad_()
    weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sdp_kernels.kelu(x, backend="cpu")
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]
        kept.clear()
        sdp_kernels.layer_norm_2d(x, weight, bias, backend="cpu")
        extra = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
        assert sum(t.nbytes for t in extra) == 8 * 2 * 4 * 5
        kept.clear()
        total, _ = sdp_kernels.layer_norm_2d(x, weight, bias, residual=x.detach(), backend="cpu")
        assert {t.data_ptr() for t in kept} >= {total.data_ptr()} and x.data_ptr() not in {t.data_ptr() for t in kept}


def test_hash_is_the_same_from_the_files_and_from_the_process():
    assert schema_hash(OPS) == current_schema_hash() == hash_of(read_schemas(OPS))
    assert re.fullmatch("[0-9a-f]{16}", current_schema_hash())


def test_hash_changes_with_any_name_or_text():
    schemas = read_schemas(OPS)
    name = next(iter(schemas))
    renamed = {("other" if n == name else n): t for n, t in schemas.items()}
    hashes = {hash_of(s) for s in (schemas, renamed, {**schemas, name: schemas[name] + " "}, {**schemas, "new": "()"})}
    assert len(hashes) == 4
    assert hash_of(dict(reversed(schemas.items()))) == hash_of(schemas)


def test_two_files_may_not_define_the_same_schema(tmp_path):
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text('SCHEMAS = {"x_fwd": "(Tensor x) -> Tensor"}\n')
    with pytest.raises(ValueError, match="x_fwd"):
        read_schemas(tmp_path)


@needs_cpu
def test_library_was_built_from_these_schemas():
    from sdp_kernels import _C

    assert _C.schema_hash == current_schema_hash()


@needs_cpu
@pytest.mark.levels
def test_level_is_the_one_asked_for():
    """The highest that the processor has, or the one that test_levels.py asks for in its processes."""
    from sdp_kernels import _C

    assert _C.cpu_level == int(os.environ.get("SDP_KERNELS_CPU_LEVEL", _C.cpu_level_detected))
