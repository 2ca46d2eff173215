"""Peak memory and step time of a stack of layers: vanilla, mHC, and mHC with every block size.

    python scripts/bench/recompute.py [--cheap] [--only bits|memory] [--widths 2560,4096] [--out bench.json]

A TransformerBlock of Megatron's (Transformer Engine's layers where it is installed), bf16, forward and
backward of one micro-batch. Peak is what a step takes above weights and their gradients, which are there
before. The estimate takes from vanilla's two depths what a layer saves and what a backward pass needs for
itself, and adds mHC by `megatron_mhc.recompute.plan`; `counted` is a vanilla layer by `inventory`. First
the bits: loss and gradients of small stacks with and without, also with a replay on a second stream.

--cheap: three block sizes and auto, and two steps each; about a third of the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # equal bits need it, before TE is loaded
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mhc import MHCConfig, recompute
from megatron_mhc.recompute import inventory, plan
from megatron_mhc.recompute.chunk import chunk_of
from megatron_mhc.specs import wrap_block_spec

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False

MOE = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=256,
    moe_layer_freq=[0, 1, 1, 1],
    moe_grouped_gemm=HAVE_TE,
    moe_token_dispatcher_type="alltoall",
    moe_shared_expert_intermediate_size=256,
    moe_router_load_balancing_type="none",
)
MLA = dict(
    q_lora_rank=64, kv_lora_rank=64, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64, rope_type="rope"
)
DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)


def selective(*modules: str) -> dict:
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


BITS = {
    "dense": {},
    "dense, dropout": DROPOUT,
    "dense, layernorm and mlp recomputed": selective("layernorm", "mlp"),
    "moe": MOE,
    "moe, moe and layernorm recomputed": MOE | selective("moe", "layernorm"),
    "mla, moe": MLA | MOE,
}
SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
CHEAP = (2, 4, 8)


def make_config(width: int, layers: int, **settings) -> TransformerConfig:
    base = dict(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=-(-8 * width // 3 // 256) * 256,
        num_attention_heads=max(1, width // 128),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=HAVE_TE,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=HAVE_TE,
        gradient_accumulation_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    base |= settings
    if "kv_lora_rank" in settings:
        return MLATransformerConfig(**(base | dict(apply_rope_fusion=False)))
    return TransformerConfig(**base)


def build(width: int, layers: int, mhc: MHCConfig | None, **settings) -> TransformerBlock:
    """A block with gradients in place, so that a step allocates activations and work space alone."""
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    config = make_config(width, layers, **settings)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=HAVE_TE)
    block = TransformerBlock(config, spec if mhc is None else wrap_block_spec(spec, mhc, config)).cuda()
    for name, parameter in block.named_parameters():
        if name.endswith("mapping_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.02)  # mappings that depend on the token
        parameter.grad = torch.zeros_like(parameter)
    return block


class Stack:
    """A block and what a step of it takes as input."""

    def __init__(self, block: TransformerBlock, sequence: int, batch: int):
        self.block, config = block, block.config
        torch.manual_seed(0)
        self.x = torch.randn(sequence, batch, config.hidden_size, device="cuda", dtype=torch.bfloat16)
        self.rope = None
        if not config.multi_latent_attention:
            self.rope = RotaryEmbedding(config.hidden_size // config.num_attention_heads, 1.0)(sequence)
        self.mask = None
        if not HAVE_TE:
            self.mask = torch.ones(sequence, sequence, dtype=torch.bool, device="cuda").triu(1)[None, None]

    def step(self, before_backward=lambda: None) -> torch.Tensor:
        x = self.x.detach().requires_grad_()
        out = self.block(x, self.mask, rotary_pos_emb=self.rope)
        loss = out.float().square().mean()
        before_backward()
        loss.backward()
        return torch.stack([loss.detach(), x.grad.float().norm()])

    def measure(self, steps: int) -> dict[str, float]:
        """Peak bytes above what is there between steps, and the median milliseconds of a step."""
        self.step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        static, times = torch.cuda.memory_allocated(), []
        for _ in range(steps):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return dict(peak=torch.cuda.max_memory_allocated() - static, ms=statistics.median(times))


def check_bits(width: int = 512) -> dict[str, str]:
    """Whether loss and all gradients keep their bits, for each kind of layer and each way to replay."""

    def run(mhc, settings, before_backward=None):
        stack = Stack(build(width, 4, mhc, **settings), 256, 2)
        for parameter in stack.block.parameters():
            parameter.grad = None
        torch.manual_seed(2)
        loss = stack.step(lambda: before_backward(stack.block) if before_backward else None)
        return [loss, *(p.grad for p in stack.block.parameters())]

    def elsewhere(block):
        with torch.cuda.stream(torch.cuda.Stream()):
            recompute.replay(recompute.handle(block))

    def same(got, want):
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    ways = {
        "blocks of 3": (dict(recompute_layer_num="3"), None),
        "auto": (dict(recompute_layer_num="auto"), None),
        "coefficients replayed": (dict(recompute_layer_num="3", recompute_coefficients=True), None),
        "replay on a second stream": (dict(recompute_layer_num="3"), elsewhere),
    }
    results = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    for kind, settings in BITS.items():
        try:
            want = run(MHCConfig(), settings)
            repeatable = same(run(MHCConfig(), settings), want)
        except Exception as error:  # without mHC's recompute: the machine lacks something that Megatron needs
            results[kind] = f"not run: {type(error).__name__}: {error}"
            print(f"bits, {kind}: {results[kind]}", flush=True)
            continue
        for way, (options, hook) in ways.items():
            equal = same(run(MHCConfig(**options), settings, hook), want)
            verdict = "equal" if equal else "DIFFERENT" if repeatable else "not repeatable without it either"
            results[f"{kind}: {way}"] = verdict
            print(f"bits, {kind}: {way}: {verdict}", flush=True)
    torch.use_deterministic_algorithms(False)
    return results


def measure_width(width: int, depths: list[int], args: argparse.Namespace) -> list[dict]:
    """Rows of one width; the estimate needs vanilla at both depths first."""
    n, tokens = 4, args.sequence * args.batch
    one = 2 * tokens * width
    rows, vanilla = [], {}
    for depth in depths:
        stack = Stack(build(width, depth // 2, None), args.sequence, args.batch)
        vanilla[depth] = stack.measure(args.steps)
        del stack
    shallow, deep = min(depths), max(depths)
    if shallow == deep:
        raise SystemExit("--sublayers: give two depths, from which a layer's own activations follow")
    layer = 2 * (vanilla[deep]["peak"] - vanilla[shallow]["peak"]) // (deep - shallow)
    work = vanilla[deep]["peak"] - deep // 2 * layer
    config = make_config(width, 1)
    counted = 2 * one + tokens * (inventory.attention(config) + inventory.mlp(config, moe=False))
    inside = max(0, layer - 2 * one) // (2 * tokens)
    for depth in depths:
        stack = Stack(
            build(width, depth // 2, MHCConfig(recompute_layer_num="auto")), args.sequence, args.batch
        )
        chunk = chunk_of(stack.block)

        def sublayers(replayed: bool, depth: int = depth, fused: bool = HAVE_TE) -> list[plan.SubLayerBytes]:
            # The local layers' norms are modules of their own, whose outputs blocks drop as well.
            saved = inside if fused else inside - one // tokens
            fact = inventory.sublayer(one, tokens, n, norm=not fused, inside=saved, replayed=replayed)
            return [fact] * depth

        def add(name: str, got: dict, estimate: float, blocks: list[int] | None = None, depth: int = depth):
            row = dict(width=width, sublayers=depth, setting=name, blocks=blocks, **got)
            row |= dict(estimate=estimate, error=estimate / got["peak"] - 1 if got["peak"] else None)
            base = vanilla[depth]
            row |= dict(over_vanilla=got["peak"] / base["peak"] - 1 if base["peak"] else None)
            row |= dict(counted_layer=counted, vanilla_layer=layer)
            rows.append(row)
            show(row)

        add("vanilla", vanilla[depth], work + depth // 2 * layer)
        extra = work + (n - 1) * one  # the gradient of the streams is n times as wide
        block_at, chunk.block_at = chunk.block_at, lambda *_: None
        add("mHC", stack.measure(args.steps), extra + plan.without_replay(sublayers(False)))
        chunk.block_at = block_at
        for size in (s for s in args.sizes if s <= depth):
            blocks = plan.uniform(depth, size)
            chunk.use(blocks)
            add(
                f"blocks of {size}",
                stack.measure(args.steps),
                extra + plan.peak(sublayers(True), blocks),
                blocks,
            )
        chunk.blocks = []  # as at start-up, from the inventory
        got = stack.measure(args.steps)
        add("auto", got, extra + plan.peak(sublayers(True), chunk.blocks), chunk.blocks)
        del stack, chunk, block_at
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def show(row: dict) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:+.1f} %"

    print(
        f"{row['width']:>6} {row['sublayers']:>4}  {row['setting']:<14} {row['peak'] / 2**30:8.3f} GiB "
        f"{row['estimate'] / 2**30:8.3f} {percent(row['error']):>9} {percent(row['over_vanilla']):>9} "
        f"{row['ms']:9.1f} ms  {row['blocks'] if row['setting'] == 'auto' else ''}",
        flush=True,
    )


def summary(rows: list[dict]) -> list[str]:
    """Against what the issue asks for, from the rows as measured."""
    lines = []
    for width, depth in sorted({(r["width"], r["sublayers"]) for r in rows}):
        mine = {r["setting"]: r for r in rows if (r["width"], r["sublayers"]) == (width, depth)}
        if not mine["vanilla"]["peak"]:
            continue
        blocks = [r for s, r in mine.items() if s.startswith("blocks")]
        best, auto = min(blocks + [mine["auto"]], key=lambda r: r["peak"]), mine["auto"]
        worst = max((r for r in mine.values()), key=lambda r: abs(r["error"]))
        over_best = auto["peak"] / best["peak"] - 1
        steps = [auto["ms"] / mine[name]["ms"] for name in ("mHC", "vanilla")]
        lines.append(
            f"C={width}, {depth} sub-layers: auto {100 * auto['over_vanilla']:+.1f} % over vanilla, "
            f"{100 * over_best:.1f} % over the best measured ({best['setting']}); step {steps[0]:.3f} of "
            f"mHC's without, {steps[1]:.3f} of vanilla's; worst estimate {100 * worst['error']:+.1f} % "
            f"({worst['setting']}); a vanilla layer {auto['vanilla_layer'] / 2**20:.0f} MiB, "
            f"{auto['counted_layer'] / 2**20:.0f} by the inventory"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", default="2560,4096")
    parser.add_argument("--sublayers", default="16,32")
    parser.add_argument("--sizes", help="block sizes; default all, or three with --cheap")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cheap", action="store_true")
    parser.add_argument("--only", choices=("bits", "memory"), help="one of the two parts")
    parser.add_argument("--backend", default="nccl", help="of torch.distributed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.sizes = tuple(map(int, args.sizes.split(","))) if args.sizes else CHEAP if args.cheap else SIZES
    args.steps = min(args.steps, 2) if args.cheap else args.steps
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29713", RANK="0", WORLD_SIZE="1")
    dist.init_process_group(args.backend)
    parallel_state.initialize_model_parallel()

    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {'Transformer Engine' if HAVE_TE else 'local'} layers")
    bits = check_bits() if args.only != "memory" else {}
    if args.only == "bits":
        raise SystemExit("DIFFERENT" in bits.values())
    print("  width  sub  setting             peak   estimate     error  vanilla+       step")
    depths = sorted(map(int, args.sublayers.split(",")))
    rows = [row for width in map(int, args.widths.split(",")) for row in measure_width(width, depths, args)]
    lines = summary(rows)
    print("\n".join(lines))
    if args.out:
        about = dict(device=device, torch=torch.__version__, transformer_engine=HAVE_TE)
        about |= dict(sequence=args.sequence, batch=args.batch, streams=4, bits=bits)
        args.out.write_text(json.dumps(about | dict(rows=rows, summary=lines), indent=1) + "\n")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
