"""SdP-Net models and their trainer, on the operators of :mod:`sdp_kernels`."""

from .models import SdPNet, SdPNetConfig, create_model, list_models, load_model

__all__ = ["SdPNet", "SdPNetConfig", "create_model", "list_models", "load_model"]
