"""What a command would run by, and what is refused of it."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
from contextlib import redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc import command_line
from megatron_mhc.arguments import no_such_flags
from megatron_mhc.config import ENVIRONMENT, MHCConfig, flag
from megatron_mhc.doctor.machine import ON_CPU, VARIABLE, choose, explained
from megatron_mhc.doctor.part import Part, Row, one_line
from megatron_mhc.version import check_version

SPECS = (("megatron_mhc.specs", "gpt_mhc_spec"), ("megatron_mhc.specs", "hybrid_mhc_spec"))
WHEEL, LAUNCH = "megatron_mhc.pretrain_gpt", "megatron_mhc.launch"
CPU = "megatron_mhc.testing.cpu"


class Launch(Part):
    """What a command would run by."""

    title = "command"

    def __init__(self, command: command_line.Command, gpus: str):
        super().__init__()
        self.command, self.gpus = command, gpus
        self.auto: list[Row] = []  # what --mhc-pipeline-schedule auto would take, by link
        try:
            check_version()
        except Exception:  # `Machine` says why
            self.say("not examined", "this needs a megatron-core that can be imported and is supported")
            return
        self.door()
        guess = self.asks(lambda: _first_look(command.arguments))
        if guess is None:
            return
        asked = self.options(guess.mhc)
        if asked is None:
            return
        mhc: MHCConfig = asked
        config = None
        if settings := self.settings():
            args, config = settings
            mhc = self.asks(lambda: self.resolved(args, config, asked)) or asked
            self.asks(lambda: self.model(args, config))
            self.asks(lambda: self.refused(args, config, mhc))
        width = guess.hidden_size if config is None else config.hidden_size
        dtype = guess.dtype if config is None else _streams_dtype(config)
        if not self.plain:
            self.kernels(mhc, width, dtype, config)
        if config is not None and not self.plain:
            self.asks(lambda: self.pipeline(args, config, mhc))

    def door(self) -> None:
        """Which of the README's entry points the command goes through."""
        program, arguments = self.command.program, self.command.arguments
        self.flags = any(word.startswith("--mhc-") for word in arguments)
        self.plain, self.ours = "--no-mhc" in arguments, WHEEL in program or not program
        self.on_cpu = CPU in program
        hybrid = any(word.startswith("--hybrid-layer-pattern") for word in arguments)
        spec = arguments[arguments.index("--spec") + 1 :][:2] if "--spec" in arguments else []
        if not program:
            self.say("entry point", f"none, only arguments: judged as those of python -m {WHEEL}")
        elif WHEEL in program:
            self.say("entry point", f"wheel, python -m {WHEEL}")
        elif LAUNCH in program:
            self.say("entry point", f"launch, python -m {LAUNCH}")
            from megatron_mhc import launch

            after = list(program[program.index(LAUNCH) + 1 :])
            self.asks(lambda: launch.prepare(after + arguments))
        elif tuple(spec) in SPECS:
            self.say("entry point", f"spec, --spec {' '.join(spec)}")
        elif self.flags:
            self.say("entry point", "flags of the script's own, as a tree has that is patched by patches/")
        else:
            self.plain = True
            self.say("entry point", "none: this trains without mHC")
            self.in_the_way.append(
                f"nothing asks for mHC: add --spec {' '.join(SPECS[hybrid])}, or start it by python -m "
                f"{LAUNCH}"
            )
        if self.flags and program and program[-1].endswith(".py") and LAUNCH not in program:
            self.asks(lambda: _takes_flags(program[-1]))
        self.in_the_way += no_such_flags(arguments)

    def options(self, flags: MHCConfig) -> MHCConfig | None:
        """The mHC options, from flags or from MEGATRON_MHC."""
        mhc: MHCConfig | None = flags
        if os.environ.get(ENVIRONMENT):
            if self.flags or self.ours:
                self.in_the_way.append(f"options in flags and in {ENVIRONMENT}: unset {ENVIRONMENT}")
            else:
                mhc = self.asks(MHCConfig.from_environment)
        if "--no-mhc" in self.command.arguments:
            self.say("mHC options", "off, by --no-mhc")
        elif mhc is not None and not self.plain:
            other = [f for f in fields(mhc) if getattr(mhc, f.name) != getattr(MHCConfig(), f.name)]
            said = ", ".join(f"{f.name}={getattr(mhc, f.name)}" for f in other)
            self.say("mHC options", said or "the defaults")
        return mhc

    def settings(self) -> tuple[Any, Any] | None:
        """Megatron's arguments and its transformer config; None where Megatron refuses them."""
        words = [word for word in self.command.arguments if word not in ("-h", "--help")]
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
                found = re.findall(r"(?<!\S)--[\w-]+", unknown)  # no values: one may be a secret
                names = " ".join(name for name in found if not name.startswith("--mhc"))  # named above
                if not names:
                    pass
                elif self.ours:
                    self.in_the_way.append(f"Megatron's parser knows no {names}")
                else:
                    self.say("not Megatron's", f"{names}: the script's own, or a mistake")
                ignore_unknown = True
            except Exception as error:
                self.in_the_way.append(f"Megatron's checks: {one_line(error)}")
                if VARIABLE not in str(error) or VARIABLE in os.environ:
                    return None
                os.environ[VARIABLE] = "1"

    def resolved(self, args: Any, config: Any, mhc: MHCConfig) -> MHCConfig:
        """The options, with what auto would take in its place."""
        from megatron_mhc.doctor.schedule import guesses
        from megatron_mhc.schedule.plans import AUTO

        if mhc.pipeline_schedule == AUTO:
            self.auto, mhc = guesses(args, config, mhc)
        return mhc

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
        self.say("CUDA graphs", _graphs(config))
        if args.transformer_impl == "transformer_engine":
            self.needs_transformer_engine()

    def needs_transformer_engine(self) -> None:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:
            self.in_the_way.append(
                f"--transformer-impl transformer_engine: it cannot be imported here, {one_line(error)}"
            )

    def refused(self, args: Any, config: Any, mhc: MHCConfig) -> None:
        """What mHC refuses of all this."""
        from megatron_mhc import refusals
        from megatron_mhc.diagnostics.training import check_writers
        from megatron_mhc.door_refusals import SPEC_DOOR
        from megatron_mhc.pipeline.options import refusals_of
        from megatron_mhc.pretrain_gpt import check_args

        if self.ours:
            self.asks(lambda: check_args(args))
        if self.plain:
            return
        kind = refusals.HYBRID if config.is_hybrid_model else refusals.STAGES
        rows = (*refusals.MODEL, *kind, *refusals_of(config, mhc))
        found = [*refusals.refused(SPEC_DOOR, args), *refusals.refused(rows, config, mhc)]
        self.in_the_way += map(str, found)
        self.asks(lambda: check_writers(args, mhc))

    def kernels(self, mhc: MHCConfig, width: int, dtype: str, config: Any) -> None:
        """Which back end serves, and what two connections in a row do together."""
        gpus = ON_CPU if self.on_cpu else self.gpus
        chosen = self.asks(lambda: choose(mhc, width, dtype, gpus))
        self.say("back end", explained(chosen, mhc, width, dtype, gpus) if chosen else "none can serve")
        if chosen is None:
            return
        full = config is not None and config.recompute_granularity == "full"
        self.say("boundary", boundary(mhc, chosen, full))
        if config is not None:
            from megatron_mhc.backend import norms_in_words

            self.say("norm before F", norms_in_words(config, mhc, chosen))
        if mhc.recompute_layer_num != "off":
            self.say("recompute of mHC", f"{flag('recompute_layer_num')} {mhc.recompute_layer_num}")

    def pipeline(self, args: Any, config: Any, mhc: MHCConfig) -> None:
        """The schedule, how messages travel, and how many passes each rank holds."""
        from megatron_mhc.pipeline.links import AUTO, NCCL, PUSH
        from megatron_mhc.pipeline.queues import check_variable
        from megatron_mhc.schedule.plans import OVERLAPPED, passes_in_flight

        pp = config.pipeline_model_parallel_size
        named = f"{mhc.pipeline_schedule}, {flag('pp_boundary')} {mhc.pp_boundary}"
        self.rows += self.auto or [("schedule", "one stage, no pipeline" if pp == 1 else named)]
        if pp == 1:
            return
        overlapped = mhc.pipeline_schedule in OVERLAPPED
        over_nccl = (
            f"receives posted ahead, over {args.distributed_backend}; those of a model's first step by way "
            "of the hosts, over gloo"
        )
        pushed = (
            "pushed over peer memory, if the GPUs of each pipeline are of one host and reach each other's"
        )
        messages = {NCCL: over_nccl, PUSH: pushed, AUTO: f"{pushed}; else {over_nccl}"}
        self.say(
            "messages",
            messages[mhc.pipeline_transport]
            if overlapped
            else f"Megatron's, {mhc.num_residual_streams} times as wide",
        )
        micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        held = self.asks(lambda: [passes_in_flight(config, mhc, rank, micro_batches) for rank in range(pp)])
        if held is not None:
            self.say("passes in flight", f"{', '.join(map(str, held))} on ranks 0 to {pp - 1}")
        if overlapped:
            if mhc.pipeline_transport == NCCL:
                why = f"{flag('pipeline_transport')} {NCCL}"
                self.asks(lambda: check_variable(mhc.pipeline_schedule, why))


