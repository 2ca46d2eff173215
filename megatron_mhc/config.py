"""The options of mHC: one description of each, from which flags, help, checks and docs follow."""

from __future__ import annotations

import math
import operator
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

import yaml

ENVIRONMENT = "MEGATRON_MHC"

_MOST = 2**31 - 1  # of a whole number: what a kernel takes
_SWITCH = {"true": True, "1": True, "yes": True, "on": True}
_SWITCH |= {"false": False, "0": False, "no": False, "off": False}
_short = reprlib.Repr(maxstring=80, maxother=80).repr


def refuse_environment() -> None:
    """Raise ValueError if MEGATRON_MHC is set beside a script's own --mhc-* flags."""
    if os.environ.get(ENVIRONMENT):
        raise ValueError(f"this script has --mhc-* flags: unset {ENVIRONMENT}, so that one place decides")


def flag(name: str) -> str:
    """Command-line spelling of a field: `num_residual_streams` -> `--mhc-num-residual-streams`."""
    return "--mhc-" + name.replace("_", "-")


def in_options(name: str, value: Any) -> str:
    """The end of a message about a flag: how users of MEGATRON_MHC or a YAML file write it."""
    return f" (in {ENVIRONMENT}: {name}={str(value).lower() if value is True else value})"


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    stored: bool = False,
) -> Any:
    """A field of MHCConfig with its description.

    Args:
        help: what it does, for --help and docs/options.md, which scripts/doc_tables.py writes.
        choices: the words it takes; with `least` it takes whole numbers beside them.
        least, above: the bound of a number, itself included or not.
        stored: whether it changes the arithmetic, so that checkpoints keep it and compare it.
    """
    rules = dict(help=help, choices=choices, least=least, above=above, stored=stored)
    return field(default=default, metadata=rules)


def takes(option: Field[Any]) -> str:
    """The values that an option takes, in words."""
    rules = option.metadata
    bound = f"at least {rules['least']}" if rules["above"] is None else f"above {rules['above']}"
    words = {"bool": "true or false", "int": f"a whole number, {bound}", "float": f"a finite number, {bound}"}
    if option.type != "str":
        return words[str(option.type)]
    choices = ", ".join(rules["choices"])
    return f"one of {choices}" if rules["least"] is None else f"{choices}, or {words['int']}"


def read(option: Field[Any], value: Any) -> Any:
    """An option's value, from text or a Python value.

    Raises:
        ValueError: it is of another type or outside its range, naming the flag, the value and the remedy.
    """
    try:
        return _read(option, value)
    except (ValueError, TypeError, OverflowError, KeyError):
        raise ValueError(
            f"{flag(option.name)}={_short(value)}: give {takes(option)} (default {option.default})"
        ) from None


def _read(option: Field[Any], value: Any) -> Any:
    rules = option.metadata
    if option.type == "bool":
        return _SWITCH[str(value).lower()]
    if option.type == "str":
        word = "off" if value is False else value  # as YAML's own reader has it
        if isinstance(word, str) and word in rules["choices"]:
            return word
        if rules["least"] is None:
            raise ValueError
    if isinstance(value, bool):
        raise ValueError
    if option.type == "float":
        number = float(value)
    else:
        number = int(value) if isinstance(value, str) else operator.index(value)
    below = number < rules["least"] if rules["above"] is None else number <= rules["above"]
    if below or not math.isfinite(number) or (isinstance(number, int) and number > _MOST):
        raise ValueError
    return str(number) if option.type == "str" else number


_CONTRACT = {"deepseek_v4": "learned_head", "qwen4_exp": "mixer"}  # that `auto` is, by preset
_GATED_RANK = 320
_GATED: tuple[tuple[str, tuple[Any, ...], str], ...] = (  # that it has a form for, and why for no other
    ("h_res", ("identity",), "which leaves the streams unmixed"),
    ("h_pre", ("dynamic",), "whose read is a gate for each channel"),
    ("h_post", ("dynamic",), "whose write is its own"),
    ("init", ("home_stream",), "whose matrices start by --init-method-std"),
    ("norm", ("apart", "auto"), "which has no norm in front of F"),
    ("load_dense", (False,), "which has no place for a plain model's norms"),
    ("backend", ("auto", "reference"), "which has no kernels"),
)


