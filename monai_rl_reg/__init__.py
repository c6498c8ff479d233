"""Deformable image registration by reinforcement learning, for MONAI."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_rl_reg.registration import Registrar, Registration, register

__version__ = "0.1.0"
__all__ = ["Registrar", "Registration", "__version__", "register"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: torch and MONAI take seconds."""
    if name in ("Registrar", "Registration", "register"):
        from monai_rl_reg import registration

        return getattr(registration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
