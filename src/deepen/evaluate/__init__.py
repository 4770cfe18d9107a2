"""Leak-free scores, tasks, stages and their comparison."""
