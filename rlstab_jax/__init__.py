"""Stable reinforcement learning of mixture-of-experts language models in JAX (arXiv 2512.01374)."""

__version__ = "0.1.0"
