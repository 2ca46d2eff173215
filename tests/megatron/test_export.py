"""A checkpoint exported to a Hugging Face folder, beside the Megatron model that saved it, in fp32."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import gpt
import pytest
import torch
from convert_cases import save, scrambled
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from megatron_mhc import command_line, generate
from megatron_mhc.export import export, folder, settings, weights
from megatron_mhc.export.folder import MODELING
from megatron_mhc.specs import wrap_block_spec

ROOT = Path(__file__).resolve().parents[2]
transformers = pytest.importorskip("transformers", minversion="5")

BASE = """
    --distributed-backend gloo --transformer-impl local --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --num-layers 2 --hidden-size 32 --num-attention-heads 4
    --seq-length 80 --max-position-embeddings 80
    --position-embedding-type rope --normalization RMSNorm --swiglu --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --micro-batch-size 1 --train-iters 1 --lr 1e-2
"""
GQA = "--group-query-attention --num-query-groups 2 "
PLAIN = "--disable-bias-linear "
MLA = (
    PLAIN
    + """--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --v-head-dim 12
    --qk-pos-emb-head-dim 8 --qk-layernorm --untie-embeddings-and-output-weights """
)
MOE = """--num-experts 8 --moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-layer-freq ([0]+[1])
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --moe-router-dtype fp32 """
SHARED = "--moe-shared-expert-intermediate-size 16 "
SIGMOID = SHARED + "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
CASES = {
    "gqa": GQA + PLAIN + "--untie-embeddings-and-output-weights",
    "biases_tied_v4": GQA + "--qk-layernorm --mhc-preset deepseek_v4 --rotary-percent 0.5",
    "single_pass": GQA + PLAIN + "--mhc-preset deepseek_v41 --mhc-num-residual-streams 2",
    "single_pass_mean": PLAIN + "--mhc-read previous --mhc-contract mean --mhc-h-res unconstrained",
    "qkv_bias_hc": PLAIN + "--add-qkv-bias --mhc-h-res unconstrained --mhc-contract sum --rotary-base 500",
    "fixed": PLAIN + "--mhc-h-pre fixed --mhc-h-post fixed --mhc-contract learned_head --use-rope-scaling",
    "identity": PLAIN + "--mhc-h-res identity --mhc-h-pre fixed --rotary-seq-len-interpolation-factor 2",
    "gated": GQA + PLAIN + "--mhc-preset qwen4_exp --mhc-gated-rank 8 --mhc-num-residual-streams 3",
    "gated_moe_mean": GQA + PLAIN + MOE + "--mhc-preset qwen4_exp --mhc-gated-rank 8 --mhc-contract mean",
    "nothing_learns": PLAIN + "--mhc-h-res identity --mhc-h-pre fixed --mhc-h-post fixed",
    "glm_5_3": GQA + PLAIN + "--mhc-preset glm_5_3 --mhc-norm-eps 1e-5",
    "hy_v4": GQA + PLAIN + "--mhc-preset hy_v4 --mhc-post-magnitude 1.5 --mhc-num-residual-streams 3",
    "gqa_moe": GQA + PLAIN + MOE + "--moe-layer-freq 1 --moe-router-score-function sqrtsoftplus",
    "hc_fixed": PLAIN + "--mhc-h-res unconstrained --mhc-h-post fixed --mhc-num-residual-streams 2",
    "mla_sigmoid": MLA + MOE + SIGMOID + "--rope-type rope",
    "mla_yarn_groups": MLA + MOE + SIGMOID + """--rope-type yarn --rotary-scaling-factor 4
        --mscale 1.0 --mscale-all-dim 0.5 --moe-router-topk 4 --moe-router-num-groups 4
        --moe-router-group-topk 2
        --moe-router-topk-scaling-factor 2.5 --mhc-preset deepseek_v4""",
    "mla_softmax": MLA + MOE + SHARED + "--moe-shared-expert-gate --rope-type rope",
    "mla_pre_softmax": MLA + MOE + "--moe-router-pre-softmax --rope-type rope --mhc-contract sum",
}  # fmt: skip


def trained(words):
    """The model that megatron.training builds of these arguments, with random weights, and the arguments."""
    gpt.start()
    args, config, mhc = command_line.parse(shlex.split(BASE + words), 1)
    args.padded_vocab_size = args.vocab_size
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    model = GPTModel(
        config,
        wrap_block_spec(spec, mhc, config),
        args.padded_vocab_size,
        args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )
    for name, buffer in scrambled(model, 1).named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)))
    return model.eval(), args


def exported(model, args, path, kind, monkeypatch):
    """The model by way of a checkpoint and a folder, as users load it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(path / "modules"))
    save(model, path / "checkpoint", kind, args)
    export(path / "checkpoint", path / "out")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    return loaded


def logits(model, tokens, labels=None):
    """Of Megatron's model, [b, s, vocabulary]; with labels the loss of each token, [b, s]."""
    b, s = tokens.shape
    mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    return model(tokens, torch.arange(s).expand(b, s), mask, labels=labels)


