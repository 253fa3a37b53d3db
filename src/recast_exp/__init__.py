"""Hydra-configured experiments on PyTorch Lightning for RECAST (ICLR 2025, arXiv 2411.16870)."""

__version__ = "0.1.0"
