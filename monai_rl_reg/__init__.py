"""Deformable image registration by reinforcement learning, for MONAI."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_rl_reg.dictionary_transform import Registerd
    from monai_rl_reg.registration import Registrar, Registration, register

__version__ = "0.1.0"
__all__ = ["Registerd", "Registrar", "Registration", "__version__", "register"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: torch and MONAI take seconds."""
    if name in __all__:
        from monai_rl_reg import dictionary_transform, registration

        return getattr(dictionary_transform if name == "Registerd" else registration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