@dataclass(frozen=True)
class MHCConfig:
    """Options of the mHC residual connection; the defaults are the paper's.

    A value may also be given as text. `auto` of contract and h_res becomes what it stands for, and so does
    `pp_boundary="auto"`, except under `pipeline_schedule="auto"`.

    Raises:
        ValueError: a value outside its range, naming the flag and the remedy.

    Source: arXiv 2512.24880 Eqs. (5), (14)-(19).
    """

    num_residual_streams: int = _option(4, "n, the number of parallel residual streams", least=1, stored=True)
    preset: str = _option(
        "paper",
        "arithmetic of the mappings: paper is Eqs. (14)-(19); deepseek_v4 has that model's softmax, eps 1e-6 "
        "after every step, transposed comb and learned output head; qwen4_exp is that model's gated "
        "residual, whose read replaces the norms in front of F: docs/gated_residual.md",
        choices=("paper", "deepseek_v4", "qwen4_exp"),
        stored=True,
    )
    h_res: str = _option(
        "auto",
        "how a sub-layer mixes the streams: sinkhorn is mHC; identity leaves them unmixed; unconstrained is "
        "plain hyper-connections (Eq. (5), the paper's baseline: tanh mappings, normalised per stream); auto "
        "is identity under qwen4_exp, else sinkhorn",
        choices=("auto", "sinkhorn", "identity", "unconstrained"),
        stored=True,
    )
    h_pre: str = _option(
        "dynamic",
        "weights with which a sub-layer reads the streams; fixed is 1/n, the paper's ablation",
        choices=("dynamic", "fixed"),
        stored=True,
    )
    h_post: str = _option(
        "dynamic",
        "weights with which a sub-layer writes the streams; fixed is 1, the paper's ablation",
        choices=("dynamic", "fixed"),
        stored=True,
    )
    sinkhorn_iterations: int = _option(
        20, "pairs of column and row normalisations of H_res", least=1, stored=True
    )
    init: str = _option(
        "home_stream",
        "mappings at step 0: home_stream has each sub-layer read one stream, its home, and starts near the "
        "plain residual network; uniform is as in Megatron's branches",
        choices=("home_stream", "uniform"),
    )
    init_gating_factor: float = _option(0.01, "initial value of the three gating factors alpha", least=0)
    contract: str = _option(
        "auto",
        "how n streams become one before the final norm; auto is learned_head under deepseek_v4, mixer "
        "under qwen4_exp, else mean; mixer reads as that model's sub-layers do, and replaces the final norm; "
        "library is what wrap_block_spec(contraction=...) was given: docs/contraction.md",
        choices=("auto", "mean", "sum", "learned_head", "mixer", "library"),
        stored=True,
    )
    norm_eps: float = _option(
        1e-6,
        "added to mean(x^2) inside the root of the mappings' norm; the paper does not state it",
        above=0,
        stored=True,
    )
    gated_rank: int = _option(
        _GATED_RANK,
        "rank of the gates by which --mhc-preset qwen4_exp reads the streams",
        least=1,
        stored=True,
    )
    load_dense: bool = _option(
        False,
        "let --load take a checkpoint without mHC parameters (a plain GPT); the mappings keep their "
        "initial values",
    )
    backend: str = _option(
        "auto",
        "kernels: hopper is CUDA, for n = 4, bf16 and up to 64 Sinkhorn iterations on H100 and H200 with "
        "cuda-bindings; reference is plain torch; auto takes hopper where it can serve, else triton, else "
        "reference, and the log says which",
        choices=("auto", "hopper", "triton", "reference"),
    )
    boundary: str = _option(
        "auto",
        "what the kernels of two connections in a row share: apart, nothing; linked, the second's backward "
        "also computes df of the first (same bits); fused, in addition the first's post_res runs in the "
        "second's pre (hopper, same bits) or makes its projection (triton, rounded to bf16); auto is fused "
        "for hopper, linked for triton: docs/kernels.md",
        choices=("auto", "apart", "linked", "fused"),
    )
    norm: str = _option(
        "apart",
        "where the RMSNorm in front of attention, MLP or experts is computed: apart, by Megatron's module; "
        "folded, by the kernels of pre, which write its output in place of the layer input (fp32 inside, so "
        "other roundings; the same checkpoints); auto is folded where kernels serve and can, but under FP8 "
        "and FP4: docs/kernels.md",
        choices=("auto", "folded", "apart"),
    )
    log_interval: int = _option(
        0,
        "write diagnostics of the mappings to TensorBoard and W&B (mhc/...) every so many steps; 0 is "
        "never: docs/diagnostics.md",
        least=0,
    )
    log_tokens: int = _option(
        256, "tokens to sample of the first microbatch on each data-parallel rank", least=1
    )
    alarm: str = _option(
        "off",
        "what to do at a logging step when a gain or a mapping logit is out of range",
        choices=("off", "warn", "stop"),
    )
    alarm_gain: float = _option(10.0, "alarm beyond this gain, and below its inverse", above=1)
    alarm_logit: float = _option(50.0, "alarm beyond this absolute value of a mapping logit", above=0)
    recompute_layer_num: str = _option(
        "off",
        "sub-layers (attention and MLP count one each) in a block of recompute: the block drops its streams "
        "and layer inputs and replays them in backward, without running F again; auto chooses the blocks of "
        "least memory: docs/recompute.md",
        choices=("auto", "off"),
        least=1,
    )
    recompute_coefficients: bool = _option(False, "replay the coefficients too, instead of keeping them")
    pipeline_schedule: str = _option(
        "megatron",
        "interleaved has Megatron's order of chunks, and overlaps messages with compute; fused also runs the "
        "forward of one microbatch and the backward of another node by node in turns; auto takes what the "
        "simulator says is fastest for the launch and its link, and the log says which and why: "
        "docs/schedules.md",
        choices=("auto", "megatron", "interleaved", "fused"),
    )
    pipeline_transport: str = _option(
        "auto",
        "how messages travel under interleaved and fused: push has the sender's copy engine write into the "
        "receiver's memory, which takes no SM, and needs a pipeline's GPUs on one host; nccl sends them over "
        "the process groups; auto is push where it can be: docs/schedules.md",
        choices=("auto", "push", "nccl"),
    )
    pp_boundary: str = _option(
        "auto",
        "what a stage sends under interleaved and fused: whole, its streams; split, the mixed streams before "
        "its last MLP and that MLP's output after it: docs/pipeline.md; auto is whole, and with "
        "--mhc-pipeline-schedule auto chosen with the schedule",
        choices=("auto", "whole", "split"),
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, read(option, getattr(self, option.name)))
        if self.alarm != "off" and not self.log_interval:
            raise ValueError(
                f"{flag('alarm')}={self.alarm} looks at logging steps only: add {flag('log_interval')}=100"
            )
        if self.preset == "deepseek_v4" and self.h_res == "unconstrained":
            raise ValueError(
                f"{flag('h_res')}=unconstrained has no deepseek_v4 form: use {flag('preset')}=paper"
            )
        if self.recompute_coefficients and self.recompute_layer_num == "off":
            raise ValueError(
                f"{flag('recompute_coefficients')} without recompute: add {flag('recompute_layer_num')}=auto"
            )
        if self.contract == "auto":
            object.__setattr__(self, "contract", _CONTRACT.get(self.preset, "mean"))
        if self.h_res == "auto":
            object.__setattr__(self, "h_res", "identity" if self.is_gated else "sinkhorn")
        self._check_gated()
        if self.pp_boundary == "auto" and self.pipeline_schedule != "auto":
            object.__setattr__(self, "pp_boundary", "whole")

    def _check_gated(self) -> None:
        """Raise ValueError for an option that the gated residual has no form for, or is alone to have."""
        if not self.is_gated:
            alone = dict(contract=self.contract == "mixer", gated_rank=self.gated_rank != _GATED_RANK)
            for name in (name for name, found in alone.items() if found):
                raise ValueError(
                    f"{flag(name)}={getattr(self, name)} belongs to {flag('preset')}=qwen4_exp: add that, or "
                    f"drop {flag(name)}"
                )
            return
        for name, known, why in _GATED:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{flag(name)}={getattr(self, name)} has no form in {flag('preset')}=qwen4_exp, {why}: "
                    f"use {flag(name)}={known[0]}, or {flag('preset')}=paper"
                )
        if self.recompute_layer_num != "off" and not self.recompute_coefficients:
            raise ValueError(
                f"{flag('recompute_layer_num')}={self.recompute_layer_num} with {flag('preset')}=qwen4_exp, "
                f"whose layer input no coefficients give back: add {flag('recompute_coefficients')}"
            )

    @property
    def is_gated(self) -> bool:
        """True for the gated residual of Qwen4-Exp."""
        return self.preset == "qwen4_exp"

    @property
    def is_hc(self) -> bool:
        """True for plain hyper-connections (Eq. (5)), whose projection reads one stream at a time."""
        return self.h_res == "unconstrained"

    def arithmetic(self) -> dict[str, Any]:
        """The options that a checkpoint's weights are only meaningful under."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["stored"]}
        if not self.is_gated:
            del stored["gated_rank"]
        return stored

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], source: str = "options") -> MHCConfig:
        """Build from field names to values, which may be text; `source` is named in errors."""
        if not isinstance(options, Mapping):
            raise ValueError(f"{source}: {_short(options)} does not map options to values")
        return cls._from_pairs(options.items(), source)

    @classmethod
    def from_options(cls, text: str) -> MHCConfig:
        """Build from `key=value,key=value` or from the path of a YAML file of such keys."""
        if text.endswith((".yaml", ".yml")):
            return cls._from_pairs(_yaml_pairs(text), text)
        items = [item.strip() for item in text.split(",") if item.strip()]
        bad = [item for item in items if "=" not in item]
        if bad:
            raise ValueError(f"{ENVIRONMENT}: {_short(bad[0])} is not key=value (or a path ending in .yaml)")
        return cls._from_pairs((item.split("=", 1) for item in items), ENVIRONMENT)

    @classmethod
    def _from_pairs(cls, pairs: Iterable[Iterable[Any]], source: str) -> MHCConfig:
        names = [option.name for option in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in pairs:
            name = key.strip().replace("-", "_") if isinstance(key, str) else None
            if name not in names:
                raise ValueError(f"{source}: no mHC option {_short(key)}; there are {', '.join(names)}")
            if name in values:
                raise ValueError(
                    f"{source}: {name} is given twice, {_short(values[name])} and {_short(value)}: drop one"
                )
            values[name] = value.strip() if isinstance(value, str) else value
        try:
            return cls(**values)
        except ValueError as error:  # its flags are here written as option names
            said = re.sub("--mhc-([a-z-]+)", lambda found: found[1].replace("-", "_"), str(error))
            raise ValueError(f"{source}: {said}") from None

    @classmethod
    def from_environment(cls) -> MHCConfig:
        """Build from the variable MEGATRON_MHC; the defaults where it is unset."""
        return cls.from_options(os.environ.get(ENVIRONMENT, ""))

    @classmethod
    def has_flags(cls, args: Any) -> bool:
        """Whether the parser of these arguments was extended so; Megatron's main has some flags by itself."""
        return all(hasattr(args, "mhc_" + option.name) for option in fields(cls))

    @classmethod
    def from_args(cls, args: Any) -> MHCConfig:
        """Build from the namespace of a parser that `arguments.add_mhc_args` extended."""
        given = {f.name: getattr(args, "mhc_" + f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_options(self) -> str:
        """The `key=value,...` text that `from_options` reads back as this configuration."""
        return ",".join(f"{k}={v}" for k, v in asdict(self).items())


def _yaml_pairs(path: str) -> list[tuple[str, str]]:
    """The keys and values of a YAML file as they are written: all of them, and `off` is no boolean."""
    try:
        with open(path, "rb") as file:
            root: Any = yaml.compose(file, yaml.BaseLoader)
        pairs = root.value if isinstance(root, yaml.MappingNode) else [(root, root)] if root else []
        for node in (node for pair in pairs for node in pair):
            if node is root or not isinstance(node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "this is no option or value", node.start_mark)
    except (OSError, yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{ENVIRONMENT}={path}: {said}; give a YAML file of `option: value` lines, or key=value,..."
        ) from error
    return [(key.value, value.value) for key, value in pairs]
