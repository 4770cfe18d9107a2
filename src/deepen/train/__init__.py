"""The training loop: one for every method and phase, resumable."""
