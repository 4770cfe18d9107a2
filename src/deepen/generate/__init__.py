"""Decoding: sampling, drafts, verification, stopping, and the loop that drives any method."""
