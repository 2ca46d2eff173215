"""The options of mHC: one description of each, from which flags, help, checks and docs follow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import yaml

from megatron_mhc import presets
from megatron_mhc.option import ENVIRONMENT, flag, in_options, option, read, short, takes

__all__ = ["ENVIRONMENT", "MHCConfig", "flag", "in_options", "read", "refuse_environment", "takes"]


def refuse_environment() -> None:
    """Raise ValueError if MEGATRON_MHC is set beside a script's own --mhc-* flags."""
    if os.environ.get(ENVIRONMENT):
        raise ValueError(f"this script has --mhc-* flags: unset {ENVIRONMENT}, so that one place decides")


@dataclass(frozen=True)
class MHCConfig:
    """Options of the mHC residual connection; the defaults are the paper's.

    A value may also be given as text. `auto` of h_res, read, contract and init becomes what it stands for, as
    does `pp_boundary="auto"`, except under `pipeline_schedule="auto"`.

    Raises:
        ValueError: a value outside its range, naming the flag and the remedy.

    Source: arXiv 2512.24880 Eqs. (5), (14)-(19).
    """

    num_residual_streams: int = option(4, "n, the number of parallel residual streams", least=1, stored=True)
    preset: str = option(
        "paper",
        "arithmetic of the mappings: paper is Eqs. (14)-(19); deepseek_v4 has that model's softmax, eps 1e-6 "
        "after every step, transposed comb and learned output head; deepseek_v41 is deepseek_v4 with "
        "--mhc-read previous and --mhc-contract h_pre; glm_5_3 is deepseek_v4 with the mean as output; hy_v4 "
        "leaves the streams unmixed, has eps 1e-6 in h_pre and h_post, and a learned head; qwen4_exp is that "
        "model's gated residual, whose read replaces the norms in front of F: docs/gated_residual.md",
        choices=("paper", "deepseek_v4", "deepseek_v41", "glm_5_3", "hy_v4", "qwen4_exp"),
        stored=True,
    )
    h_res: str = option(
        "auto",
        "how a sub-layer mixes the streams: sinkhorn is mHC; identity leaves them unmixed; unconstrained is "
        "plain hyper-connections (Eq. (5), the paper's baseline: tanh mappings, normalised per stream); auto "
        "is identity under hy_v4 and qwen4_exp, else sinkhorn",
        choices=("auto", "sinkhorn", "identity", "unconstrained"),
        stored=True,
    )
    h_pre: str = option(
        "dynamic",
        "weights with which a sub-layer reads the streams; fixed is 1/n, the paper's ablation",
        choices=("dynamic", "fixed"),
        stored=True,
    )
    h_post: str = option(
        "dynamic",
        "weights with which a sub-layer writes the streams; fixed is 1, the paper's ablation",
        choices=("dynamic", "fixed"),
        stored=True,
    )
    read: str = option(
        "auto",
        "whose weights a sub-layer reads the streams with: current, those that its own connection makes of "
        "these streams; previous, those that the sub-layer in front of it made of its own (DeepSeek-V4.1's "
        "single-pass form: write and next read are one pass over the streams; the first one reads stream 0); "
        "auto is previous under deepseek_v41, else current",
        choices=("auto", "current", "previous"),
        stored=True,
    )
    post_magnitude: float = option(
        2.0,
        "what the sigmoid of the weights of writing is multiplied by; other values than 2 belong to hy_v4, "
        "whose config.json calls it hc_magnitude",
        above=0,
        stored=True,
    )
    sinkhorn_iterations: int = option(
        20, "pairs of column and row normalisations of H_res", least=1, stored=True
    )
    init: str = option(
        "auto",
        "mappings at step 0: home_stream has each sub-layer read one stream, its home, and starts near the "
        "plain residual network; uniform is as in Megatron's branches; mean_read has each read the mean of "
        "the streams, by a random phi of --init-method-std; auto is mean_read under hy_v4, else home_stream",
        choices=("auto", "home_stream", "uniform", "mean_read"),
    )
    init_gating_factor: float = option(0.01, "initial value of the three gating factors alpha", least=0)
    contract: str = option(
        "auto",
        "how n streams become one before the final norm; h_pre weighs them as a further sub-layer would read "
        "them under --mhc-read previous; mixer reads as sub-layers of qwen4_exp do, and replaces the final "
        "norm; library is what wrap_block_spec(contraction=...) was given: docs/contraction.md; auto is "
        "learned_head under deepseek_v4 and hy_v4, mixer under qwen4_exp, h_pre under --mhc-read previous, "
        "else mean",
        choices=("auto", "mean", "sum", "learned_head", "h_pre", "mixer", "library"),
        stored=True,
    )
    mtp: str = option(
        "single",
        "layers of --mtp-num-layers: single is Megatron's, a plain layer on the contracted streams; "
        "multistream is DeepSeek-V4's, a layer between n streams, each h_proj of a stream plus e_proj of the "
        "embedding, with a contraction of its own: docs/mtp.md",
        choices=("single", "multistream"),
        stored=True,
    )
    norm_eps: float = option(
        1e-6,
        "added to mean(x^2) inside the root of the mappings' norm; the paper does not state it",
        above=0,
        stored=True,
    )
    gated_rank: int = option(
        presets.GATED_RANK,
        "rank of the gates by which --mhc-preset qwen4_exp reads the streams",
        least=1,
        stored=True,
    )
    load_dense: bool = option(
        False,
        "let --load take a checkpoint without mHC parameters (a plain GPT); the mappings keep their "
        "initial values",
    )
    backend: str = option(
        "auto",
        "kernels: hopper is CUDA, for n = 4, bf16 and up to 64 Sinkhorn iterations on H100 and H200 with "
        "cuda-bindings; reference is plain torch; auto takes hopper where it can serve, else triton, else "
        "reference, and the log says which",
        choices=("auto", "hopper", "triton", "reference"),
    )
    boundary: str = option(
        "auto",
        "what the kernels of two connections in a row share: apart, nothing; linked, the second's backward "
        "also computes df of the first (same bits); fused, in addition the first's post_res runs in the "
        "second's pre (hopper, same bits) or makes its projection (triton, rounded to bf16); auto is fused "
        "for hopper, linked for triton: docs/kernels.md",
        choices=("auto", "apart", "linked", "fused"),
    )
    norm: str = option(
        "apart",
        "where the RMSNorm in front of attention, MLP or experts is computed: apart, by Megatron's module; "
        "folded, by the kernels of pre, which write its output in place of the layer input (fp32 inside, so "
        "other roundings; the same checkpoints); auto is folded where kernels serve and can, except under "
        "FP8 and FP4: docs/kernels.md",
        choices=("auto", "folded", "apart"),
    )
    log_interval: int = option(
        0,
        "write diagnostics of the mappings to TensorBoard and W&B (mhc/...) every so many steps; 0 is "
        "never: docs/diagnostics.md",
        least=0,
    )
    log_tokens: int = option(
        256, "tokens to sample of the first microbatch on each data-parallel rank", least=1
    )
    alarm: str = option(
        "off",
        "what to do at a logging step when a gain or a mapping logit is out of range",
        choices=("off", "warn", "stop"),
    )
    alarm_gain: float = option(10.0, "alarm beyond this gain, and below its inverse", above=1)
    alarm_logit: float = option(50.0, "alarm beyond this absolute value of a mapping logit", above=0)
    recompute_layer_num: str = option(
        "off",
        "sub-layers (attention and MLP count one each) in a block of recompute: the block drops its streams "
        "and layer inputs and replays them in backward, without running F again; auto chooses the blocks of "
        "least memory: docs/recompute.md",
        choices=("auto", "off"),
        least=1,
    )
    recompute_coefficients: bool = option(False, "replay the coefficients too, instead of keeping them")
    pipeline_schedule: str = option(
        "megatron",
        "interleaved has Megatron's order of chunks, and overlaps messages with compute; fused also runs the "
        "forward of one microbatch and the backward of another node by node in turns; auto takes what the "
        "simulator says is fastest for the launch and its link, and the log says which and why: "
        "docs/schedules.md",
        choices=("auto", "megatron", "interleaved", "fused"),
    )
    pipeline_transport: str = option(
        "auto",
        "how messages travel under interleaved and fused: push has the sender's copy engine write into the "
        "receiver's memory, which takes no SM, and needs a pipeline's GPUs on one host; nccl sends them over "
        "the process groups; auto is push where it can be: docs/schedules.md",
        choices=("auto", "push", "nccl"),
    )
    pp_boundary: str = option(
        "auto",
        "what a stage sends under interleaved and fused: whole, its streams; split, the mixed streams before "
        "its last MLP and that MLP's output after it: docs/pipeline.md; auto is whole, and with "
        "--mhc-pipeline-schedule auto chosen with the schedule",
        choices=("auto", "whole", "split"),
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, read(field, getattr(self, field.name)))
        if self.alarm != "off" and not self.log_interval:
            raise ValueError(
                f"{flag('alarm')}={self.alarm} looks at logging steps only: add {flag('log_interval')}=100"
            )
        if self.recompute_coefficients and self.recompute_layer_num == "off":
            raise ValueError(
                f"{flag('recompute_coefficients')} without recompute: add {flag('recompute_layer_num')}=auto"
            )
        for name, value in presets.implied(vars(self)).items():
            object.__setattr__(self, name, value)
        presets.check(self)
        if self.pp_boundary == "auto" and self.pipeline_schedule != "auto":
            object.__setattr__(self, "pp_boundary", "whole")

    @property
    def has_deepseek_form(self) -> bool:
        """True for DeepSeek-V4's mappings: eps 1e-6 on h_pre, and n*n logits that are those of comb."""
        return self.preset not in ("paper", "qwen4_exp")

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
    def reads_previous(self) -> bool:
        """Whether a sub-layer reads with the weights that the one in front of it made."""
        return self.read == "previous"

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
            raise ValueError(f"{source}: {short(options)} does not map options to values")
        return cls._from_pairs(options.items(), source)

    @classmethod
    def from_options(cls, text: str) -> MHCConfig:
        """Build from `key=value,key=value` or from the path of a YAML file of such keys."""
        if text.endswith((".yaml", ".yml")):
            return cls._from_pairs(_yaml_pairs(text), text)
        items = [item.strip() for item in text.split(",") if item.strip()]
        bad = [item for item in items if "=" not in item]
        if bad:
            raise ValueError(f"{ENVIRONMENT}: {short(bad[0])} is not key=value (or a path ending in .yaml)")
        return cls._from_pairs((item.split("=", 1) for item in items), ENVIRONMENT)

    @classmethod
    def _from_pairs(cls, pairs: Iterable[Iterable[Any]], source: str) -> MHCConfig:
        names = [option.name for option in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in pairs:
            name = key.strip().replace("-", "_") if isinstance(key, str) else None
            if name not in names:
                raise ValueError(f"{source}: no mHC option {short(key)}; there are {', '.join(names)}")
            if name in values:
                raise ValueError(
                    f"{source}: {name} is given twice, {short(values[name])} and {short(value)}: drop one"
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
