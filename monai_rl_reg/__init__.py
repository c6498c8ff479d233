"""Deformable image registration by reinforcement learning, for MONAI."""

__version__ = "0.1.0"
