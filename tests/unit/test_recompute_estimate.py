"""The printed estimate of a recipe, and the inventory that it counts with."""

import re
import subprocess
import sys
from pathlib import Path

import gpt
import pytest
import torch
from live_bytes import LiveBytes
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_mhc import MHCConfig
from megatron_mhc.command_line import take_apart
from megatron_mhc.recompute import __main__ as program
from megatron_mhc.recompute import estimate, inventory

RECIPE = """
torchrun --nproc-per-node 4 --nnodes 2 -m megatron_mhc.pretrain_gpt
    --num-layers 12 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4   # a small model
    --pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel
    --seq-length 512 --max-position-embeddings 512 --micro-batch-size 2 --global-batch-size 16
    --swiglu --disable-bias-linear --normalization RMSNorm --bf16 --no-rope-fusion
    --attention-dropout 0 --hidden-dropout 0 --position-embedding-type rope
    --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 512
"""


def printed(recipe, *arguments):
    """Run the command in this process; returns the table's rows by their first cell."""
    import contextlib
    import io
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.txt")
        path.write_text(recipe)
        sys.argv = ["recompute", "--config", str(path), *arguments]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            program.main()
    rows = {}
    for line in out.getvalue().splitlines()[1:]:
        name, *cells = re.split(r"\s{2,}", line.strip())
        rows[name] = cells
    return rows


def test_table_of_a_recipe(run_ranks):
    rows = run_ranks(1, printed, RECIPE, "--sizes", "1,2,6,99", "--", "--mhc-num-residual-streams", "2")[0]
    assert rows["layers"] == ["3"] * 4
    assert rows["passes in flight"] == ["4", "3", "2", "1"]
    assert "mHC, blocks of 99" not in rows
    # By hand: 512 tokens a rank of 256 bf16 channels make one = 256 KiB. A layer keeps its two inputs, the
    # two norms' outputs, and inside the tensor-parallel region twice the tokens: half of 5 * 256 and 256
    # attention channels, 3 * 512 MLP channels, and 2 heads' fp32 statistics.
    one, tokens = 2 * 512 * 256, 512
    layer = 4 * one + 2 * 2 * tokens * (5 * 256 + 256 + 3 * 512) // 2 + 4 * 2 * tokens * 4 // 2
    expected = [f"{held * 3 * layer / 2**30:.3f}" for held in (4, 3, 2, 1)]
    assert rows["vanilla"] == expected
    # mHC keeps 2 streams, the layer input and F's output where vanilla keeps one: 3 more each, and 9 numbers.
    more = 6 * (3 * one + 4 * tokens * 9)
    expected = [f"{held * (3 * layer + more) / 2**30:.3f}" for held in (4, 3, 2, 1)]
    assert rows["mHC"] == expected
    for rank in range(4):
        every = [float(rows[f"mHC, blocks of {size}"][rank]) for size in (1, 2, 6)]
        assert float(rows["mHC, auto"][rank]) <= min(every) < float(rows["mHC"][rank])


def test_table_of_a_recipe_that_cannot_train(run_ranks):
    arguments = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()

    def fails():
        with pytest.raises(
            ValueError, match="--mhc-recompute-layer-num auto with --recompute-granularity full"
        ):
            printed(RECIPE, "--", *arguments, "--mhc-recompute-layer-num", "auto")

    run_ranks(1, fails)


def test_table_of_a_recipe_with_a_custom_layout(run_ranks):
    """A stage's layers, however uneven, and the passes that the schedule of the recipe holds."""
    arguments = ["--pipeline-model-parallel-layout", "Ett|t*9||tL", "--mhc-pipeline-schedule", "interleaved"]
    rows = run_ranks(1, printed, RECIPE, "--", *arguments)[0]
    assert rows["pipeline rank"] == ["0", "1", "3"]  # of stage 2 there is nothing to say
    assert rows["layers"] == ["2", "9", "1"]
    assert rows["passes in flight"] == ["7", "5", "1"]  # of 8 micro-batches
    megatron = run_ranks(1, printed, RECIPE, "--", *arguments[:2])[0]
    assert megatron["passes in flight"] == ["4", "3", "1"]
    assert megatron["vanilla"] == rows["vanilla"] and megatron["mHC"][1] < rows["mHC"][1]


