"""What is installed, what a launch would run by, and what is in its way: the text to paste into an issue.

    python -m megatron_mhc doctor
    python -m megatron_mhc doctor -- torchrun --nproc-per-node 8 pretrain_gpt.py <arguments> \\
        --spec megatron_mhc.specs gpt_mhc_spec
    python -m megatron_mhc doctor --config recipe.txt
    python -m megatron_mhc doctor -- --num-layers 24 --hidden-size 2560 <arguments of pretrain_gpt>

Assignments in front of the launch count (MEGATRON_MHC=... torchrun ...). Nothing is trained or built, the
command line itself is not printed, and a CPU will do. Exit status: 1 where something is in the way.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc import __version__, command_line
from megatron_mhc.config import ENVIRONMENT, MHCConfig, flag
from megatron_mhc.version import SUPPORTED, check_version

SPEC = ("megatron_mhc.specs", "gpt_mhc_spec")
WHEEL, LAUNCH = "megatron_mhc.pretrain_gpt", "megatron_mhc.launch"
VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
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
Row = tuple[str, str]


def main() -> None:
    """Print the report."""
    own, given = sys.argv[1:], []
    if "--" in own:
        own, given = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc doctor",
        usage="%(prog)s [-h] [--config FILE] [-- COMMAND]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=command_line.recipe, help="file with a launch or its arguments")
    text, healthy = report((parser.parse_args(own).config or []) + given)
    print(text)
    sys.exit(not healthy)


def report(words: list[str]) -> tuple[str, bool]:
    """The text, and whether nothing is in the way.

    Args:
        words: of a launch; none to report of the machine alone.
    """
    command = command_line.take_apart(words)
    os.environ.update(command.environment)
    with _quiet():
        machine = Machine()
        examined: list[_Part] = [machine, Launch(command, machine.gpus)] if words else [machine]
    lines = [f"megatron-mhc {__version__} doctor"]
    for part in examined:
        lines += ["", part.title]
        lines += [f"  {name:<20} {_shortened(text)}" for name, text in part.rows]
    lines += ["", "in the way"]
    found = list(dict.fromkeys(_shortened(text) for part in examined for text in part.in_the_way))
    lines += [f"  {i}. {text}" for i, text in enumerate(found, 1)] or ["  nothing found"]
    return "\n".join(lines), not found


class _Part:
    """A section of the report; what it finds goes into `rows` and `in_the_way`."""

    title = ""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.in_the_way: list[str] = []

    def say(self, name: str, text: str) -> None:
        self.rows.append((name, text))

    def asks(self, question: Callable[[], Any]) -> Any:
        """The answer; where it raises, None, and what it says is in the way."""
        try:
            return question()
        except Exception as error:
            self.in_the_way.append(_said(error))
            return None


class Machine(_Part):
    """What is installed here.

    Where there is no GPU, Megatron is imported on a CPU that stands in for one.
    """

    title = "installed"

    def __init__(self) -> None:
        super().__init__()
        self.gpus = _or_none(_gpus)
        self.say("megatron-mhc", f"{__version__} in {Path(__file__).parent}")
        self.say("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
        self.say("torch", _package("torch", "torch", lambda torch: f", CUDA {torch.version.cuda}"))
        nccl = _or_none(lambda: ".".join(map(str, _torch().cuda.nccl.version())))
        serves = _or_none(lambda: kernels(MHCConfig(), 4096, "bfloat16", self.gpus))
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
            self.in_the_way.append(f"megatron-core cannot be imported: {_said(error)}")
            return
        place = Path(str(core.__file__)).parent
        self.say("megatron-core", f"{core.__version__} in {place}; {SUPPORTED} is supported")
        training = find_spec("megatron.training") is not None
        self.say("megatron.training", "there" if training else "not there; only the library door works")
        try:
            check_version()
            from megatron_mhc import hooks

            hooks.register(training, training).revert()
        except Exception as error:
            self.in_the_way.append(_said(error))
        else:
            self.say("Megatron's symbols", "all as expected")


class Launch(_Part):
    """What a command would run by."""

    title = "command"

    def __init__(self, command: command_line.Command, gpus: str):
        super().__init__()
        self.command, self.gpus = command, gpus
        try:
            check_version()
        except Exception:  # `Machine` says why
            self.say("not examined", "this needs a megatron-core that can be imported and is supported")
            return
        self.door()
        guess = self.asks(lambda: _first_look(command.arguments))
        if guess is None:
            return
        mhc = self.options(guess.mhc)
        if mhc is None:
            return
        config = None
        if settings := self.settings():
            args, config = settings
            self.model(args, config)
            self.refused(args, config, mhc)
        width = guess.hidden_size if config is None else config.hidden_size
        dtype = guess.dtype if config is None else str(config.params_dtype).removeprefix("torch.")
        if not self.plain:
            self.kernels(mhc, width, dtype, config)
        if config is not None and not self.plain:
            self.pipeline(args, config, mhc)

    def door(self) -> None:
        """Which of the README's doors the command goes through."""
        program, arguments = self.command.program, self.command.arguments
        self.flags = any(word.startswith("--mhc-") for word in arguments)
        self.plain, self.ours = "--no-mhc" in arguments, WHEEL in program or not program
        spec = arguments[arguments.index("--spec") + 1 :][:2] if "--spec" in arguments else []
        if not program:
            self.say("door", f"none, arguments alone: judged as those of python -m {WHEEL}")
        elif WHEEL in program:
            self.say("door", f"wheel, python -m {WHEEL}")
        elif LAUNCH in program:
            self.say("door", f"launch, python -m {LAUNCH}")
            from megatron_mhc import launch

            after = list(program[program.index(LAUNCH) + 1 :])
            self.asks(lambda: launch.prepare(after + arguments))
        elif tuple(spec) == SPEC:
            self.say("door", "spec, --spec megatron_mhc.specs gpt_mhc_spec")
            if self.flags:
                self.say("--mhc-* flags", "known to a script that calls add_mhc_args alone: patches/")
        elif self.flags:
            self.say("door", "flags of the script's own, as a tree has that is patched by patches/")
        else:
            self.plain = True
            self.say("door", "none: this trains without mHC")
            self.in_the_way.append(
                f"nothing asks for mHC: add --spec {' '.join(SPEC)}, or start it by python -m {LAUNCH}"
            )

    def options(self, flags: MHCConfig) -> MHCConfig | None:
        """The mHC options, from flags or from MEGATRON_MHC."""
        mhc: MHCConfig | None = flags
        if os.environ.get(ENVIRONMENT):
            if self.flags or self.ours:
                self.in_the_way.append(f"options in flags and in {ENVIRONMENT}: unset {ENVIRONMENT}")
            else:
                mhc = self.asks(MHCConfig.from_environment)
        if mhc is not None and not self.plain:
            other = [f for f in fields(mhc) if getattr(mhc, f.name) != getattr(MHCConfig(), f.name)]
            said = ", ".join(f"{f.name}={getattr(mhc, f.name)}" for f in other)
            self.say("mHC options", said or "the defaults")
        return mhc

    def settings(self) -> tuple[Any, Any] | None:
        """Megatron's arguments and its transformer config; None where Megatron refuses them."""
        words = list(self.command.arguments)
        if not self.ours and "--spec" in words:
            at = words.index("--spec")
            del words[at : at + 3]
        ignore_unknown = False
        while True:
            said = io.StringIO()
            try:
                with redirect_stderr(said):
                    args, config, _ = command_line.read(words, self.command.world, ignore_unknown)
                return args, config
            except SystemExit:
                last = said.getvalue().strip().rpartition("error: ")[2]
                unknown = last.removeprefix("unrecognized arguments: ")
                if unknown == last:
                    self.in_the_way.append(f"Megatron's parser: {last}")
                    return None
                names = " ".join(re.findall(r"(?<!\S)--[\w-]+", unknown))  # a value may be a secret
                if self.ours:
                    self.in_the_way.append(f"Megatron's parser knows no {names}")
                else:
                    self.say("not Megatron's", f"{names}: the script's own, or a mistake")
                ignore_unknown = True
            except Exception as error:
                self.in_the_way.append(f"Megatron's checks: {_said(error)}")
                if VARIABLE not in str(error) or VARIABLE in os.environ:
                    return None
                os.environ[VARIABLE] = "1"

    def model(self, args: Any, config: Any) -> None:
        """Its sizes and layout, and the parts that Megatron needs for it."""
        dtype = str(config.params_dtype).removeprefix("torch.")
        self.say(
            "model",
            f"{config.num_layers} layers of {config.hidden_size} channels, {dtype}, a micro-batch of "
            f"{args.micro_batch_size} x {args.seq_length} tokens, --transformer-impl {args.transformer_impl}",
        )
        sizes = dict(
            TP=args.tensor_model_parallel_size,
            PP=args.pipeline_model_parallel_size,
            VPP=args.virtual_pipeline_model_parallel_size or 1,
            CP=args.context_parallel_size,
            EP=args.expert_model_parallel_size,
            DP=args.data_parallel_size,
        )
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        said += ", sequence parallel" * args.sequence_parallel
        self.say("layout", f"{said}, {args.world_size} ranks")
        self.say("Megatron's recompute", config.recompute_granularity or "none")
        self.say("CUDA graphs", "asked for" if _graphs(config) else "none")
        if args.transformer_impl == "transformer_engine":
            self.needs_transformer_engine()

    def needs_transformer_engine(self) -> None:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:
            self.in_the_way.append(
                f"--transformer-impl transformer_engine: it cannot be imported here, {_said(error)}"
            )

    def refused(self, args: Any, config: Any, mhc: MHCConfig) -> None:
        """What mHC refuses of all this."""
        from megatron_mhc import refusals
        from megatron_mhc.diagnostics.training import check_writers
        from megatron_mhc.pipeline.options import refusals_of
        from megatron_mhc.pretrain_gpt import check_args

        if self.ours:
            self.asks(lambda: check_args(args))
        if self.plain:
            return
        rows = refusals.MODEL + refusals.STAGES + refusals_of(config, mhc)
        found = [*refusals.refused(refusals.SPEC_DOOR, args), *refusals.refused(rows, config, mhc)]
        self.in_the_way += map(str, found)
        self.asks(lambda: check_writers(args, mhc))

    def kernels(self, mhc: MHCConfig, width: int, dtype: str, config: Any) -> None:
        """Which back end serves, and what two connections in a row do together."""
        said = self.asks(lambda: kernels(mhc, width, dtype, self.gpus))
        self.say("back end", said or "none can serve")
        if said is None:
            return
        full = config is not None and config.recompute_granularity == "full"
        self.say("boundary", boundary(mhc, said.split(",")[0], full))
        if mhc.recompute_layer_num != "off":
            self.say("recompute of mHC", f"{flag('recompute_layer_num')} {mhc.recompute_layer_num}")

    def pipeline(self, args: Any, config: Any, mhc: MHCConfig) -> None:
        """The schedule, how messages travel, and how many passes each rank holds."""
        from megatron_mhc.pipeline.queues import check_variable
        from megatron_mhc.schedule.plans import OVERLAPPED, passes_in_flight

        pp = config.pipeline_model_parallel_size
        if pp == 1:
            self.say("schedule", "one stage, no pipeline")
            return
        overlapped = mhc.pipeline_schedule in OVERLAPPED
        self.say("schedule", f"{mhc.pipeline_schedule}, {flag('pp_boundary')} {mhc.pp_boundary}")
        self.say(
            "messages",
            "receives posted ahead, over NCCL; those of a model's first step by way of the hosts, over gloo"
            if overlapped
            else f"Megatron's, {mhc.num_residual_streams} times as wide",
        )
        micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        held = self.asks(lambda: [passes_in_flight(config, mhc, rank, micro_batches) for rank in range(pp)])
        if held is not None:
            self.say("passes in flight", f"{', '.join(map(str, held))} on ranks 0 to {pp - 1}")
        if overlapped:
            self.asks(lambda: check_variable(mhc.pipeline_schedule))


