"""What Megatron-Bridge writes beside a checkpoint, as the arguments that are exported; without Bridge."""

import ast
from pathlib import Path

import pytest
import yaml

from megatron_mhc.export.bridge_config import arguments
from megatron_mhc.export.settings import check

MODEL = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "num_layers": 4,
    "seq_length": 64,
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": True,
    "rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "seq_len_interpolation_factor": None,
}


def written(folder, model=(), **parts):
    run = {"model": MODEL | dict(model), "tokenizer": {"tokenizer_type": "NullTokenizer"}} | parts
    (folder / "run_config.yaml").write_text(yaml.safe_dump(run))
    return folder


def test_fields_get_the_names_of_arguments(tmp_path):
    args = arguments(written(tmp_path))
    check(args)
    assert args.swiglu and args.use_rope_scaling and not args.untie_embeddings_and_output_weights
    assert (args.max_position_embeddings, args.rope_scaling_factor) == (64, 32.0)
    assert (args.tokenizer_type, args.tokenizer_model) == ("NullTokenizer", None)


def test_sizes_get_the_forms_that_an_import_takes(tmp_path):
    args = arguments(written(tmp_path, dict(num_moe_experts=8, num_query_groups=2, rotary_base=5e5)))
    assert (args.num_experts, args.num_query_groups, args.group_query_attention) == (8, 2, True)
    assert type(args.rotary_base) is int and args.rotary_base == 500000


def test_tokenizer_is_the_one_that_bridge_keeps(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    words = dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="somewhere/else")
    assert arguments(written(tmp_path, tokenizer=words)).tokenizer_model == str(tmp_path / "tokenizer")


def test_a_checkpoint_of_megatrons_has_none(tmp_path):
    assert arguments(tmp_path) is None


@pytest.mark.parametrize(
    "model, message",
    [
        (
            {"_target_": "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"},
            "GemmaModelProvider",
        ),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "--swiglu False"),
        ({"gated_linear_unit": False}, "--swiglu False"),
        ({"softmax_scale": 0.5}, "--softmax-scale 0.5"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn"),
    ],
)
def test_what_the_exported_model_does_not_compute_is_refused(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        check(arguments(written(tmp_path, model)))


@pytest.mark.parametrize("text", ["model: [", "model: 3", "tokenizer: {}"])
def test_an_unreadable_record_is_refused(tmp_path, text):
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(ValueError, match="run_config.yaml: .*; save the checkpoint again"):
        arguments(tmp_path)


def test_no_module_imports_bridge_when_it_is_imported():
    for path in (Path(__file__).resolve().parents[2] / "megatron_mhc").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("megatron.bridge") for name in names), path
