"""Checkpoints of training: what they hold, and folders that survive kills, faults and damage."""

from fastrl.checkpoints.checkpoint import Checkpoint
from fastrl.checkpoints.state import State
from fastrl.checkpoints.store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore", "State"]
