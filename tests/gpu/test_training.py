"""What Megatron's users switch on, with Transformer Engine through pretrain(): mHC's loss beside vanilla's.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/gpu/test_training.py -rA -n 6

A case prints both losses at the last steps and milliseconds of a step, those of a GPU that other cases share.
"""

import os
import subprocess
import sys

import pytest

if not os.environ.get("MEGATRON_MHC_GPU_TESTS"):
    pytest.skip("set MEGATRON_MHC_GPU_TESTS=1 on a machine with a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine")

from scripts import gpu_check

HYBRID_FP8 = "--fp8-format hybrid --fp8-recipe "
BLOCKWISE = "--fp8-format e4m3 --fp8-recipe blockwise"
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy "
OFFLOAD = "--fine-grained-activation-offloading --offload-modules "

# name: flags of both sides
SWITCHES = {
    "": "",
    "moe": gpu_check.MOE,
    "fp8 tensorwise": HYBRID_FP8 + "tensorwise",
    "fp8 delayed": HYBRID_FP8 + "delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max",
    "fp8 delayed, parameters": HYBRID_FP8 + "delayed --fp8-param-gather",
    "fp8 blockwise": BLOCKWISE,
    "fp8 blockwise, parameters": BLOCKWISE + " --fp8-param-gather",
    "fp8 blockwise, moe": gpu_check.MOE + BLOCKWISE,
    "fsdp optim": FSDP + "optim",
    "fsdp optim_grads_params": FSDP + "optim_grads_params",
    "fsdp2": "--use-torch-fsdp2 --ckpt-format torch_dist",
    "offloaded attention": OFFLOAD + "core_attn attn_proj",
    "offloaded experts": gpu_check.MOE + OFFLOAD + "expert_fc1 moe_act",
    "offloaded layers": "--cpu-offloading-num-layers 2",
    "offloaded optimizer": "--optimizer-cpu-offload --optimizer-offload-fraction 1.0 "
    "--use-precision-aware-optimizer",
    "hybrid": "--hybrid-layer-pattern *-*-*-*-*-*-*-*-",
}
# name: flags of mHC alone, whose loss is compared with plain vanilla's
FORMS = {
    "single-pass": "--mhc-preset deepseek_v41",
    "deepseek_v4": "--mhc-preset deepseek_v4",
    "glm_5_3": "--mhc-preset glm_5_3",
    "hy_v4": "--mhc-preset hy_v4",
    "qwen4_exp": "--mhc-preset qwen4_exp",
    "multistream MTP": "--mtp-num-layers 1 --mhc-mtp multistream --mhc-preset deepseek_v4",
    "recompute": "--mhc-recompute-layer-num auto",
    "three streams": "--mhc-num-residual-streams 3",
}
FP8 = [name for name in SWITCHES if name.startswith("fp8")]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(name, flags)` trains 50 steps and returns `gpu_check.run`'s row."""
    out = tmp_path_factory.mktemp("training")
    data = out / "data" / "stdlib"
    script = gpu_check.ROOT / "examples" / "quickstart" / "prepare_text.py"
    subprocess.run([sys.executable, script, data], check=True)

    def train(name, flags):
        row = gpu_check.run(name, flags, "auto", data, out)
        assert row["exit"] == 0 and row["ok"], row
        return row

    return train


def compare(train, name, plain, mhc):
    vanilla, ours = train(name + " plain", plain + " --no-mhc"), train(name + " mHC", mhc)
    shown = "{last_loss:.4f} at {median_step_ms:.0f} ms"
    print(f"{name or 'plain'}: vanilla {shown.format(**vanilla)}, mHC {shown.format(**ours)}")
    # One seed and 50 steps: what a form changes, and far less than what a fault would.
    assert abs(ours["last_loss"] - vanilla["last_loss"]) < 0.15


@pytest.mark.parametrize("name", FP8)
def test_fp8_trains_beside_vanilla(name, train):
    compare(train, name, SWITCHES[name], SWITCHES[name])


@pytest.mark.parametrize("name", [name for name in SWITCHES if name not in FP8])
def test_training_is_beside_vanillas(name, train):
    compare(train, name, SWITCHES[name], SWITCHES[name])


@pytest.mark.parametrize("name", FORMS)
def test_a_form_trains_beside_vanilla(name, train):
    mtp = "--mtp-num-layers 1" if "MTP" in name else ""
    compare(train, name, mtp, FORMS[name])
