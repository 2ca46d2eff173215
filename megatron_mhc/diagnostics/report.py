"""Samples of all ranks reduced to one number per statistic and sub-layer.

Mappings first travel between pipeline stages (sum over the pipeline group of disjoint rows), so that a
composite is a product of the same token's matrices. Then each rank fills the rows of its own sub-layers,
and one sum and one maximum over the world finish them. Ranks that hold the same tokens (tensor parallel
without sequence parallel) weigh all of them alike, so means stay means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mhc.config import MHCConfig
from megatron_mhc.diagnostics import statistics
from megatron_mhc.streams import reads_streams

if TYPE_CHECKING:
    from megatron_mhc.diagnostics.sampler import Sample

PARTS = ("pre", "post", "res")
# Averaged over tokens.
MEANS = (
    "gain_forward",
    "gain_backward",
    "composite_gain_forward",
    "composite_gain_backward",
    "norm_ratio",
    "cosine",
    "effective_rank",
    "h_pre_mean",
    "h_pre_square",
    "h_post_mean",
    "h_post_square",
    "alpha_pre",
    "alpha_post",
    "alpha_res",
)
# The largest over tokens; what starts with "minus" is the negative of a minimum.
MAXIMA = (
    "row_error",
    "column_error",
    *(f"logit_{part}_max" for part in PARTS),
    *(f"minus_logit_{part}_min" for part in PARTS),
)


@dataclass(frozen=True)
class Report:
    """The state of all mappings of a model, the same on every rank.

    Args:
        sublayers: their names, in the order in which they run.
        statistics: name -> one value per sub-layer. Without what the configuration fixes: the alphas and
            logits of fixed parts, and the cosine between streams where there is one.
        h_res: [L, n, n] fp64, mean over tokens of each sub-layer's mapping.
        composite: [L, n, n] fp64, mean over tokens of the composite from the model's input; those of a layer
            of multi-token prediction begin with it.
    """

    sublayers: list[str]
    statistics: dict[str, list[float]]
    h_res: list[Any]
    composite: list[Any]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))


# By the symbol of a layer in --hybrid-layer-pattern.
KINDS = {
    "*": "attention",
    "+": "mla",
    "D": "dsa",
    "M": "mamba",
    "G": "gdn",
    "-": "mlp",
    "E": "moe",
}


def sublayer_names(config: TransformerConfig, mhc: MHCConfig, pattern: str | None = None) -> list[str]:
    """`layer_003_mlp` and the like, of all sub-layers of a model: Megatron counts layers from 1.

    Layers of multi-token prediction between streams come last: `mtp_001_attention`, `mtp_001_mlp`.

    Args:
        pattern: of a HybridModel, whose layers are one sub-layer each; a GPT's have an attention and an MLP.
    """
    kinds = [[KINDS[symbol]] for symbol in pattern] if pattern else [["attention", "mlp"]] * config.num_layers
    names = [f"layer_{layer:03d}_{kind}" for layer, both in enumerate(kinds, start=1) for kind in both]
    depths = 1 if config.mtp_use_repeated_layer else config.mtp_num_layers
    if reads_streams(config, mhc):
        names += [f"mtp_{depth + 1:03d}_{kind}" for depth in range(depths) for kind in ("attention", "mlp")]
    return names


def parts_of_composites(names: list[str]) -> list[int]:
    """Numbers of sub-layers that composites span: the decoder's, then each depth's, which h_proj cuts off."""
    parts = groupby(names, lambda name: name[:7] if name.startswith("mtp_") else "decoder")
    return [len(list(part)) for _, part in parts]


def reduce_samples(
    samples: Mapping[int, Sample],
    config: TransformerConfig,
    mhc: MHCConfig,
    capacity: int,
    names: list[str] | None = None,
) -> Report:
    """Reduce this rank's samples with those of all others; a collective call.

    Args:
        samples: this rank's, by index of the sub-layer in the model; empty on a stage without layers.
        capacity: upper bound of the samples' tokens, the same on all ranks.
        names: of the model's sub-layers; None: a GPT's.

    Raises:
        ValueError: a sub-layer of the model that no rank has sampled.
    """
    names = names or sublayer_names(config, mhc)
    sublayers, n = len(names), mhc.num_residual_streams
    device = next((s.h_res.device for s in samples.values()), torch.device(torch.cuda.current_device()))
    rows = sorted(samples)
    all_h_res = torch.zeros(sublayers, capacity, n, n, dtype=torch.float64, device=device)
    for row in rows:
        all_h_res[row, : samples[row].h_res.shape[0]] = samples[row].h_res
    if dist.is_initialized() and config.pipeline_model_parallel_size > 1:
        dist.all_reduce(all_h_res, group=parallel_state.get_pipeline_model_parallel_group())

    width = 1 + len(MEANS) + 2 * n * n
    sums = torch.zeros(sublayers, width, dtype=torch.float64, device=device)
    maxima = torch.full((sublayers, len(MAXIMA)), -torch.inf, dtype=torch.float64, device=device)
    if rows:
        local = [samples[row] for row in rows]
        tokens = local[0].h_res.shape[0]
        stack = all_h_res[:, :tokens]
        parts = stack.split(parts_of_composites(names))
        from_input = torch.cat([statistics.composites_from_input(part) for part in parts])[rows]
        to_output = torch.cat([statistics.composites_to_output(part) for part in parts])[rows]
        means = token_means(local, from_input, to_output)
        matrices = [m.flatten(2).mean(dim=1) for m in (stack[rows], from_input)]
        columns = torch.cat([torch.stack([means[name] for name in MEANS], dim=1), *matrices], dim=1)
        sums[rows, 0] = float(tokens)
        sums[rows, 1:] = columns * tokens
        largest = token_maxima(local)
        table = torch.stack([largest[name] for name in MAXIMA], dim=1)
        # A maximum over ranks may lose a NaN, but not an infinity.
        maxima[rows] = torch.where(table.isnan(), torch.inf, table)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return make_report(names, sums.cpu(), maxima.cpu(), mhc)


def token_means(local: list[Sample], from_input: Tensor, to_output: Tensor) -> dict[str, Tensor]:
    """Means over this rank's tokens.

    Args:
        from_input, to_output: [l, T, n, n], composites of the l local sub-layers.

    Returns:
        [l] for each name in MEANS; NaN for the alphas of fixed parts.
    """
    h_res, gram = (torch.stack([getattr(s, name) for s in local]) for name in ("h_res", "gram"))
    forward, backward = statistics.amax_gain(h_res)
    means = {
        "gain_forward": forward.mean(dim=1),
        "gain_backward": backward.mean(dim=1),
        "composite_gain_forward": statistics.amax_gain(from_input)[0].mean(dim=1),
        "composite_gain_backward": statistics.amax_gain(to_output)[1].mean(dim=1),
        "norm_ratio": statistics.norm_ratio(gram).mean(dim=1),
        "effective_rank": statistics.effective_rank(gram).mean(dim=1),
    }
    absent = torch.full_like(means["gain_forward"], torch.nan)
    several = gram.shape[-1] > 1
    means["cosine"] = statistics.mean_cosine(gram).mean(dim=1) if several else absent
    for name in ("h_pre", "h_post"):
        values = torch.stack([getattr(s, name) for s in local])
        means[name + "_mean"] = values.mean(dim=(1, 2))
        means[name + "_square"] = values.square().mean(dim=(1, 2))
    for part in PARTS:
        dynamic = part in local[0].alphas
        means["alpha_" + part] = torch.cat([s.alphas[part] for s in local]) if dynamic else absent
    return means


def token_maxima(local: list[Sample]) -> dict[str, Tensor]:
    """Maxima over this rank's tokens: [l] for each name in MAXIMA; minus infinity for fixed parts."""
    row, column = statistics.sum_errors(torch.stack([s.h_res for s in local]))
    maxima = {"row_error": row.amax(dim=1), "column_error": column.amax(dim=1)}
    absent = torch.full_like(maxima["row_error"], -torch.inf)
    for part in PARTS:
        highest = lowest = absent
        if part in local[0].logits:
            logits = torch.stack([s.logits[part] for s in local]).flatten(1).to(absent.dtype)
            highest, lowest = logits.amax(dim=1), (-logits).amax(dim=1)
        maxima[f"logit_{part}_max"], maxima[f"minus_logit_{part}_min"] = highest, lowest
    return maxima


