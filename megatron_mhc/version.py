"""Which Megatron-Core this package is written for; every door asks before it does anything else."""

from importlib.util import find_spec

from packaging.specifiers import SpecifierSet

SUPPORTED = ">=0.19.0,<0.20"  # pyproject.toml says the same
SUPPORTED_BRIDGE = ">=0.6.2,<0.7"  # of megatron-bridge; not asked for, its symbols are


def check_version() -> None:
    """Raise ValueError unless the installed megatron-core is one that this package was written for."""
    from megatron.core import __version__ as version

    if find_spec("megatron.core.transformer.hyper_connection") is not None:
        raise ValueError(
            f"megatron-core {version} has hyper-connections of its own: use those, or install "
            f"megatron-core {SUPPORTED}"
        )
    # A git checkout appends +<commit> to the version.
    if not SpecifierSet(SUPPORTED, prereleases=True).contains(version.split("+")[0]):
        raise ValueError(f"megatron-core {version} is not supported: install megatron-core {SUPPORTED}")