MOE = "--num-experts 4 --moe-ffn-hidden-size 128 --moe-router-topk 2".split()


def with_pattern(pattern, *more):
    without = RECIPE.replace("--num-layers 12 ", "")
    return printed(without, "--", "--hybrid-layer-pattern", pattern, *more)


@pytest.mark.parametrize("mlp, more", [("-", []), ("E", MOE)], ids=["dense", "moe"])
def test_a_hybrid_model_of_pairs_takes_the_memory_of_its_gpt(run_ranks, mlp, more):
    def rows():
        layer = "*" + mlp
        return printed(RECIPE, "--", *more), with_pattern("|".join([3 * layer] * 4), *more)

    gpt_rows, hybrid_rows = run_ranks(1, rows)[0]
    assert gpt_rows.pop("layers") == ["3"] * 4 and hybrid_rows.pop("layers") == ["6"] * 4
    assert gpt_rows == hybrid_rows


def test_stages_of_a_hybrid_model_are_those_of_its_pattern(run_ranks):
    virtual = run_ranks(1, with_pattern, "*-|*|-*|-|*|-|*|-*-")[0]
    assert virtual["layers"] == ["2+1", "1+1", "2+1", "1+3"]
    shared_out = run_ranks(1, with_pattern, "*-" * 6, "--decoder-first-pipeline-num-layers", "3")[0]
    assert shared_out["layers"] == ["3", "3", "3", "3"]
    uneven = run_ranks(1, with_pattern, "*-" * 6, "--decoder-last-pipeline-num-layers", "6")[0]
    assert uneven["layers"] == ["2", "2", "2", "6"]


def test_layers_of_mixers_are_counted_by_their_projections():
    config = TransformerConfig(
        num_layers=2, **SIZES, is_hybrid_model=True, params_dtype=torch.bfloat16, bf16=True
    )
    config.mamba_num_heads, config.mamba_head_dim = 4, 32
    config.mamba_num_groups, config.mamba_state_dim = 2, 16
    config.linear_num_key_heads, config.linear_num_value_heads = 2, 4
    config.linear_key_head_dim, config.linear_value_head_dim = 16, 8
    # Mamba: z and x of 128 channels, B and C of 32, 4 steps; the scan's output and the gated norm's.
    assert inventory.mamba(config) == 2 * (64 + 2 * 128 + 2 * 32 + 4 + 2 * 128)
    # Delta net: q, k, v and z of 32, two numbers a head; q and k of length 1, and spread over 4 heads; v; the
    # rule's output and the gated norm's.
    assert inventory.delta(config) == 2 * (64 + 4 * 32 + 8 + 2 * 32 + 2 * 64 + 32 + 2 * 32)
    [rank] = estimate.ranks(config, MHCConfig(norm="apart"), 32, 1, 1, "MG")
    assert [s.inside for s in rank.stored] == [32 * inventory.mamba(config), 32 * inventory.delta(config)]
    with pytest.raises(ValueError, match="--hybrid-layer-pattern with D"):
        estimate.ranks(config, MHCConfig(), 32, 1, 1, "D-")


