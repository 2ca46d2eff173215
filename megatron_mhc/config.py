"""What a user can choose about mHC, checked when it is said and not when it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import yaml

ENVIRONMENT = "MEGATRON_MHC"

_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": ("paper", "deepseek_v4"),
    "h_res": ("sinkhorn", "identity", "unconstrained"),
    "h_pre": ("dynamic", "fixed"),
    "h_post": ("dynamic", "fixed"),
    "init": ("home_stream", "uniform"),
    "contract": ("auto", "mean", "sum", "learned_head"),
    "backend": ("auto", "hopper", "triton", "reference"),
    "boundary": ("auto", "apart", "linked", "fused"),
    "alarm": ("off", "warn", "stop"),
    "pipeline_schedule": ("megatron", "interleaved", "fused"),
    "pp_boundary": ("whole", "split"),
}


def refuse_environment() -> None:
    """Raise ValueError if MEGATRON_MHC is set beside a script's own --mhc-* flags."""
    if os.environ.get(ENVIRONMENT):
        raise ValueError(f"this script has --mhc-* flags: unset {ENVIRONMENT}, so that one place decides")


def flag(name: str) -> str:
    """Command-line spelling of a field: `num_residual_streams` -> `--mhc-num-residual-streams`."""
    return "--mhc-" + name.replace("_", "-")


