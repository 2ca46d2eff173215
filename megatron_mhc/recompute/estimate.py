"""Memory of the decoder layers of every pipeline rank, counted from a configuration: `__main__` prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mhc.backend import why_norms_apart
from megatron_mhc.config import MHCConfig
from megatron_mhc.recompute import inventory, plan
from megatron_mhc.schedule.plans import passes_in_flight
from megatron_mhc.schedule.stages import layers_of_rank, with_experts


@dataclass(frozen=True)
class Rank:
    """The decoder layers of one pipeline rank.

    Args:
        layers: of each model chunk.
        in_flight: passes of chunks held at once under mHC's schedule.
        vanilla: bytes without mHC, at the peak, under Megatron's schedule.
        stored: the largest chunk's sub-layers under mHC without replay; replayed: with.
    """

    layers: list[int]
    in_flight: int
    vanilla: int
    stored: list[plan.SubLayerBytes]
    replayed: list[plan.SubLayerBytes]

    def mhc(self) -> int:
        """Bytes with mHC and nothing dropped."""
        return plan.without_replay(self.stored, self.in_flight)

    def blocks(self, setting: str) -> list[int]:
        """The blocks of `--mhc-recompute-layer-num`."""
        return plan.choose(setting, self.replayed, self.in_flight)

    def with_blocks(self, setting: str) -> int:
        """Bytes with mHC and these blocks."""
        return plan.peak(self.replayed, self.blocks(setting), self.in_flight)


def ranks(
    config: Any,
    mhc: MHCConfig,
    sequence: int,
    micro_batch: int,
    micro_batches: int,
    pattern: str | None = None,
) -> list[Rank]:
    """Count every pipeline rank of a TransformerConfig.

    Args:
        pattern: of a HybridModel's layers; those for multi-token prediction are left out.
        sequence, micro_batch: tokens of a sequence, and sequences of a micro-batch.
        micro_batches: of one step on one data-parallel rank.

    Raises:
        ValueError: a hybrid layer that nobody counted.
    """
    n = mhc.num_residual_streams
    tokens = sequence * micro_batch // config.context_parallel_size
    if config.sequence_parallel:
        tokens //= config.tensor_model_parallel_size
    one = tokens * config.hidden_size * (4 if config.fp32_residual_connection else inventory.itemsize(config))
    found = []
    for rank in range(config.pipeline_model_parallel_size):
        chunks: list[Any] = hybrid_chunks(config, pattern, rank) if pattern else layers_of_rank(config, rank)
        held = passes_in_flight(config, mhc, rank, micro_batches)
        plain = passes_in_flight(config, MHCConfig(), rank, micro_batches)
        facts, plain_facts = (
            [f for layer in max(chunks, key=len) for f in _sublayers(config, layer, folded)]
            for folded in (why_norms_apart(config, mhc) is None, False)
        )
        inside = dict(one=one, tokens=tokens, n=n, rows=sum(mhc.parts.values()))
        stored = [inventory.sublayer(**inside, norm=m, inside=i, replayed=False) for m, i in facts]
        again = dict(replayed=True, coefficients=mhc.recompute_coefficients)
        replayed = [inventory.sublayer(**inside, norm=m, inside=i, **again) for m, i in facts]
        vanilla = plain * sum(one * (1 + norm) + tokens * saved for norm, saved in plain_facts)
        found.append(Rank([len(c) for c in chunks], held, vanilla, stored, replayed))
    return found


def hybrid_chunks(config: Any, pattern: str, rank: int) -> list[str]:
    """The symbols of each model chunk of a pipeline rank of a HybridModel."""
    pp, stages = config.pipeline_model_parallel_size, pattern.split("/")[0].split("|")
    if len(stages) == 1 and pp > 1:  # Megatron shares the layers out
        first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
        whole, ends = stages[0], [first is not None, last is not None]
        middle = pp - sum(ends)
        rest = whole[first or 0 : len(whole) - (last or 0)]
        each = len(rest) // max(middle, 1)
        stages = [rest[i * each : (i + 1) * each] for i in range(middle)]
        stages = [whole[:first]] * ends[0] + stages + [whole[len(whole) - (last or 0) :]] * ends[1]
    return stages[rank::pp]


def _sublayers(config: Any, layer: int | str, folded: bool) -> list[tuple[bool, int]]:
    """For each of a layer's sub-layers: whether a separate norm precedes it, and bytes inside.

    Args:
        layer: 0-based of a GPT, with attention and MLP; a HybridModel's by its symbol, with one of them.
        folded: `pre` computes the norms.
    """
    if isinstance(layer, str):
        is_moe = layer == "E"
    else:
        moe = with_experts(config.moe_layer_freq, config.num_layers)
        is_moe = config.num_moe_experts is not None and moe[layer]
    mine = not folded and not (
        config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or [])
    )
    if layer == "M":
        return [(False, inventory.mamba(config))]
    if layer == "G":
        return [(False, inventory.delta(config))]
    if layer == "D":
        raise ValueError(
            "--hybrid-layer-pattern with D: what DeepSeek's sparse attention saves is not counted; count the "
            "pattern with + in its place"
        )
    latent = config.multi_latent_attention if isinstance(layer, int) else layer == "+"
    attention = (mine and latent, inventory.attention(config, folded, latent))
    mlp = (mine and is_moe, inventory.mlp(config, is_moe, folded))
    return [attention, mlp] if isinstance(layer, int) else [attention if layer in "*+" else mlp]


def table(found: list[Rank], sizes: list[int], n: int) -> str:
    """The printed table: a row for each setting, a column for each pipeline rank, in GiB."""

    def row(name: str, cells: list[str]) -> str:
        return f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells)

    def gib(values: list[int]) -> list[str]:
        return [f"{value / plan.GIB:.3f}" for value in values]

    if not any(r.stored for r in found):
        raise ValueError("--num-layers: no pipeline rank has a decoder layer")
    columns = [(i, r) for i, r in enumerate(found) if r.stored]  # a stage may hold the loss alone
    found = [r for _, r in columns]
    lines = [
        row("pipeline rank", [str(i) for i, _ in columns]),
        row("layers", ["+".join(map(str, r.layers)) for r in found]),
        row("passes in flight", [str(r.in_flight) for r in found]),
        row("vanilla", gib([r.vanilla for r in found])),
        row("mHC", gib([r.mhc() for r in found])),
    ]
    for size in sizes:
        lines.append(row(f"mHC, blocks of {size}", gib([r.with_blocks(str(size)) for r in found])))
    lines.append(row("mHC, auto", gib([r.with_blocks("auto") for r in found])))
    lines.append(
        row("  over vanilla", [f"{100 * (r.with_blocks('auto') / r.vanilla - 1):.1f} %" for r in found])
    )
    for i, r in columns:
        rule = plan.closed_form(n, len(r.replayed))
        lines.append(
            f"rank {i}: auto takes blocks of {', '.join(map(str, r.blocks('auto')))} sub-layers; best equal "
            f"blocks {plan.best_uniform(r.replayed, r.in_flight)}; Eq. (20) {rule:.1f}"
        )
    return "\n".join(lines)
