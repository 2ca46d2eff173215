"""Hugging Face folders imported: exported models come back bit for bit, dense models start with mHC."""

import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gpt
import pytest
import torch
from convert_cases import save
from megatron.core import dist_checkpointing
from pretrain_runs import ARGUMENTS, MHC, launch, losses, run
from test_export import CASES, logits, trained, transformers

from megatron_mhc.convert.read import iteration_folder, read_torch_dist
from megatron_mhc.export import export, weights
from megatron_mhc.import_hf import import_folder

safetensors = pytest.importorskip("safetensors.torch")


def first(axes, named):
    """All pairs of two axes' values; those not named are slow."""
    now = {tuple(pair.split()) for pair in named.split(", ")}
    assert now < set(itertools.product(*axes))
    return [
        pytest.param(*pair, marks=() if pair in now else pytest.mark.slow)
        for pair in itertools.product(*axes)
    ]


def assert_same_files(one, other, but=()):
    names = {file.name for file in one.iterdir()} - set(but)
    assert names == {file.name for file in other.iterdir()} - set(but)
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "case, implementation",
    first(
        (CASES, ("local", "transformer_engine")),
        "gqa local, gated local, biases_tied_v4 local, hc_fixed local, nothing_learns local, "
        "mla_sigmoid local, gqa_moe transformer_engine, mla_yarn_groups transformer_engine",
    ),
)
def test_an_exported_model_comes_back_bit_for_bit(run_ranks, tmp_path, case, implementation):
    """The tensors of the checkpoint, and the folder that it exports; by either implementation's names."""

    def there_and_back():
        model, args = trained(CASES[case])
        save(model, tmp_path / "checkpoint", "torch_dist", args)
        export(tmp_path / "checkpoint", tmp_path / "folder")
        import_folder(tmp_path / "folder", tmp_path / "back", transformer_impl=implementation)
        export(tmp_path / "back", tmp_path / "again")
        saved, _, mhc = weights.read(tmp_path / "checkpoint")
        found, args_, mhc_ = weights.read(tmp_path / "back")
        assert mhc.arithmetic() == mhc_.arithmetic() and args_.mhc_preset == mhc.preset
        if implementation == "local":
            assert saved.keys() == found.keys()
            for key, value in saved.items():
                assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
            first, second = (
                read_torch_dist(iteration_folder(tmp_path / name))[0].keys()
                for name in ("checkpoint", "back")
            )
            assert first == second

    run_ranks(1, there_and_back)
    assert_same_files(tmp_path / "folder", tmp_path / "again")


ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=80,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
MLA = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    moe_intermediate_size=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    rms_norm_eps=1e-6,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=0.5,
    original_max_position_embeddings=4096,
)
EXPERTS = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
DENSE = {
    "llama": ("Llama", {}),
    "llama3_tied": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama_biases_linear": (
        "Llama",
        dict(
            attention_bias=True,
            mlp_bias=True,
            head_dim=12,
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0),
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=8)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, rms_norm_eps=1e-6)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_moe": ("Qwen3Moe", dict(EXPERTS, norm_topk_prob=True)),
    "qwen3_moe_sparse": ("Qwen3Moe", dict(EXPERTS, norm_topk_prob=False, mlp_only_layers=[1])),
    "deepseek_v3": ("DeepseekV3", MLA),
    "deepseek_v3_yarn": ("DeepseekV3", dict(MLA, rope_parameters=YARN, n_group=1, topk_group=1)),
}


def dense(kind, more, folder, **how):
    """A model of transformers' own class with random weights, also in norms, biases and routers; saved."""
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**SIZES, **more})
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and "inv_freq" not in name:
                value.add_(torch.randn_like(value) * (0.1 if "norm" in name or "bias" in name else 0.3))
    model.save_pretrained(folder, **how)
    return model


def by_bash(file):
    """The words that `$(cat FILE)` has in a command."""
    echo = ["bash", "-c", 'printf "%s\\n" $(cat "$0")', str(file)]
    return subprocess.run(echo, capture_output=True, text=True, check=True).stdout.splitlines()


def loaded(folder):
    """Megatron's model of the flags beside a checkpoint, as a launch builds it, with its weights."""
    words = shlex.join(by_bash(folder / "model.args"))
    model, _ = trained("--norm-epsilon 1e-5 --seq-length 80 " + words)
    request = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    state = dist_checkpointing.load(request, str(folder / "release"), strict="raise_all")
    model.load_state_dict({key: state[key] for key in request})
    return model


