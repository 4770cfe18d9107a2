"""Many requests through one model at once, each answered as if it were alone."""
