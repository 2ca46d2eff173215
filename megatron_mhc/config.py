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


@dataclass(frozen=True)
class MHCConfig:
    """Options of the mHC residual connection; the defaults are the paper's.

    A value may also be given as text. `auto` of h_res, contract and init becomes what it stands for, as does
    `pp_boundary="auto"`, except under `pipeline_schedule="auto"`.

    Raises:
        ValueError: a value outside its range, naming the flag and the remedy.

    Source: arXiv 2512.24880 Eqs. (5), (14)-(19).
    """

    num_residual_streams: int = _option(4, "n, the number of parallel residual streams", least=1, stored=True)
    preset: str = _option(
        "paper",
        "arithmetic of the mappings: paper is Eqs. (14)-(19); deepseek_v4 has that model's softmax, eps 1e-6 "
        "after every step, transposed comb and learned output head; glm_5_3 is deepseek_v4 with the mean as "
        "output; hy_v4 leaves the streams unmixed, has eps 1e-6 in h_pre and h_post, and a learned head",
        choices=("paper", "deepseek_v4", "glm_5_3", "hy_v4"),
        stored=True,
    )
    h_res: str = _option(
        "auto",
        "how a sub-layer mixes the streams: sinkhorn is mHC; identity leaves them unmixed; unconstrained is "
        "plain hyper-connections (Eq. (5), the paper's baseline: tanh mappings, normalised per stream); auto "
        "is identity under hy_v4, else sinkhorn",
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
    post_magnitude: float = _option(
        2.0,
        "what the sigmoid of the weights of writing is multiplied by; other values than 2 belong to hy_v4, "
        "whose config.json calls it hc_magnitude",
        above=0,
        stored=True,
    )
    sinkhorn_iterations: int = _option(
        20, "pairs of column and row normalisations of H_res", least=1, stored=True
    )
    init: str = _option(
        "auto",
        "mappings at step 0: home_stream has each sub-layer read one stream, its home, and starts near the "
        "plain residual network; uniform is as in Megatron's branches; mean_read has each read the mean of "
        "the streams, by a random phi of --init-method-std; auto is mean_read under hy_v4, else home_stream",
        choices=("auto", "home_stream", "uniform", "mean_read"),
    )
    init_gating_factor: float = _option(0.01, "initial value of the three gating factors alpha", least=0)
    contract: str = _option(
        "auto",
        "how n streams become one before the final norm; auto is learned_head under deepseek_v4 and hy_v4, "
        "else mean",
        choices=("auto", "mean", "sum", "learned_head"),
        stored=True,
    )
    norm_eps: float = _option(
        1e-6,
        "added to mean(x^2) inside the root of the mappings' norm; the paper does not state it",
        above=0,
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
        self._follow_preset()
        if self.recompute_coefficients and self.recompute_layer_num == "off":
            raise ValueError(
                f"{flag('recompute_coefficients')} without recompute: add {flag('recompute_layer_num')}=auto"
            )
        if self.pp_boundary == "auto" and self.pipeline_schedule != "auto":
            object.__setattr__(self, "pp_boundary", "whole")

    def _follow_preset(self) -> None:
        """Give `auto` the preset's values, and refuse what contradicts it."""
        implied = _PRESETS[self.preset]
        for name in ("h_res", "contract", "init"):
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, implied[name])
        if self.preset != "paper" and self.h_res == "unconstrained":
            raise ValueError(
                f"{flag('h_res')}=unconstrained has no {self.preset} form: use {flag('preset')}=paper"
            )
        if self.preset in ("glm_5_3", "hy_v4"):
            for name in ("h_res", "h_pre", "h_post", "contract"):
                value, own = getattr(self, name), implied.get(name, "dynamic")
                if value != own:
                    raise ValueError(
                        f"{flag(name)}={value} is not {self.preset}'s, which has {own}: leave it out, or use "
                        f"{flag('preset')}=deepseek_v4, which takes it"
                    )
        if self.preset != "hy_v4" and self.post_magnitude != 2.0:
            raise ValueError(
                f"{flag('post_magnitude')}={self.post_magnitude} belongs to hy_v4, {self.preset} has 2.0: "
                f"leave it out, or use {flag('preset')}=hy_v4"
            )

    @property
    def has_deepseek_form(self) -> bool:
        """True for DeepSeek-V4's mappings: eps 1e-6 on h_pre, and n*n logits that are those of comb."""
        return self.preset != "paper"

    @property
    def post_eps(self) -> float:
        """What is added to h_post."""
        return 1e-6 if self.preset == "hy_v4" else 0.0

    @property
    def parts(self) -> dict[str, int]:
        """The mappings that are learned, in the order of their rows, and the biases that each has."""
        n, dynamic = self.num_residual_streams, "dynamic"
        learned = (self.h_pre == dynamic, self.h_post == dynamic, self.h_res != "identity")
        sizes = (("pre", n), ("post", n), ("res", n * n))
        return {part: size for (part, size), on in zip(sizes, learned, strict=True) if on}

    @property
    def is_hc(self) -> bool:
        """True for plain hyper-connections (Eq. (5)), whose projection reads one stream at a time."""
        return self.h_res == "unconstrained"

    def arithmetic(self) -> dict[str, Any]:
        """The options that a checkpoint's weights are only meaningful under."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["stored"]}

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


# What `auto` stands for under each preset. h_pre and h_post are dynamic in all published models.
_PRESETS = {
    "paper": dict(h_res="sinkhorn", contract="mean", init="home_stream"),
    "deepseek_v4": dict(h_res="sinkhorn", contract="learned_head", init="home_stream"),
    "glm_5_3": dict(h_res="sinkhorn", contract="mean", init="home_stream"),
    "hy_v4": dict(h_res="identity", contract="learned_head", init="mean_read"),
}


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