def _streams_dtype(config: Any) -> str:
    from megatron_mhc.parallel import streams_dtype

    return str(streams_dtype(config)).removeprefix("torch.")


def _takes_flags(script: str) -> None:
    """Raise ValueError for a script whose parser has no --mhc-* flags, as that of a stock Megatron."""
    remedy = (
        f"start it by python -m {LAUNCH}, which takes them, or give the options in {ENVIRONMENT} beside "
        f"--spec {' '.join(SPECS[0])}"
    )
    path = Path(script)
    if not path.is_file():
        raise ValueError(f"{script} is not here to look at; unless it has --mhc-* flags, {remedy}")
    if not any("add_mhc_args" in file.read_text(errors="replace") for file in path.parent.glob("*.py")):
        raise ValueError(f"{script} has no --mhc-* flags, its parser would refuse them: {remedy}")


class _Guess(NamedTuple):
    mhc: MHCConfig
    hidden_size: int
    dtype: str  # of the streams


def _first_look(arguments: list[str]) -> _Guess:
    """The mHC options, width and dtype, also of arguments that Megatron refuses.

    Raises:
        ValueError: a wrong --mhc-* flag.
    """
    from megatron_mhc.arguments import add_mhc_args

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    add_mhc_args(parser)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--fp32-residual-connection", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    dtype = "bfloat16" if given.bf16 else "float16" if given.fp16 else "float32"
    dtype = "float32" if given.fp32_residual_connection else dtype
    return _Guess(MHCConfig.from_args(given), given.hidden_size, dtype)


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


def _graphs(config: Any) -> str:
    """What Megatron's CUDA graphs hold, see `graphs`."""
    if config.cuda_graph_impl == "none":
        return "none"
    if config.cuda_graph_impl == "full_iteration":
        return "full_iteration, one of the forward and backward passes of a step"
    parts = " ".join(module.name for module in config.cuda_graph_modules)
    return f"{config.cuda_graph_impl}, of each layer {parts or 'all'}, with the connections of what it holds"
