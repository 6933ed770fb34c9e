"""Triton kernels, installed as csdiv.kernels."""

UNAVAILABLE_REASON = "not built: this version has no Triton kernels yet"