class _Guess(NamedTuple):
    mhc: MHCConfig
    hidden_size: int
    dtype: str


def _first_look(arguments: list[str]) -> _Guess:
    """The mHC options, width and dtype, also of arguments that Megatron refuses.

    Raises:
        ValueError: a wrong --mhc-* flag.
    """
    from megatron_mhc.arguments import add_mhc_args

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_mhc_args(parser)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    dtype = "bfloat16" if given.bf16 else "float16" if given.fp16 else "float32"
    return _Guess(MHCConfig.from_args(given), given.hidden_size, dtype)


def kernels(mhc: MHCConfig, width: int, dtype: str, gpus: str) -> str:
    """The back end for streams on this machine's GPU, without one on an H100, and why no better one.

    Raises:
        ValueError: one is asked for that cannot serve.
    """
    from megatron_mhc import backend

    asked = (mhc, width, getattr(_torch(), dtype), "cuda")
    gpu = backend.H100 if gpus == "none" else None
    chosen = backend.choose(*asked, gpu)
    said = f"{chosen}, for {mhc.num_residual_streams} streams of {width} channels in {dtype}"
    said += ", if this were an H100" if gpu else ""
    if mhc.backend != "auto":
        return f"{said}, as {flag('backend')} asks"
    if chosen != "hopper":
        said += f"; not hopper, since {backend.hopper_obstacle(*asked, gpu)}"
    if chosen == "reference":
        said += f"; not triton, since {backend.triton_obstacle(*asked)}"
    return said


