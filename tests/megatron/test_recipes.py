"""Every recipe: Megatron's checks, its parameters on the meta device against the paper, its memory."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FORMS = ("vanilla", "hc", "mhc")
# Billions of parameters, all and active (arXiv 2512.24880, table of models), and the world size of the
# recipe's sbatch file. Active are those that a token meets, without the input embedding. The last is no
# model of the paper: Llama 3.2 1B has 1.236 B, and its output layer reuses the embedding.
MODELS = {
    "3b": (2.97, 0.612, 32),
    "9b": (9.18, 1.66, 64),
    "27b": (27.0, 4.14, 128),
    "3b-1t": (2.97, 0.612, 32),
    "llama-1b": (1.236, 1.236, 16),
}
# layers, hidden, expert FFN, experts, batch, steps, base learning rate: the same table
PAPER = {
    "3b": (12, 1280, 896, 64, 320, 30000, 8.6e-4),
    "9b": (18, 1920, 1280, 64, 512, 50000, 5.9e-4),
    "27b": (30, 2560, 1536, 72, 1280, 50000, 4.0e-4),
    "3b-1t": (12, 1280, 896, 64, 2560, 100000, 9.0e-4),
}
GPU_GIB = 80
RESERVE_GIB = 12  # for NCCL, kernels, the allocator and uneven experts


def dry_run(tmp_path, model, form, *arguments, **variables):
    environment = {**os.environ, "DATA": "mock", "OUT": str(tmp_path), "DRY_RUN": "1", **variables}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "train.sh"), model, form, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    return words[words.index("megatron_mhc.pretrain_gpt") + 1 :]


def planner():
    spec = importlib.util.spec_from_file_location("plan_memory", EXAMPLES / "plan_memory.py")
    module = sys.modules["plan_memory"] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def mapping_parameters(form, layers, hidden, n=4):
    """By Eqs. (7) and (5): of 2 connections in each layer."""
    rows, columns = (n * n + 2 * n, n * hidden) if form == "mhc" else (n + 2, hidden)
    return 2 * layers * (rows * columns + n * n + 2 * n + 3) * (form != "vanilla")


# That of 3b-1t is the 3b's.
@pytest.mark.parametrize("model", ["3b", pytest.param("9b", marks=pytest.mark.slow), "27b", "llama-1b"])
def test_recipe_has_the_papers_size_and_fits_its_gpus(tmp_path, run_ranks, model):
    words = {form: dry_run(tmp_path, model, form) for form in FORMS}
    total, active, world = MODELS[model]

    def measure():
        plan_memory, out = planner(), {}
        for form in FORMS:
            parameters, args = plan_memory.count(words[form])
            topk, experts = args.moe_router_topk, args.num_experts or 1
            share = parameters.active(topk, experts) if args.num_experts else parameters.total
            ranks = plan_memory.plan(words[form], world)
            sizes = (parameters.total, parameters.mappings, share)
            out[form] = (sizes, vars(args), [(rank.layers, rank.total) for rank in ranks])
        return out

    found = run_ranks(1, measure)[0]
    for form, ((all_of_them, mappings, met), args, ranks) in found.items():
        plain = all_of_them - mappings
        assert mappings == mapping_parameters(form, args["num_layers"], args["hidden_size"])
        assert plain / 1e9 == pytest.approx(total, rel=0.01)
        assert (met - mappings) / 1e9 == pytest.approx(active, rel=0.01)
        assert sum(sum(layers) for layers, _ in ranks) == args["num_layers"]
        assert max(held for _, held in ranks) / 2**30 < GPU_GIB - RESERVE_GIB
    all_of_them, _, met = found["mhc"][0]
    if model in PAPER:  # to every digit of its table
        assert (f"{all_of_them / 1e9:.3g}", f"{met / 1e9:.3g}") == (f"{total:.3g}", f"{active:.3g}")
    # The streams cost memory; replaying them gives it back.
    used = {form: max(held for _, held in ranks) for form, (_, _, ranks) in found.items()}
    assert used["mhc"] < 1.05 * used["vanilla"] < used["hc"]


def test_memory_of_a_custom_layout_is_planned(tmp_path, run_ranks):
    words = dry_run(tmp_path, "3b", "mhc", "--pipeline-model-parallel-size", "4")
    while "--num-virtual-stages-per-pipeline-rank" in words:
        at = words.index("--num-virtual-stages-per-pipeline-rank")
        del words[at : at + 2]
    even, uneven = words, [*words, "--pipeline-model-parallel-layout", "E,t*5|t*4||t*3,L"]

    def planned():
        plan_memory = planner()
        plans = [plan_memory.plan(words, 32) for words in (even, uneven)]
        return [[(rank.layers, rank.weights, rank.total) for rank in ranks] for ranks in plans]

    even, uneven = run_ranks(1, planned)[0]
    assert [layers for layers, *_ in uneven] == [[5], [4], [0], [3]]
    assert uneven[2][2] == 0 and uneven[0][1] > even[0][1]
    assert sum(w for _, w, _ in uneven) == pytest.approx(sum(w for _, w, _ in even))


@pytest.mark.parametrize("model", PAPER)
def test_recipe_has_the_papers_settings(tmp_path, run_ranks, model):
    words = dry_run(tmp_path, model, "mhc")

    def parsed():
        from megatron_mhc import command_line

        args, config, mhc = command_line.parse(words, MODELS[model][2])
        return vars(args), vars(config), mhc

    args, config, mhc = run_ranks(1, parsed)[0]
    layers, hidden, expert_ffn, experts, batch, steps, rate = PAPER[model]
    assert (config["num_layers"], config["hidden_size"], config["num_moe_experts"]) == (
        layers,
        hidden,
        experts,
    )
    assert config["moe_ffn_hidden_size"] == expert_ffn and config["moe_router_topk"] == 6
    assert config["moe_shared_expert_intermediate_size"] == 2 * expert_ffn
    assert config["moe_layer_freq"] == [0] + [1] * (layers - 1)
    assert config["num_attention_heads"] == hidden // 80
    assert (config["kv_lora_rank"], config["qk_pos_emb_head_dim"], config["v_head_dim"]) == (512, 64, 128)
    assert (args["global_batch_size"], args["train_iters"]) == (batch, steps)
    assert (args["lr"], args["min_lr"], args["lr_warmup_iters"]) == (rate, pytest.approx(rate / 10), 2000)
    assert (args["adam_beta2"], args["adam_eps"], args["weight_decay"]) == (0.95, 1e-20, 0.1)
    assert config["layernorm_epsilon"] == 1e-20 and args["seq_length"] == 4096
    assert (mhc.num_residual_streams, mhc.sinkhorn_iterations, mhc.init_gating_factor) == (4, 20, 0.01)
    assert mhc.preset == "paper" and mhc.h_res == "sinkhorn"


# What an H100 asks of a recipe, as Megatron's arguments hold it after its checks.
TUNED = {
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "native",
    "manual_gc": True,
    "manual_gc_interval": 100,
    "log_throughput": True,
    "distributed_timeout_minutes": 30,
}
TUNED_MOE = {"moe_permute_fusion": True, "moe_router_fusion": True, "moe_grouped_gemm": True}
WITH = {
    "fp8": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "deepep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
}


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=pytest.mark.slow if m in ("9b", "3b-1t") else ()) for m in MODELS]
)
def test_megatron_accepts_every_combination_of_argument_files(tmp_path, run_ranks, model):
    """All that examples/README.md offers, through Megatron's parser, its checks, its config and mHC's."""
    extras = ["", "fp8"] if model == "llama-1b" else ["", "fp8", "deepep", "fp8 deepep"]
    words = {(form, with_): dry_run(tmp_path, model, form, WITH=with_) for form in FORMS for with_ in extras}

    def parsed():
        from megatron_mhc import command_line

        found = {}
        for key, command in words.items():
            args, config, mhc = command_line.parse(command, MODELS[model][2])
            found[key] = (vars(args), vars(config), mhc.log_interval)
        return found

    for (form, with_), (args, config, log_interval) in run_ranks(1, parsed, timeout=240)[0].items():
        wanted = TUNED | ({} if model == "llama-1b" else TUNED_MOE)
        for name in with_.split():
            wanted |= WITH[name]
        settings = args | config
        assert {name: settings[name] for name in wanted} == wanted, (form, with_)
        assert settings["moe_router_padding_for_quantization"] == ("fp8" in with_ and model != "llama-1b")
        assert (settings["fp8"] is not None) == ("fp8" in with_)
        assert form == "vanilla" or log_interval == 100


@pytest.mark.parametrize(
    "model, with_, words",
    [
        ("27b", "fp9", "WITH has no 'fp9': give fp8, deepep or both"),
        ("llama-1b", "fp8 deepep", "WITH=deepep: llama-1b has no experts"),
    ],
)
def test_an_argument_file_that_does_not_fit_is_refused(tmp_path, model, with_, words):
    command = ["bash", str(EXAMPLES / "train.sh"), model, "mhc"]
    environment = {**os.environ, "DATA": "mock", "DRY_RUN": "1", "WITH": with_}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and words in done.stderr


def test_forms_differ_in_the_residual_connection_alone(tmp_path):
    words = {form: dry_run(tmp_path, "3b", form) for form in FORMS}
    mine = {form: [w for w in words[form] if w not in words["vanilla"]] for form in ("hc", "mhc")}
    assert [w for w in mine["hc"] if w.startswith("-")] == [
        "--mhc-h-res",
        "--mhc-num-residual-streams",
        "--mhc-log-interval",
    ]
    assert all(w.startswith("--mhc-") for w in mine["mhc"] if w.startswith("-"))
    assert "--no-mhc" in words["vanilla"]


def test_torchrun_gets_the_nodes(tmp_path):
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        '#!/bin/bash\necho "$@"\necho "$PYTORCH_CUDA_ALLOC_CONF $CUDA_DEVICE_MAX_CONNECTIONS"\n'
    )
    torchrun.chmod(0o755)
    environment = {**os.environ, "DATA": "mock", "OUT": str(tmp_path)}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "4", "NODE_RANK": "2"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # what is set stays
    command = ["bash", str(EXAMPLES / "train.sh"), "3b", "mhc", "--seed", "7"]
    call = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    words, variables = call.splitlines()
    assert "--nnodes 4 --node-rank 2" in words and words.endswith("--seed 7")
    assert variables == "expandable_segments:True 32"


# What a CPU without TransformerEngine cannot do is taken out and the model made tiny; the rest is the recipe.
SMALL = shlex.split("""
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --global-batch-size 4 --make-vocab-size-divisible-by 64 --vocab-size 127
    --lr-warmup-iters 1 --log-interval 1 --eval-iters 1 --num-workers 0
    --distributed-backend gloo --transformer-impl local --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
