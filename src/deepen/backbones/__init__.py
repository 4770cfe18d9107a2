"""Pretrained models: where to find them, where to attach to them, and how to wind their caches back."""