@pytest.mark.parametrize(
    "case, preset",
    first(
        (DENSE, ("paper", "deepseek_v4")),
        "llama3_tied paper, llama_biases_linear paper, qwen2 deepseek_v4, qwen3_moe_sparse paper, "
        "deepseek_v3 paper, deepseek_v3_yarn deepseek_v4",
    ),
)
def test_an_imported_dense_model_with_mhc_has_the_logits_of_transformers_own_class(
    run_ranks, tmp_path, case, preset
):
    """Right after the import, under the default init, by which mHC's streams are copies of one another."""

    @torch.no_grad()
    def compare():
        gpt.start()
        model = dense(*DENSE[case], tmp_path / "dense")
        twice = {"layers.0.attention.wo.weight": torch.zeros(2)}  # as Mistral's folders have it
        safetensors.save_file(twice, tmp_path / "dense" / "consolidated.safetensors")
        import_folder(
            tmp_path / "dense", tmp_path / "mhc", options=f"preset={preset}", transformer_impl="local"
        )
        tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
        found = logits(loaded(tmp_path / "mhc"), tokens)
        expected = model(tokens).logits
        export(tmp_path / "mhc", tmp_path / "out")
        return (found - expected).abs().max().item(), expected.std().item()

    difference, spread = run_ranks(1, compare)[0]
    assert spread > 0.1
    assert difference <= 1e-4 * spread


def test_training_from_an_import_has_the_losses_of_training_from_the_checkpoint(run_ranks, tmp_path):
    """On two pipeline stages and on two tensor-parallel ranks, with --finetune."""
    launch(tmp_path / "first", *MHC, "--save", str(tmp_path / "saved"), "--train-iters", "2")

    def there_and_back():
        export(tmp_path / "saved", tmp_path / "folder")
        import_folder(tmp_path / "folder", tmp_path / "back", transformer_impl="local")

    run_ranks(1, there_and_back)
    words = by_bash(tmp_path / "back" / "model.args")
    for size in ("--pipeline-model-parallel-size", "--tensor-model-parallel-size"):
        how = [size, "2", "--finetune", "--train-iters", "2", "--load"]
        expected, _ = launch(tmp_path / f"saved{size}", *MHC, *how, str(tmp_path / "saved"))
        found, _ = launch(tmp_path / f"back{size}", *words, *how, str(tmp_path / "back"))
        assert found == expected and len(found) == 2
    fresh, _ = launch(tmp_path / "fresh", *words, *how[:-1])
    assert abs(fresh[0] - expected[0]) > 1e-3


