"""Where a step's time and memory go, by torch.profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

GROUPS = (
    ("optimizer and average", r"adam|_foreach|clip_grad|linalg_vector_norm|_amp_"),
    ("depthwise convolution", r"depthwise_conv|aten::.*convolution|conv2d|thnn_conv|conv_dw"),
    ("attention", r"scaled_dot_product|register_attention|_flash_attention|_efficient_attention|aten::_?softmax"),
    ("LayerNorm", r"layer_norm|aten::(mean|var|rsqrt|sqrt|pow)"),
    ("compiled kernels", r"triton_|cpp_fused|graph_\d+_|cpp_.*fused"),
    ("matrix products", r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|mkldnn_linear|_mkldnn)|gemm|mkldnn::_linear"),
    ("activation and epilogue", r"linear_epilogue|kelu|gelu|tanh|aten::(sin|where|clamp|le|ge|gt|lt|bitwise_and)"),
    ("copies and casts", r"aten::(copy_|_to_copy|to|cat|clone|contiguous|fill_|zero_)"),
    ("element-wise", r"aten::(add|sub|mul|div|neg|sum|masked_fill)"),
)
"""Name → pattern of the operators; the first that matches counts. What matches none is "other"."""


def shares(step: Callable[[], object], device: str) -> dict[str, float]:
    """Group → its share of a step's time (of the device's on a GPU), by each operator's own time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return shares_of(profiler.key_averages(), device)


def shares_of(events: Iterable, device: str) -> dict[str, float]:
    """Group → its share of the events' time.

    A GPU's profile tells each kernel's time twice, as its operator's and under the kernel's own name, and that of a
    user's annotation once more. Operators count; what none of them launched is "other".
    """
    events, on_gpu = list(events), device == "cuda"
    spent: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU and not (on_gpu and event.is_user_annotation):
            spent[group_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    if on_gpu:
        kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
        spent["other"] += max(0.0, sum(e.self_device_time_total for e in kernels) - spent.total())
    total = spent.total() or 1.0
    return {name: spent[name] / total for name, _ in (*GROUPS, ("other", "")) if spent[name]}


def group_of(operator: str) -> str:
    """The group that an operator's time counts for."""
    return next((name for name, pattern in GROUPS if re.search(pattern, operator, re.IGNORECASE)), "other")


def peak_memory(step: Callable[[], object], release: Callable[[], object], device: str) -> int:
    """Bytes that a step holds at most, gradients included, beyond what was there after ``release()`` freed the last."""
    step()
    release()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