@pytest.mark.parametrize(
    "command, text, words",
    [
        ("-m megatron_mhc.recompute --config", None, "No such file"),
        ("examples/plan_memory.py", "--lr 'x", "No closing quotation"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, command, text, words):
    path = tmp_path / "recipe.txt"
    if text:
        path.write_text(text)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, *command.split(), str(path)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and f"{path} cannot be read: " in done.stderr and words in done.stderr
    assert "Traceback" not in done.stderr


def test_command_lines_are_cut_behind_the_script():
    def cut(line):
        return take_apart(line.split())

    assert cut("torchrun --nproc-per-node 8 --nnodes 2 pretrain_gpt.py --bf16") == (
        {},
        ("pretrain_gpt.py",),
        ["--bf16"],
        16,
    )
    assert cut("torchrun --nproc_per_node=8 pretrain_gpt.py") == ({}, ("pretrain_gpt.py",), [], 8)
    assert cut("python -m megatron_mhc.launch pretrain_gpt.py --lr 1") == (
        {},
        ("megatron_mhc.launch", "pretrain_gpt.py"),
        ["--lr", "1"],
        None,
    )
    assert cut("MEGATRON_MHC=init=uniform python train.py --a b=c") == (
        {"MEGATRON_MHC": "init=uniform"},
        ("train.py",),
        ["--a", "b=c"],
        None,
    )
    assert cut("--num-layers 4") == ({}, (), ["--num-layers", "4"], None)


MODULE = "megatron_mhc.pretrain_gpt"


@pytest.mark.parametrize(
    "launch, program, world",
    [
        ("torchrun --nproc-per-node 8 --some-flag value pretrain_gpt.py", ["pretrain_gpt.py"], 8),
        ("torchrun --nproc_per_node 8 --standalone /a/pretrain_gpt.py", ["/a/pretrain_gpt.py"], 8),
        ("torchrun --log-dir logs.py --nproc-per-node=2 --nnodes=4 train.py", ["train.py"], 8),
        ("torchrun --nproc-per-node gpu --redirects 3 train.py", ["train.py"], None),
        (f"torchrun --nproc-per-node 8 --nnodes 1:4 -m {MODULE}", [MODULE], None),
        (f"torchrun -m --nproc-per-node 8 {MODULE}", [MODULE], 8),
        (f"/opt/bin/torchrun --nproc-per-node 8 --module {MODULE}", [MODULE], 8),
        (
            "python -m torch.distributed.run --nproc-per-node 2 -m megatron_mhc.testing.cpu -m "
            "megatron_mhc.launch pretrain_gpt.py",
            ["torch.distributed.run", "megatron_mhc.testing.cpu", "megatron_mhc.launch", "pretrain_gpt.py"],
            2,
        ),
        ("python3.12 -u -X faulthandler -W ignore train.py", ["train.py"], None),
        (f"python -m cProfile -o out.py -m {MODULE}", ["cProfile", MODULE], None),
        ("srun -m block:block -n 16 --export=ALL,X=1 python -u pretrain_gpt.py", ["pretrain_gpt.py"], None),
        ("srun -N 2 numactl -m 0 ./wrap.sh pretrain_gpt.py", ["pretrain_gpt.py"], None),
        ("uv run --python python3.12 --with a pretrain_gpt.py", ["pretrain_gpt.py"], None),
        (f"uv run -m {MODULE}", [MODULE], None),
        (f"uv run --module {MODULE}", [MODULE], None),
        ("uv run torchrun --nproc-per-node 4 pretrain_gpt.py", ["pretrain_gpt.py"], 4),
        ("torchrun --nproc-per-node 8 --no-python /a/bin/python3 -u pretrain_gpt.py", ["pretrain_gpt.py"], 8),
        (f"torchrun --nproc-per-node 8 --no-python python -m {MODULE}", [MODULE], 8),
        ("./pretrain_gpt.py", ["./pretrain_gpt.py"], None),
        ("", [], None),
    ],
)
def test_a_program_is_found_behind_what_starts_it_and_not_among_its_arguments(launch, program, world):
    arguments = "--num-layers 4 --data-path a.py -m b --log python --lr 1".split()
    command = take_apart([*launch.split(), *arguments])
    assert command == ({}, tuple(program), arguments, world)


def test_the_environment_of_a_launch_is_read_wherever_it_is_set():
    command = take_apart("A=1 srun -n 2 env B=c=d C= python train.py D=4".split())
    assert command == (dict(A="1", B="c=d", C=""), ("train.py",), ["D=4"], None)


def test_words_without_a_program_are_arguments():
    assert take_apart(["A=1", "bash", "train.sh"]).arguments == ["bash", "train.sh"]
    assert take_apart(["python", "-c", "pass"]).program == ()


SIZES = dict(
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=128,
    normalization="RMSNorm",
    add_bias_linear=False,
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=12)
MLA |= dict(rope_type="rope", apply_rope_fusion=False)
KINDS = {
    "dense": {},
    "gqa": dict(num_query_groups=2),
    "mla": MLA,
    "moe": {k: v for k, v in gpt.MOE.items() if k != "moe_layer_freq"},
}


def saved_bytes(kind, layers):
    """Bytes that a plain model of so many layers keeps alive for its backward pass, and its config."""
    gpt.start()
    make = MLATransformerConfig if kind == "mla" else TransformerConfig
    config = make(num_layers=layers, **SIZES, **KINDS[kind])
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    rope = "none" if kind == "mla" else "rope"
    model = GPTModel(config, spec, gpt.VOCAB, gpt.SEQ, position_embedding_type=rope)
    tokens = torch.zeros(gpt.BATCH, gpt.SEQ, dtype=torch.long)
    mask = torch.triu(torch.ones(1, 1, gpt.SEQ, gpt.SEQ, dtype=torch.bool), 1)
    with LiveBytes() as live:
        loss = model(tokens, torch.arange(gpt.SEQ)[None], mask, labels=tokens).mean()
        alive = live.now()
    loss.backward()
    return alive, config


@pytest.mark.parametrize("kind", KINDS)
def test_inventory_is_no_more_than_real_layers_save(run_ranks, kind):
    """Too high an estimate would let `auto` make its first blocks too long. Local layers save the most."""

    def check():
        (few, _), (many, config) = saved_bytes(kind, 2), saved_bytes(kind, 4)
        tokens = gpt.SEQ * gpt.BATCH
        counted = (many - few) / 2 / tokens
        inside = inventory.attention(config) + inventory.mlp(config, moe=kind == "moe")
        # Beside it, each of two sub-layers keeps its input and, in these layers, the norm's output.
        separate = (4 - (kind != "mla") - (kind != "moe")) * 4 * config.hidden_size
        return inside + separate, counted

    estimated, counted = run_ranks(1, check)[0]
    print(f"{kind}: {estimated:.0f} of {counted:.0f} bytes a token and layer")
    assert 0.3 * counted < estimated <= counted


def test_megatrons_own_recompute_is_taken_off(run_ranks):
    def inside(**settings):
        config = TransformerConfig(num_layers=1, **SIZES, **settings)
        return inventory.attention(config), inventory.mlp(config, moe=bool(config.num_moe_experts))

    selective = dict(recompute_granularity="selective")
    assert inside(**selective, recompute_modules=["mlp"]) == (inside()[0], 0)
    moe = KINDS["moe"] | dict(moe_grouped_gemm=True)
    assert inside(**moe, **selective, recompute_modules=["moe"])[1] == 0
    for module in ("moe_act", "shared_experts"):
        assert 0 < inside(**moe, **selective, recompute_modules=[module])[1] < inside(**moe)[1]


def test_counting_needs_no_more_than_a_config():
    config = TransformerConfig(num_layers=4, **SIZES)
    found = estimate.ranks(config, MHCConfig(recompute_layer_num="auto"), 32, 2, 1)
    assert [r.layers for r in found] == [[4]] and len(found[0].stored) == 8


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_folded_norm_leaves_one_tensor_less_of_each_sublayer(kind):
    """In a fused linear the norm's output is F's; by itself a norm has an input and an output."""
    config = TransformerConfig(num_layers=1, **SIZES | KINDS[kind] | dict(normalization="RMSNorm"))
    (apart,), (folded,) = (estimate.ranks(config, MHCConfig(norm=n), 32, 2, 1) for n in ("apart", "folded"))
    one = 32 * 2 * config.hidden_size * inventory.itemsize(config)
    assert apart.mhc() - folded.mhc() == 2 * one and apart.vanilla == folded.vanilla
