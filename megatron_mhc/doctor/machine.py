"""What is installed on a machine, and which kernels serve there."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_mhc import __version__
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.doctor.part import Part, one_line
from megatron_mhc.version import SUPPORTED, check_version

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
ON_CPU = "not used"  # what `choose` takes for GPUs where a command runs on a CPU
# Not what may hold a name, an address or a key.
VARIABLES = (
    VARIABLE,
    "CUDA_VISIBLE_DEVICES",
    "NCCL_MAX_CTAS",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_NCCL_BLOCKING_WAIT",
    "TRITON_INTERPRET",
)


class Machine(Part):
    """What is installed here.

    Where there is no GPU, Megatron is imported on a CPU that stands in for one.
    """

    title = "installed"

    def __init__(self) -> None:
        super().__init__()
        self.gpus = _or_none(_gpus)
        self.say("megatron-mhc", f"{__version__} in {Path(__file__).parents[1]}")
        self.say("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
        self.say("torch", _package("torch", "torch", lambda torch: f", CUDA {torch.version.cuda}"))
        nccl = _or_none(lambda: ".".join(map(str, _torch().cuda.nccl.version())))
        asked = MHCConfig(), 4096, "bfloat16", self.gpus
        serves = _or_none(lambda: explained(choose(*asked), *asked))
        environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        self.megatron()
        for name, module in (
            ("transformer-engine", "transformer_engine.pytorch"),
            ("apex", "apex"),
            ("triton", "triton"),
            ("cuda-bindings", "cuda.bindings.nvrtc"),
        ):
            self.say(name, _package(name, module))
        self.say("NCCL", nccl)
        self.say("driver", _or_none(_driver))
        self.say("GPU", self.gpus)
        self.say("NVLink", _or_none(lambda: links(_nvidia_smi("topo", "-m"))))
        self.say("default back end", serves)
        for name, value in environment.items():
            self.say(name, value or "empty")

    def megatron(self) -> None:
        """Megatron-Core's version and place, and whether the symbols that we use are as we know them."""
        if find_spec("megatron") is None:
            self.say("megatron-core", "not installed")
            self.in_the_way.append(f"megatron-core is not installed: pip install 'megatron-core{SUPPORTED}'")
            return
        try:
            if self.gpus == "none":
                _stand_in()
            core = importlib.import_module("megatron.core")
        except Exception as error:
            self.say("megatron-core", "cannot be imported")
            self.in_the_way.append(f"megatron-core cannot be imported: {one_line(error)}")
            return
        place = Path(str(core.__file__)).parent
        self.say("megatron-core", f"{core.__version__} in {place}; {SUPPORTED} and main are supported")
        training = self.asks(lambda: find_spec("megatron.training")) is not None
        self.say("megatron.training", "there" if training else "not there; only the library works")
        try:
            check_version()
            from megatron_mhc import hooks

            hooks.register(training, training).revert()
        except Exception as error:
            self.in_the_way.append(one_line(error))
        else:
            self.say("Megatron's symbols", "all as expected")


def choose(mhc: MHCConfig, width: int, dtype: str, gpus: str) -> str:
    """The back end for streams on this machine's GPU, without one on an H100, or on its CPU.

    Args:
        gpus: as `Machine.gpus`, or ON_CPU.

    Raises:
        ValueError: one is asked for that cannot serve.
    """
    from megatron_mhc import backend

    return backend.choose(*_asked(mhc, width, dtype, gpus))


def explained(chosen: str, mhc: MHCConfig, width: int, dtype: str, gpus: str) -> str:
    """What `choose` says, where it holds, and why it is no better one."""
    from megatron_mhc import backend

    said = f"{chosen}, for {mhc.num_residual_streams} streams of {width} channels in {dtype}"
    if gpus == "none" and chosen != "reference":
        here = "reference" if mhc.backend == "auto" else "refused"
        said = f"{here} here, since there is no GPU; on an H100 {said}"
    if mhc.backend != "auto":
        return f"{said}, as {flag('backend')} asks"
    if gpus == ON_CPU:
        return f"{said}, since it runs on a CPU"
    asked = _asked(mhc, width, dtype, gpus)
    if chosen != "hopper":
        said += f"; not hopper, since {backend.hopper_obstacle(*asked)}"
    if chosen == "reference":
        said += f"; not triton, since {backend.triton_obstacle(*asked[:4])}"
    return said


def _asked(mhc: MHCConfig, width: int, dtype: str, gpus: str) -> tuple[Any, ...]:
    from megatron_mhc import backend

    device = "cpu" if gpus == ON_CPU else "cuda"
    return mhc, width, getattr(_torch(), dtype), device, backend.H100 if gpus == "none" else None


def links(topology: str) -> str:
    """How `nvidia-smi topo -m` says that the GPUs are connected."""
    lines = re.sub(r"\x1b\[\d*m", "", topology).splitlines()
    rows = [line.split() for line in lines if re.match(r"GPU\d", line)]  # the head begins with a tab
    kinds = {row[1 + j] for i, row in enumerate(rows) for j in range(len(rows)) if i != j}
    if len(rows) < 2:
        return "one GPU"
    return f"{', '.join(sorted(kinds))} between {len(rows)} GPUs"


def _stand_in() -> None:
    """Let a CPU answer for a GPU; Megatron's checks ask for one's properties."""
    from megatron_mhc.testing import cpu

    connections = os.environ.get(VARIABLE)
    cpu.install(pretend_cuda=True)
    if connections is None:
        os.environ.pop(VARIABLE, None)


def _torch() -> Any:
    return importlib.import_module("torch")


def _gpus() -> str:
    cuda, kinds = _torch().cuda, Counter[str]()
    for i in range(cuda.device_count()):
        found = cuda.get_device_properties(i)
        kinds[
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} SMs, {found.total_memory / 2**30:.0f} GiB"
        ] += 1
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _package(distribution: str, module: str, more: Callable[[Any], str] | None = None) -> str:
    """A package's version and whether it can be imported."""
    try:
        known = version(distribution)
    except PackageNotFoundError:
        known = ""
    try:
        if not known and find_spec(module.split(".")[0]) is None:
            return "not installed"
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever an import of somebody's extension raises
        return f"{known or 'there'}, but it cannot be imported: {one_line(error)}"
    known = known or str(getattr(sys.modules[module.split(".")[0]], "__version__", "there"))
    return known + (more(loaded) if more else "")


def _or_none(question: Callable[[], str]) -> str:
    """The answer, or `none` where the machine has no such thing."""
    try:
        return question() or "none"
    except Exception:
        return "none"


def _driver() -> str:
    versions = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return ", ".join(sorted({version.strip() for version in versions}))


def _nvidia_smi(*arguments: str) -> str:
    asked = ["nvidia-smi", *arguments]
    return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