""")
SMALL_MOE = shlex.split("""
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32
    --moe-layer-freq [0,1,1,1] --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 16 --v-head-dim 16
    --qk-pos-emb-head-dim 8 --norm-epsilon 1e-6 --adam-eps 1e-8
""")
TORCHRUN = """#!/bin/bash
words=()
for word in "$@"; do
    case $word in --moe-grouped-gemm | --moe-permute-fusion | --moe-router-fusion) continue ;; esac
    words+=("$word")
    [ "$word" = -m ] && words+=(megatron_mhc.testing.cpu -m)
done
exec {python} -m torch.distributed.run "${{words[@]}}"
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "model, layout",
    [
        ("3b", {"EP": "2"}),
        ("3b-1t", {"EP": "2"}),
        ("9b", {"EP": "2"}),
        ("27b", {"EP": "1", "VPP": "2"}),
        ("llama-1b", {}),
    ],
)
def test_recipe_trains_and_resumes(tmp_path, model, layout, form):
    """Twenty steps on two processes, of which the last ten from the checkpoint of a run that ended before."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torchrun = tmp_path / "torchrun"
    torchrun.write_text(TORCHRUN.format(python=sys.executable))
    torchrun.chmod(0o755)
    variables = {"DATA": "mock", "OUT": str(tmp_path), "STEPS": "20", "GPUS_PER_NODE": "2"} | layout
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MASTER_PORT": "29617"}
    small = SMALL + (["--num-query-groups", "2"] if model == "llama-1b" else SMALL_MOE)
    small = small + ([] if form == "vanilla" else ["--mhc-log-interval", "5"])
    for end in ("10", "20"):
        done = subprocess.run(
            ["bash", str(EXAMPLES / "train.sh"), model, form, *small, "--exit-interval", end],
            cwd=EXAMPLES.parent,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=140,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rates = {event.step: event.value for event in events.Scalars("learning-rate")}
    base = 4.0e-4 if model == "llama-1b" else PAPER[model][-1]
    assert sorted(rates) == list(range(1, 21))
    assert [rates[step] for step in (2, 16)] == pytest.approx([base, base], rel=1e-4)
    assert [rates[step] for step in (18, 20)] == pytest.approx([0.55 * base, 0.1 * base], rel=1e-4)
    if form != "vanilla":
        gains = [event.step for event in events.Scalars("mhc/composite_gain_forward")]
        assert gains == [5, 10, 15, 20]
    losses = [event.value for event in events.Scalars("lm loss")]
    assert len(losses) == 20 and losses[-1] < losses[0]


@pytest.mark.parametrize("model, form, words", [("5b", "mhc", "no model '5b'"), ("3b", "x", "no form 'x'")])
def test_unknown_names_are_refused(tmp_path, model, form, words):
    command = ["bash", str(EXAMPLES / "train.sh"), model, form]
    done = subprocess.run(
        command, env={**os.environ, "DATA": "mock"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and words in done.stderr
