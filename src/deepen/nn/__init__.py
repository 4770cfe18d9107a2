"""Layers and kernels in pure torch; they know no configuration and no transformers."""