def boundary(mhc: MHCConfig, backend: str, full_recompute: bool) -> str:
    """What `--mhc-boundary` comes to, see `HyperConnectionModule.post_res` and `.next_pre`."""
    if backend == "reference":
        return "apart, since reference has no kernels"
    if mhc.boundary == "apart":
        return "apart"
    if mhc.recompute_coefficients:
        return f"apart, since {flag('recompute_coefficients')} is on"
    if mhc.boundary == "linked":
        return "linked"
    if full_recompute:
        return "linked, since --recompute-granularity full runs layers apart"
    return "fused" if mhc.boundary == "fused" or backend == "hopper" else "linked"


def links(topology: str) -> str:
    """How `nvidia-smi topo -m` says that the GPUs are connected."""
    lines = re.sub(r"\x1b\[\d*m", "", topology).splitlines()
    rows = [line.split() for line in lines if re.match(r"GPU\d", line)]  # the head begins with a tab
    kinds = {row[1 + j] for i, row in enumerate(rows) for j in range(len(rows)) if i != j}
    if len(rows) < 2:
        return "one GPU"
    return f"{', '.join(sorted(kinds))} between {len(rows)} GPUs"


def _graphs(config: Any) -> bool:
    asked = getattr(config, "cuda_graph_impl", None) not in (None, "none")
    return asked or any(getattr(config, f"{name}_cuda_graph", False) for name in ("enable", "external"))


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
        return f"{known or 'there'}, but it cannot be imported: {_said(error)}"
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


def _said(error: BaseException) -> str:
    """One line of an error; a ValueError of ours speaks for itself."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _shortened(text: str) -> str:
    """Without the home folder, which has the user's name, or line breaks."""
    home = os.path.expanduser("~").rstrip("/")
    return " ".join((text.replace(home, "~") if len(home) > 1 else text).split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what imports and Megatron's checks print out of the report."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
