"""Triton kernels, one file per op, installed as ``fastprune.kernels``."""