@dataclass(frozen=True)
class MHCConfig:
    """Options of the mHC residual connection; the defaults are the paper's.

    Args:
        num_residual_streams: n, the number of parallel residual streams.
        preset: arithmetic of the mappings. `paper` is Eqs. (14)-(19). `deepseek_v4` is that model's
            softmax, its eps 1e-6 after every step, its transposed comb and its learned output head.
        h_res: `sinkhorn` (mHC), `identity` (H_res = I), or `unconstrained` (plain hyper-connections,
            Eq. (5), the paper's baseline: tanh mappings, normalised per stream).
        h_pre, h_post: `dynamic`, or `fixed` at 1/n and at 1 (the paper's ablation).
        sinkhorn_iterations: pairs of column and row normalisations.
        init: `home_stream` starts near the plain residual network; `uniform` is Megatron's own.
        init_gating_factor: initial value of the three alphas.
        contract: how n streams become one before the final norm. `auto` is `learned_head` under
            `deepseek_v4` and `mean` otherwise.
        norm_eps: added to mean(x^2) inside the root.
        load_dense: allow a checkpoint without mHC parameters to fill everything else.
        backend: `triton`; `hopper`, for n = 4 and bf16 on H100 and H200: CUDA kernels for reading the
            streams and their gradient, Triton for the rest; `reference` (plain torch); or `auto`: hopper or
            else triton on CUDA where they can serve, plain torch elsewhere.
        boundary: what the kernels of two connections in a row do together. `linked`: the second
            one's backward makes the first one's df (the same bits). `fused`: besides, the first one's
            post_res reads for the second too (hopper, the same bits), or projects for it (triton, in bf16).
            `apart`: nothing. `auto`: fused by hopper, linked by triton (docs/kernels.md).
        log_interval: write diagnostics of the mappings every so many steps; 0 never.
        log_tokens: how many tokens of the first micro-batch of each data-parallel rank they sample.
        alarm: `warn` or `stop` when a gain leaves [1 / alarm_gain, alarm_gain] or a mapping logit
            leaves [-alarm_logit, alarm_logit] at a logging step.
        recompute_layer_num: sub-layers (attention and MLP count one each) of a block whose streams and
            layer inputs are dropped and replayed in backward: a number, `auto` for the blocks of least
            memory, or `off`.
        recompute_coefficients: replay the coefficients too, instead of keeping them.
        pipeline_schedule: `megatron`; `interleaved`, the same order of chunks with communication that
            compute does not wait for; or `fused`, where the forward of one micro-batch and the backward of
            another run node by node in turns (docs/pipeline.md).
        pp_boundary: what leaves a pipeline stage under the last two: `whole` streams, or `split`, the
            mixed streams before the last MLP and its output behind it.

    Raises:
        ValueError: a value outside its range, naming the flag and the remedy.

    Source: arXiv 2512.24880 Eqs. (5), (14)-(19).
    """

    num_residual_streams: int = 4
    preset: str = "paper"
    h_res: str = "sinkhorn"
    h_pre: str = "dynamic"
    h_post: str = "dynamic"
    sinkhorn_iterations: int = 20
    init: str = "home_stream"
    init_gating_factor: float = 0.01
    contract: str = "auto"
    norm_eps: float = 1e-6
    load_dense: bool = False
    backend: str = "auto"
    boundary: str = "auto"
    log_interval: int = 0
    log_tokens: int = 256
    alarm: str = "off"
    alarm_gain: float = 10.0
    alarm_logit: float = 50.0
    recompute_layer_num: str = "off"
    recompute_coefficients: bool = False
    pipeline_schedule: str = "megatron"
    pp_boundary: str = "whole"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{flag(name)}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}"
                )
        if self.num_residual_streams < 1:
            raise ValueError(
                f"{flag('num_residual_streams')}={self.num_residual_streams}: give at least 1 (default 4)"
            )
        if self.sinkhorn_iterations < 1:
            raise ValueError(
                f"{flag('sinkhorn_iterations')}={self.sinkhorn_iterations}: give at least 1 (default 20), "
                f"or {flag('h_res')} identity to leave the streams unmixed"
            )
        if not self.init_gating_factor >= 0:
            raise ValueError(
                f"{flag('init_gating_factor')}={self.init_gating_factor}: give 0 or more (default 0.01)"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"{flag('norm_eps')}={self.norm_eps}: give a positive number (default 1e-6)")
        if self.log_interval < 0:
            raise ValueError(
                f"{flag('log_interval')}={self.log_interval}: give steps between two samples, or 0"
            )
        if self.log_tokens < 1:
            raise ValueError(f"{flag('log_tokens')}={self.log_tokens}: give at least 1 (default 256)")
        if self.alarm != "off" and not self.log_interval:
            raise ValueError(
                f"{flag('alarm')}={self.alarm} looks at logging steps only: add {flag('log_interval')} 100"
            )
        if not self.alarm_gain > 1:
            raise ValueError(f"{flag('alarm_gain')}={self.alarm_gain}: give more than 1 (default 10)")
        if not self.alarm_logit > 0:
            raise ValueError(f"{flag('alarm_logit')}={self.alarm_logit}: give more than 0 (default 50)")
        if self.preset == "deepseek_v4" and self.h_res == "unconstrained":
            raise ValueError(
                f"{flag('h_res')}=unconstrained has no deepseek_v4 form: use {flag('preset')} paper"
            )
        number = str(self.recompute_layer_num)
        if number not in ("auto", "off") and not (number.isdecimal() and int(number) >= 1):
            raise ValueError(
                f"{flag('recompute_layer_num')}={self.recompute_layer_num!r}: give auto, off, or the number "
                "of sub-layers in a block, 1 or more"
            )
        object.__setattr__(self, "recompute_layer_num", number)
        if self.recompute_coefficients and number == "off":
            raise ValueError(
                f"{flag('recompute_coefficients')} without recompute: add {flag('recompute_layer_num')} auto"
            )
        if self.contract == "auto":
            resolved = "learned_head" if self.preset == "deepseek_v4" else "mean"
            object.__setattr__(self, "contract", resolved)

    @property
    def is_hc(self) -> bool:
        """True for plain hyper-connections (Eq. (5)), whose projection reads one stream at a time."""
        return self.h_res == "unconstrained"

    def arithmetic(self) -> dict[str, Any]:
        """The options that a checkpoint's weights are only meaningful under."""
        loose = {"init", "init_gating_factor", "load_dense", "backend", "boundary"}
        loose |= {"recompute_layer_num", "recompute_coefficients", "pipeline_schedule", "pp_boundary"}
        loose |= {"log_interval", "log_tokens", "alarm", "alarm_gain", "alarm_logit"}
        return {k: v for k, v in asdict(self).items() if k not in loose}

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], source: str = "options") -> MHCConfig:
        """Build from field names to values, which may be strings; `source` is named in errors."""
        types = {f.name: f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in options.items():
            name = key.replace("-", "_")
            if name not in types:
                raise ValueError(f"{source}: no mHC option {key!r}; there are {', '.join(types)}")
            try:
                values[name] = _parse(types[name], value)
            except ValueError as error:
                raise ValueError(f"{source}: {key}={value!r} is not a valid {types[name]}") from error
        return cls(**values)

    @classmethod
    def from_options(cls, text: str) -> MHCConfig:
        """Build from `key=value,key=value` or from the path of a YAML file of such keys."""
        if text.endswith((".yaml", ".yml")):
            if not os.path.exists(text):
                raise ValueError(f"{ENVIRONMENT}={text}: no such file; give a YAML file or key=value,...")
            with open(text) as file:
                loaded = yaml.safe_load(file) or {}
            if not isinstance(loaded, dict):
                raise ValueError(f"{ENVIRONMENT}={text}: the file must hold `option: value` lines")
            return cls.from_mapping(loaded, text)
        items = [item.strip() for item in text.split(",") if item.strip()]
        bad = [item for item in items if "=" not in item]
        if bad:
            raise ValueError(f"{ENVIRONMENT}: {bad[0]!r} is not key=value (or a path ending in .yaml)")
        return cls.from_mapping(dict(i.split("=", 1) for i in items), ENVIRONMENT)

    @classmethod
    def from_environment(cls) -> MHCConfig:
        """Build from the variable MEGATRON_MHC; the defaults where it is unset."""
        return cls.from_options(os.environ.get(ENVIRONMENT, ""))

    @classmethod
    def from_args(cls, args: Any) -> MHCConfig:
        """Build from the namespace of a parser that `arguments.add_mhc_args` extended."""
        given = {f.name: getattr(args, "mhc_" + f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_options(self) -> str:
        """The `key=value,...` text that `from_options` reads back as this configuration."""
        return ",".join(f"{k}={v}" for k, v in asdict(self).items())


def _parse(kind: Any, value: Any) -> Any:
    if kind == "bool":
        if isinstance(value, bool):
            return value
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise ValueError(value)
        return words[str(value).lower()]
    return {"int": int, "float": float, "str": str}[kind](value)
