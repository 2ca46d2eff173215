"""Which layers a pipeline stage holds, against Megatron's own answer for the rank that asks."""

from types import SimpleNamespace

import pytest
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_mhc import MHCConfig, parallel
from megatron_mhc.pipeline import options
from megatron_mhc.pipeline.layer_times import _moe_share
from megatron_mhc.schedule.stages import layer_counts, layers_of_rank, with_experts

SETTINGS = {
    "even": dict(num_layers=8, pp=4),
    "virtual": dict(num_layers=8, pp=2, vpp=2),
    "uneven": dict(num_layers=7, pp=4, num_layers_in_first_pipeline_stage=1),
    "uneven_virtual": dict(
        num_layers=10,
        pp=4,
        vpp=2,
        num_layers_in_first_pipeline_stage=2,
        num_layers_in_last_pipeline_stage=4,
    ),
    "loss_alone": dict(num_layers=7, pp=4, vpp=2, account_for_loss_in_pipeline_split=True),
    "embedding": dict(num_layers=7, pp=2, vpp=2, account_for_embedding_in_pipeline_split=True),
    "one_rank": dict(num_layers=3, pp=1),
    "Etttt|L": dict(num_layers=4, pp=2),
    "Ett|t||tL": dict(num_layers=4, pp=4),
    "Ett||tt|L": dict(num_layers=4, pp=2, vpp=2),
    "E|ttt|tt|L": dict(num_layers=5, pp=4),
}


def config(pp, vpp=None, **settings):
    settings |= dict(hidden_size=16, num_attention_heads=2, pipeline_dtype="float32")
    return TransformerConfig(
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp, **settings
    )


def make(name):
    layout = dict(pipeline_model_parallel_layout=name) if "|" in name else {}
    return config(**SETTINGS[name], **layout)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_rank_knows_what_each_rank_answers_for_itself(monkeypatch, name):
    made = make(name)
    pp, vpp = made.pipeline_model_parallel_size, made.virtual_pipeline_model_parallel_size
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: vpp)
    counts = {}
    for rank in range(pp):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        own = []
        for chunk in range(vpp or 1):
            where = (made, chunk if vpp else None)
            count = counts[chunk * pp + rank] = get_num_layers_to_build(*where)
            first = get_transformer_layer_offset(*where) if count else None
            own.append((count, first))
        found = [(len(layers), layers.start if layers else None) for layers in layers_of_rank(made, rank)]
        assert found == own
    assert layer_counts(made) == tuple(counts[stage] for stage in sorted(counts))


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_says_of_another_what_is_true(monkeypatch, rank):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: None)
    parallel.validate_stages(make("Ett|t||tL"))
    with pytest.raises(ValueError, match="pipeline stage 0 has none: .*--pipeline-model-parallel-layout"):
        parallel.validate_stages(make("E|ttt|tt|L"))
    split = MHCConfig(pipeline_schedule="interleaved", pp_boundary="split")
    options.check_config(config(num_layers=4, pp=4, pipeline_model_parallel_layout="Ett|t|t|L"), split)
    with pytest.raises(ValueError, match="stage 2 has no layer"):
        options.check_config(make("Ett|t||tL"), split)


@pytest.mark.parametrize(
    "frequency, layers, moe",
    [(1, 2, [True, True]), (2, 5, [True, False, True, False, True]), ([0, 1, 1], 3, [False, True, True])],
)
def test_layers_with_experts(frequency, layers, moe):
    assert with_experts(frequency, layers) == moe
    config = SimpleNamespace(num_moe_experts=4, moe_layer_freq=frequency, num_layers=layers)
    assert _moe_share(config) == pytest.approx(sum(moe) / layers)
