"""Which Megatron-Core this package is written for; every door asks before it does anything else."""

from megatron_mhc.releases import SUPPORTED, release

__all__ = ["SUPPORTED", "SUPPORTED_BRIDGE", "check_version"]

SUPPORTED_BRIDGE = ">=0.6.2,<0.7"  # of megatron-bridge; not asked for, its symbols are


def check_version() -> None:
    """Raise ValueError unless the installed megatron-core is one that this package was written for."""
    release()