def greedy(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_exported_model_has_logits_and_loss_of_the_trained_one(run_ranks, tmp_path, monkeypatch, case):
    """Whole, token by token with the KV cache, and padded on the left; for GQA also 64 greedy tokens.

    The loss is the mean cross entropy of a batch, which Megatron logs.
    """
    kind = "torch" if list(CASES).index(case) % 2 else "torch_dist"

    @torch.no_grad()
    def compare():
        model, args = trained(CASES[case])
        ours = exported(model, args, tmp_path, kind, monkeypatch)
        tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
        whole = ours(tokens).logits
        expected = logits(model, tokens)
        # By both names of the cache: transformers 5.24 renamed it.
        parts = {"cache": [], "past_key_values": []}
        for name, logits_of_pieces in parts.items():
            cache = None
            for piece in (tokens[:, :5], *tokens[:, 5:].split(1, dim=1)):
                done = ours(piece, **{name: cache}, use_cache=True)
                cache = next(done[key] for key in ("cache", "past_key_values") if key in done)
                logits_of_pieces.append(done.logits)
        padding = torch.tensor([[0] * 3 + [1] * 12] * 2)
        padded = ours(torch.cat([tokens[:, :3], tokens], 1), attention_mask=padding).logits[:, 3:]
        stepwise = (torch.cat(pieces, 1) for pieces in parts.values())
        found = [(logit - expected).abs().max().item() for logit in (whole, *stepwise, padded)]
        losses = ours(tokens, labels=tokens).loss, logits(model, tokens[:, :-1], tokens[:, 1:]).mean()
        texts = None
        if case == "gqa":
            how = dict(max_new_tokens=64, do_sample=False, disable_compile=True)
            continued = [ours.generate(tokens, **how, cache_implementation=c) for c in ("dynamic", "static")]
            texts = [text.tolist() for text in (*continued, greedy(model, tokens, 64))]
        return found, expected.std().item(), [loss.item() for loss in losses], texts

    found, spread, (loss, loss_of_megatron), texts = run_ranks(1, compare)[0]
    assert spread > 0.1
    assert max(found) <= 1e-4 * spread
    assert loss == pytest.approx(loss_of_megatron, rel=1e-5)
    if case == "gqa":
        ours, static, theirs = texts
        assert ours == static == theirs and len(ours[0]) == 76
        assert len(set(ours[0][12:])) > 3  # no single word over and over


@pytest.mark.parametrize("case", ["gqa", "mla_sigmoid"])
def test_a_bf16_model_errs_as_megatrons_does(run_ranks, tmp_path, monkeypatch, case):
    """Against the same weights in fp32; mappings are fp32 in all of them."""

    @torch.no_grad()
    def compare():
        model, args = trained(CASES[case] + " --bf16")
        ours = exported(model, args, tmp_path, "torch_dist", monkeypatch)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16, torch.float32}
        for layer in ours.model.layers:
            assert {p.dtype for p in layer.attn_hc.parameters()} == {torch.float32}
        tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
        found, theirs = ours(tokens).logits.float(), logits(model, tokens).float()
        exact = ours.float()(tokens).logits
        errors = ((bf16 - exact).square().mean(-1).sqrt() for bf16 in (found, theirs))
        # Of the tokens' errors the median: where two experts score alike, a token may take the other one.
        return [error.median().item() for error in errors]

    ours, theirs = run_ranks(1, compare)[0]
    assert 0 < ours < 1.3 * theirs


def test_transformer_engines_names_are_known(run_ranks):
    """It keeps a norm with the linear layer behind it, and numbers the experts of a grouped GEMM."""
    names = {
        "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
        "layers.0.pre_mlp_layernorm.weight": "layers.0.mlp.linear_fc1.layer_norm_weight",
    }

    def rename(key):
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        return re.sub(r"local_experts\.(\d)\.(linear_fc\d\.weight)", r"\2\1", key)

    def compare():
        model, args = trained(CASES["mla_sigmoid"])
        state = {key: value for key, value in model.state_dict().items() if "_extra_state" not in key}
        found = [
            weights.translate(weights.stack_experts(named), args)
            for named in (dict(state), {rename(key): value for key, value in state.items()})
        ]
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
        # Without --q-lora-rank the queries' norm reads the hidden state.
        alone = {"decoder.layers.0.self_attention.linear_q_proj.layer_norm_weight": torch.ones(32)}
        assert list(weights.translate(alone, args)) == ["model.layers.0.self_attn.q_a_layernorm.weight"]
        with pytest.raises(
            ValueError, match="linear_fc1.layer_norm_bias: the exported model has no such part"
        ):
            weights.translate({"decoder.layers.0.mlp.linear_fc1.layer_norm_bias": torch.ones(32)}, args)

    run_ranks(1, compare)


