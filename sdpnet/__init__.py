"""SdP-Net models and their trainer, on the operators of :mod:`sdp_kernels`."""

from .models import SdPNet, SdPNetConfig, create_model, list_models

__all__ = ["SdPNet", "SdPNetConfig", "create_model", "list_models"]
