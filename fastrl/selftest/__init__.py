"""Disks that fail: faults at every operation of a checkpoint, and what a power loss leaves."""
