"""Checkpoints and recovery."""

from headway.resilience.checkpoint import CheckpointError, CheckpointStore, Restored
from headway.resilience.rng import rng_state, set_rng_state

__all__ = ["CheckpointError", "CheckpointStore", "Restored", "rng_state", "set_rng_state"]
