"""Distributed image classification: Ray Train, NVIDIA DALI, PyTorch DDP."""

__version__ = "0.1.0"