def make_report(names: list[str], sums: Tensor, maxima: Tensor, mhc: MHCConfig) -> Report:
    """Divide the sums by their counts and name them.

    Args:
        sums: [L, 1 + means + 2 n^2] on the host, the number of tokens first. maxima: [L, maxima].
    """
    counts = sums[:, :1]
    if missing := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        raise ValueError(f"no rank has sampled {', '.join(missing)}: a composite needs every sub-layer")
    columns = (sums / counts)[:, 1:]
    values = dict(zip(MEANS, columns[:, : len(MEANS)].unbind(1), strict=True))
    values |= zip(MAXIMA, maxima.unbind(1), strict=True)
    for name in ("h_pre", "h_post"):
        variance = values.pop(name + "_square") - values[name + "_mean"].square()
        values[name + "_std"] = variance.clamp_min(0).sqrt()
    for part in PARTS:
        values[f"logit_{part}_min"] = -values.pop(f"minus_logit_{part}_min")
    n = mhc.num_residual_streams
    h_res, from_input = columns[:, len(MEANS) :].split(n * n, dim=1)
    return Report(
        names,
        {name: column.tolist() for name, column in values.items() if name not in left_out(mhc)},
        h_res.unflatten(1, (n, n)).tolist(),
        from_input.unflatten(1, (n, n)).tolist(),
    )


def left_out(mhc: MHCConfig) -> set[str]:
    """Statistics that this configuration has not."""
    fixed = {"pre": mhc.h_pre == "fixed", "post": mhc.h_post == "fixed", "res": mhc.h_res == "identity"}
    parts = [part for part in PARTS if fixed[part]]
    names = {f"alpha_{part}" for part in (PARTS if mhc.is_gated else parts)}
    names |= {f"logit_{part}_{end}" for part in parts for end in ("min", "max")}
    return names | ({"cosine"} if mhc.num_residual_streams == 1 else set())