def test_the_model_file_needs_torch_and_transformers_alone():
    found = set()
    for node in ast.walk(ast.parse(MODELING.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            found |= {name.split(".")[0] for name in names}
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers"}


def make_tokenizer(path):
    """A word for each of the model's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w63").save_pretrained(path)


def test_the_commands_of_the_page_run_in_their_order(run_ranks, tmp_path, monkeypatch):
    """In a folder that holds a checkpoint whose training used a Hugging Face tokenizer."""
    page = (ROOT / "docs" / "export.md").read_text()
    commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL).group(1).splitlines()
    python = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(folder, "SHARD", 10_000)
    make_tokenizer(tmp_path / "words")

    def run():
        model, args = trained(CASES["biases_tied_v4"])
        args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(tmp_path / "words")
        save(model, tmp_path / "checkpoints", "torch_dist", args)
        printed = []
        for command in commands:
            program, *words = shlex.split(command.removeprefix("python -m "))
            sys.argv = [program, *words]
            with contextlib.redirect_stdout(io.StringIO()) as text:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            printed.append(text.getvalue())
        assert (tmp_path / "folder" / "model.safetensors.index.json").exists()
        assert len({file.stat().st_mode for file in (tmp_path / "folder").glob("*.*")}) == 1
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(python)
        return printed, text.getvalue()

    (exported, generated), loaded = run_ranks(1, run)[0]
    assert "parameters, float32" in exported and "no tokenizer" not in exported
    assert generated == loaded
    assert all(re.fullmatch(r"w\d+", word) for word in generated.split())
    assert 10 < len(generated.split()) <= 3 + 64


def test_the_quickstart_ends_by_a_sampled_line_and_code_that_loads_the_export(
    run_ranks, tmp_path, monkeypatch
):
    """Of a checkpoint that is there: nothing is trained, measured or drawn."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "quickstart"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    program = runpy.run_path(str(ROOT / "examples" / "quickstart" / "run.py"))
    steps = program["quickstart"].__globals__

    def in_this_process(script, command):
        if script.name in ("export.sh", "sample.sh"):
            sys.argv = command[1:] if command[1] != "-m" else command[2:]
            start = runpy.run_path if command[1] != "-m" else runpy.run_module
            with contextlib.redirect_stdout(io.StringIO()):
                start(sys.argv[0], run_name="__main__")

    def quickstart():
        model, args = trained(CASES["gqa"] + " --vocab-size 320")
        save(model, tmp_path / "mhc" / "checkpoint", "torch_dist", args)
        steps.update(write_script=in_this_process, run=lambda *_: {}, measure_gains=lambda *_: None)
        steps["train"] = lambda *_: {"final": [(4, 5.0)]}
        with contextlib.redirect_stdout(io.StringIO()) as text:
            program["quickstart"](program["Machine"](gpu=False, processes=2), 4, tmp_path)
        *_, sampled, exported, empty, first, second = text.getvalue().splitlines()
        assert re.fullmatch(r"sampled     return .+", sampled) and not empty
        assert exported.startswith(f"exported    {tmp_path / 'mhc' / 'exported'},")
        exec(f"{first.strip()}\n{second.strip()}", found := {})
        return found["model"].config.vocab_size

    assert run_ranks(1, quickstart) == [320]


def test_users_mistakes_name_the_remedy(run_ranks, tmp_path):
    def attempt():
        model, args = trained(CASES["gqa"])
        save(model, tmp_path / "checkpoint", "torch", args)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
        with pytest.raises(ValueError, match="--out .* is there already"):
            export(tmp_path / "checkpoint", tmp_path / "out")
        with pytest.raises(ValueError, match="--tokenizer /nowhere: .* give its folder"):
            export(tmp_path / "checkpoint", tmp_path / "new", tokenizer="/nowhere")
        assert not (tmp_path / "new").exists()
        loaded, _ = generate.load_model(tmp_path / "checkpoint")
        assert generate.continued(loaded, None, "1 2 3", 4, 0.0).startswith("1 2 3 ")
        for prompt in ("a text", "", "64"):
            with pytest.raises(ValueError, match="--prompt '.*': .*token"):
                generate.continued(loaded, None, prompt, 4, 0.0)
        args.tensor_model_parallel_size = 2
        save(model, tmp_path / "parallel", "torch", args)
        with pytest.raises(ValueError, match="--tensor-model-parallel-size 2 with --ckpt-format torch"):
            export(tmp_path / "parallel", tmp_path / "new")
        args.tensor_model_parallel_size = 1
        args.hybrid_layer_pattern = "M*"
        save(gpt.build(), tmp_path / "hybrid", "torch", args)
        with pytest.raises(
            ValueError, match=r"--hybrid-layer-pattern M\*: the exported model has no such part"
        ):
            export(tmp_path / "hybrid", tmp_path / "new")
        args.hybrid_layer_pattern = None
        save(gpt.build(), tmp_path / "plain", "torch", args)
        with pytest.raises(ValueError, match="not the checkpoint of a plugin's whole model"):
            export(tmp_path / "plain", tmp_path / "new")

    run_ranks(1, attempt)


@pytest.mark.parametrize("name", settings.KNOWN)
def test_what_the_exported_model_has_no_form_for_is_refused_by_name(name):
    class Arguments:
        pass

    setattr(Arguments, name, "something")
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{flag} something: .* generate by Megatron"):
        settings.check(Arguments)
