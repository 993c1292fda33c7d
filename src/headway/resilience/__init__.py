"""Checkpoints and recovery."""