def test_the_commands_of_the_page_run_in_their_order(run_ranks, tmp_path, monkeypatch):
    """In a folder that holds an exported model and a dense one; the training of the page trains a step."""
    page = (ROOT / "docs" / "export.md").read_text().partition("## Import")[2]
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL).group(1).replace("\\\n", "")
    *imports, training = block.splitlines()

    def imported():
        monkeypatch.chdir(tmp_path)
        model, args = trained(CASES["gqa"])
        save(model, tmp_path / "checkpoints", "torch_dist", args)
        export(tmp_path / "checkpoints", tmp_path / "folder")
        dense(*DENSE["llama"], tmp_path / "llama")
        for command in imports:
            program, *sys.argv[1:] = shlex.split(command.removeprefix("python -m "))
            runpy.run_module(program, run_name="__main__", alter_sys=True)

    run_ranks(1, imported)
    assert (tmp_path / "back" / "release").is_dir()
    launcher, _, words = training.partition("$(cat mhc/model.args train.args)")
    assert launcher == "torchrun --nproc-per-node 8 -m megatron_mhc.pretrain_gpt "
    words = by_bash(tmp_path / "mhc" / "model.args") + shlex.split(words)
    words = [str(tmp_path / "mhc") if word == "mhc/" else word for word in words]
    more = ["--vocab-size", "60", "--train-iters", "1", "--tensorboard-dir", str(tmp_path / "tensorboard")]
    code, output = run(["megatron_mhc.pretrain_gpt", *ARGUMENTS, *words, *more], 2)
    assert code == 0, output
    assert "successfully loaded checkpoint" in output and len(losses(tmp_path / "tensorboard")) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model of each kind."""
    root = tmp_path_factory.mktemp("dense")
    for name in ("llama", "mistral", "qwen2", "qwen3_moe", "deepseek_v3_yarn"):
        dense(*DENSE[name], root / name)
    return root


def rope(**more):
    return dict(rope_parameters=dict(rope_theta=10000.0) | more)


REFUSED = [  # of which model, its changed keys (None takes one away), and what the message names
    ("llama", dict(model_type="gpt2"), "model_type is 'gpt2': llama, mistral"),
    ("llama", dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    ("llama", dict(attention_bias=True), "attention_bias is True and mlp_bias False"),
    ("llama", dict(num_key_value_heads=3), "num_key_value_heads is 3"),
    ("llama", dict(sliding_window=16), "sliding_window is 16: sliding windows are not imported"),
    ("llama", dict(quantization_config={"a": 1}), "quantization_config is"),
    ("llama", dict(logit_scale=2.0), "logit_scale is 2.0: not a known key"),
    ("llama", dict(hidden_size=None), "hidden_size is absent"),
    ("llama", dict(num_hidden_layers=2), "model.layers.2 is there"),
    ("llama", dict(num_hidden_layers=4), "model.layers.3 is absent, of 4 layers"),
    ("llama", dict(vocab_size=65), r"embed_tokens.weight is of shape \[64, 32\], expected \[65, 32\]"),
    ("llama", dict(intermediate_size=40), r"(gate|up)_proj.weight is of shape \[48, 32\], expected \[40"),
    ("llama", dict(num_key_value_heads=1), "k_proj.weight is of shape"),
    ("llama", dict(tie_word_embeddings=True), "lm_head.weight is another tensor than the embedding"),
    ("llama", dict(dtype="float8"), "dtype is 'float8'"),
    ("llama", rope(rope_type="dynamic", factor=2.0), "rope_parameters.rope_type is 'dynamic'"),
    ("llama", rope(rope_type="yarn", factor=2.0), "rope_parameters.rope_type is 'yarn'"),
    ("llama", rope(rope_type="longrope"), "rope_parameters.rope_type is 'longrope'"),
    ("llama", rope(rope_type="linear", factor=1.5), "rope_parameters.factor is 1.5"),
    ("llama", dict(rope_parameters=LLAMA3 | dict(low_freq_factor=2.0)), "low_freq_factor is 2.0"),
    (
        "llama",
        dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=4096)),
        "rope_parameters.original_max_position_embeddings is 4096",
    ),
    (
        "llama",
        dict(rope_parameters={k: v for k, v in LLAMA3.items() if k[:8] != "original"}),
        "rope_parameters.original_max_position_embeddings is 80: it is 8192 in Megatron",
    ),
    ("llama", rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5: these models rotate all"),
    ("llama", rope(rope_theta=1.5), "rope_theta is 1.5: Megatron's --rotary-base"),
    ("llama", dict(rope_theta=5.0), "rope_theta is 5.0, and another one in rope_parameters"),
    ("mistral", dict(sliding_window=None), "sliding_window is absent, which means 4096"),
    ("mistral", dict(num_key_value_heads=None), "num_key_value_heads is absent"),
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window is True: sliding windows"),
    ("qwen2", dict(layer_types=["sliding_attention"] * 3), "layer_types is"),
    ("qwen3_moe", dict(num_local_experts=None, num_experts=None), "num_local_experts is None"),
    ("qwen3_moe", dict(num_local_experts=3, num_experts=3), "experts"),
    ("qwen3_moe", dict(num_local_experts=5, num_experts=5), "experts"),
    ("qwen3_moe", dict(num_experts_per_tok=9), "num_experts_per_tok is 9"),
    ("deepseek_v3_yarn", dict(scoring_func="softmax"), "scoring_func is 'softmax'"),
    ("deepseek_v3_yarn", dict(topk_method="greedy"), "topk_method is 'greedy'"),
    ("deepseek_v3_yarn", dict(n_group=None), "n_group is absent"),
    ("deepseek_v3_yarn", dict(n_group=8, topk_group=4), "n_group is 8"),
    ("deepseek_v3_yarn", dict(n_group=2, topk_group=1), "topk_group is 1 with num_experts_per_tok 4"),
    ("deepseek_v3_yarn", dict(q_lora_rank=None), "q_lora_rank is absent"),
    ("deepseek_v3_yarn", dict(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
    ("deepseek_v3_yarn", dict(rope_interleave=False), "rope_interleave is False"),
    ("deepseek_v3_yarn", dict(rope_parameters=YARN | dict(beta_fast=16)), "beta_fast is 16"),
    (
        "deepseek_v3_yarn",
        dict(rope_parameters={k: v for k, v in YARN.items() if k[:8] != "original"}),
        "rope_parameters.original_max_position_embeddings is 80: it is 4096 in Megatron",
    ),
    ("deepseek_v3_yarn", dict(rope_parameters=YARN | dict(mscale=0)), "mscale_all_dim is 0.5 without"),
    ("deepseek_v3_yarn", dict(norm_topk_prob=False), "norm_topk_prob is False"),
]  # fmt: skip


@pytest.mark.parametrize("name, changed, said", REFUSED, ids=str)
def test_what_megatron_has_no_form_for_is_refused_by_key(run_ranks, folders, tmp_path, name, changed, said):
    shutil.copytree(folders / name, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def attempt():
        with pytest.raises(ValueError, match=said) as caught:
            import_folder(tmp_path / "model", tmp_path / "out")
        assert str(tmp_path / "model") in str(caught.value) and not (tmp_path / "out").exists()

    run_ranks(1, attempt)  # a process group in this process would crash the ranks forked from it


def test_users_mistakes_name_the_remedy(run_ranks, folders, tmp_path):
    def attempt():
        gpt.start()
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "file").touch()
        with pytest.raises(ValueError, match="--save .* is there already"):
            import_folder(folders / "llama", tmp_path / "there")
        shutil.copytree(folders / "llama", tmp_path / "a llama")
        (tmp_path / "a llama" / "tokenizer.json").touch()
        with pytest.raises(ValueError, match="a llama: model.args .* blank in its path; rename"):
            import_folder(tmp_path / "a llama", tmp_path / "out")
        shutil.copytree(folders / "llama", tmp_path / "large")
        file = tmp_path / "large" / "model.safetensors"
        tensors = safetensors.load_file(file)
        tensors["model.norm.weight"][3] = 1e5
        safetensors.save_file(tensors, file, metadata={"format": "pt"})
        file = tmp_path / "large" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(dtype="float16")))
        with pytest.raises(ValueError, match="model.norm.weight is too large for float16: set dtype"):
            import_folder(tmp_path / "large", tmp_path / "out")
        with pytest.raises(ValueError, match="config.json: .*No such file"):
            import_folder(tmp_path / "nowhere", tmp_path / "out")
        with pytest.raises(ValueError, match="sinkhorn_iterations"):
            import_folder(folders / "llama", tmp_path / "out", options="sinkhorn_iterations=0")
        with pytest.raises(ValueError, match="--mhc-preset qwen4_exp has no place for a dense model's norms"):
            import_folder(folders / "llama", tmp_path / "out", options="preset=qwen4_exp")
        with pytest.raises(ValueError, match="--mhc-contract library: the exported model has no such part"):
            import_folder(folders / "llama", tmp_path / "out", options="contract=library")
        model, args = trained(CASES["gqa"])
        save(model, tmp_path / "checkpoint", "torch_dist", args)
        export(tmp_path / "checkpoint", tmp_path / "folder")
        with pytest.raises(ValueError, match="--options with an exported model: drop it"):
            import_folder(tmp_path / "folder", tmp_path / "out", options="num_residual_streams=2")
        file = tmp_path / "folder" / "config.json"
        config = json.loads(file.read_text())
        for changed, said in (
            (dict(megatron=None), "megatron is absent: export the model by this version"),
            (dict(rms_norm_eps=0.1), "rms_norm_eps is 0.1, by its `megatron` 1e-05"),
            (dict(mhc=None), "mhc is absent"),
            (dict(mhc=config["mhc"] | dict(sinkhorn_iterations=None)), "mhc.sinkhorn_iterations is absent"),
            (dict(mhc=config["mhc"] | dict(h_res="sinkhorned")), "h_res='sinkhorned'"),
            (
                dict(mhc=config["mhc"] | dict(num_residual_streams=2)),
                "attn_hc.(weight|bias|alpha) is of shape",
            ),
            (dict(megatron=config["megatron"] | dict(normalization="LayerNorm")), "LayerNorm"),
        ):
            file.write_text(json.dumps(config | changed))
            with pytest.raises(ValueError, match=said):
                import_folder(tmp_path / "folder", tmp_path / "out")
            assert not (tmp_path / "out").exists()

    run_ranks(1, attempt)
