"""fastrl: reinforcement learning from human feedback on one GPU, or on a laptop."""

__version__ = "0.1.0"
