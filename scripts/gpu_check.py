"""Train small bf16 models through Megatron's pretrain() on the local GPU, with mHC and without.

    python scripts/gpu_check.py --out runs/gpu_check [--backend reference] [--jobs 4]

Dense, MoE (first layer dense, shared expert), MLA, MTP and FP8, from Transformer Engine's specs, 50 steps
each on the Python standard library's sources. Writes one log per run, results.json and results.md; exits
with an error if a loss is not finite or does not fall. With --jobs above 1 the step times are those of a
shared GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 50

COMMON = f"""
--transformer-impl transformer_engine --bf16 --use-distributed-optimizer --no-gradient-accumulation-fusion
--num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --swiglu
--disable-bias-linear --normalization RMSNorm --position-embedding-type rope
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--seq-length 2048 --max-position-embeddings 2048
--micro-batch-size 4 --global-batch-size 8 --train-iters {STEPS} --lr 6e-4 --min-lr 6e-5 --lr-warmup-iters 5
--lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --seed 1234
--split 95,5,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 1
--no-create-attention-mask-in-dataloader --tokenizer-type NullTokenizer --vocab-size 257
"""
MOE = """
--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 704 --moe-shared-expert-intermediate-size 704
--moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-layer-freq ([0]+[1]*7)
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
"""
MLA = """
--multi-latent-attention --q-lora-rank 256 --kv-lora-rank 128 --qk-head-dim 64 --qk-pos-emb-head-dim 32
--v-head-dim 64 --no-rope-fusion
"""
GQA_FULL_RECOMPUTE = """
--group-query-attention --num-query-groups 4
--recompute-granularity full --recompute-method uniform --recompute-num-layers 1
"""

RECIPES: dict[str, str] = {
    "dense plain": "--no-mhc",
    "dense mHC n=4": "",
    "dense mHC n=4 deepseek_v4": "--mhc-preset deepseek_v4",
    "dense HC n=4": "--mhc-h-res unconstrained",
    "GQA, full recompute, mHC n=4": GQA_FULL_RECOMPUTE,
    "MoE plain": MOE + "--no-mhc",
    "MoE mHC n=4": MOE,
    "MLA MoE mHC n=4": MOE + MLA,
    "dense mHC n=4, MTP": "--mtp-num-layers 1",
    "dense mHC n=4, FP8": "--fp8-format hybrid --fp8-recipe tensorwise",
}
_FIELDS = {
    "loss": re.compile(r"lm loss: ([0-9.E+-]+|nan|inf)", re.I),
    "ms": re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)"),
    "grad_norm": re.compile(r"grad norm: ([0-9.]+|nan|inf)"),
}


def run(name: str, flags: str, backend: str, data: Path, out: Path) -> dict:
    """Train one recipe with `backend`; returns its losses, gradient norms and median step time in ms."""
    command = [sys.executable]
    common = COMMON.split()
    if "--use-torch-fsdp2" in flags:  # has its own shards of the optimizer
        common.remove("--use-distributed-optimizer")
    command += ["-m", "megatron_mhc.pretrain_gpt", *common, *flags.split(), "--data-path", str(data)]
    if "--no-mhc" not in flags:
        command += ["--mhc-backend", backend]
    log = out / (re.sub(r"\W+", "_", name) + ".log")
    env = {
        **os.environ,
        **dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"),
        **dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0"),  # a free one, which nobody else has to know
        "CUDA_DEVICE_MAX_CONNECTIONS": "32" if "fsdp" in flags else "1",  # which FSDP refuses
        "NVTE_CPU_OFFLOAD_V1": "1" if "--fine-grained" in flags else "0",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT).returncode
    row = read(name, flags, status, log)
    print({k: v for k, v in row.items() if k not in ("losses", "grad_norms", "flags")}, flush=True)
    if status:
        print(log.read_text()[-3000:], flush=True)
    return row


def read(name: str, flags: str, status: int, log: Path) -> dict:
    """The row of a recipe whose process ended with `status`."""
    lines = [line for line in log.read_text().splitlines() if "lm loss" in line]
    series = {
        key: [float(m[1]) for line in lines if (m := pattern.search(line))]
        for key, pattern in _FIELDS.items()
    }
    losses = series["loss"]
    healthy = status == 0 and len(losses) == STEPS and all(map(_finite, losses + series["grad_norm"]))
    return {
        "name": name,
        "flags": " ".join(flags.split()),
        "exit": status,
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": statistics.mean(losses[-5:]) if losses else None,
        "median_step_ms": statistics.median(series["ms"][10:]) if len(series["ms"]) > 10 else None,
        "ok": healthy and statistics.mean(losses[-5:]) < losses[0] - 1,
        "losses": losses,
        "grad_norms": series["grad_norm"],
    }


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--backend", choices=("auto", "hopper", "triton", "reference"), default="auto")
    parser.add_argument("--only", default="", help="run recipes whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    import torch

    data = options.out / "data" / "stdlib"
    subprocess.run([sys.executable, ROOT / "examples" / "quickstart" / "prepare_text.py", data], check=True)
    device = {
        "device": torch.cuda.get_device_name(),
        "versions": {p: version(p) for p in ("torch", "megatron-core", "transformer-engine")},
    }
    chosen = {name: flags for name, flags in RECIPES.items() if options.only in name}
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda item: run(*item, options.backend, data, options.out), chosen.items()))
    (options.out / "results.json").write_text(
        json.dumps({**device, "jobs": options.jobs, "runs": rows}, indent=1)
    )
    table = [
        "| run | first loss | last loss (mean of 5) | median step, ms | finite and falling |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["name"], *(f"{r[k]:.3f}" if r[k] else "-" for k in ("first_loss", "last_loss")), ""]
        cells[3] = f"{r['median_step_ms']:.0f}" if r["median_step_ms"] else "-"
        table.append("| " + " | ".join([*cells, "yes" if r["ok"] else "NO"]) + " |")
    (options.out / "results.md").write_text("\n".join(table) + "\n")
    print(json.dumps(device), *table, sep="\n")
    sys.exit(0 if all(r["ok"] for r in rows) else 1)


if __name__ == "__main__":
    main()
