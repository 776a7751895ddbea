"""One thread unless a test asks for more: the tensors are small, and other work on the machine then costs less time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdp_kernels.backends import BACKENDS

# Kernels for one kind of processor; a skip would say that something is missing here.
collect_ignore = [] if BACKENDS["cpu"].multiplies else ["test_linear_gemm.py"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_report_header() -> str:
    if collect_ignore:
        return f"left out: {', '.join(collect_ignore)} (on this processor PyTorch's GEMMs are the faster ones)"
    return f"GEMMs of our own: tested for {', '.join(sorted(map(str, BACKENDS['cpu'].multiplies)))}"


def pytest_collection_modifyitems(items):
    """These are the fourth proof: schemas, fakes, opcheck, torch.compile and gradcheck on the host."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.proof("host"))
