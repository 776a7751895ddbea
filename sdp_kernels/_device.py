"""Which kind of device a tensor is on, asked in every call of an operator."""

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def type_of_device(x: Tensor) -> str:
    """``x.device.type``, which writes a new string at each call: that costs more than all else here."""
    if x.is_cuda:
        return "cuda"
    return "cpu" if x.device == _CPU else x.device.type
