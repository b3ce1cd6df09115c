"""Checkpoints of training: what they hold, and folders that survive kills, faults and damage."""

from fastrl.checkpoints.state import State

__all__ = ["State"]
