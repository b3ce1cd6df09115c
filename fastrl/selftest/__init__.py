"""Disks that fail: faults at every operation of a checkpoint, and what a power loss leaves. Files
that attack: `python -m fastrl.selftest.hostile`."""
