"""Closed-form divergences between Gaussian mixtures, exact and fast, for PyTorch."""

from csdiv import nn
from csdiv.backends import BackendStatus, available_backends, backend_status
from csdiv.functional import (
    component_log_overlap,
    cs_divergence,
    cs_regularizer,
    log_overlap,
    pairwise_log_overlap,
    renyi2_entropy,
)
from csdiv.mixture import GaussianMixture

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "GaussianMixture",
    "available_backends",
    "backend_status",
    "component_log_overlap",
    "cs_divergence",
    "cs_regularizer",
    "log_overlap",
    "nn",
    "pairwise_log_overlap",
    "renyi2_entropy",
]
