"""Triton kernels, registered by the import in ``torch.ops.sdp_kernels_triton``: for CUDA tensors, or for CPU tensors
where Triton interprets (``TRITON_INTERPRET=1``, set before the import)."""

from . import (  # noqa: F401  each registers its kernels
    _linear_gemm,
    depthwise_conv2d,
    kelu,
    layer_norm_2d,
    linear,
    register_attention,
)
