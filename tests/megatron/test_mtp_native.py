"""`--mhc-mtp multistream` against multi-token prediction of Megatron's branch dev, with converted weights.

Skipped without MHC_MEGATRON_DEV=/path/to/Megatron-LM, a checkout of that branch.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mtp_cases import SETTINGS, VOCABULARY, S, run

from megatron_mhc import MHCConfig, convert
from megatron_mhc.testing import ranks

pytestmark = pytest.mark.skipif(
    "MHC_MEGATRON_DEV" not in os.environ, reason="needs a checkout: MHC_MEGATRON_DEV"
)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """What Megatron's dev branch makes of so many depths and streams."""
    return functools.cache(functools.partial(theirs, tmp_path_factory.mktemp("dev")))


def theirs(folder, depths, streams):
    path = os.pathsep.join([os.environ["MHC_MEGATRON_DEV"], str(HERE.parents[1]), str(HERE)])
    file = folder / "dev.pt"
    program = [sys.executable, str(HERE / "mtp_models.py"), str(depths), str(streams), str(file)]
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file, weights_only=False)


def ours(mhc, depths, state):
    """The same step of this package's model, by the library's door, with those weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc.specs import wrap_block_spec
    from megatron_mhc.testing.gpt import Layout

    Layout().initialize()
    config = TransformerConfig(mtp_num_layers=depths, **SETTINGS)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config,
        wrap_block_spec(layer, mhc, config),
        VOCABULARY,
        S,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False),
        position_embedding_type="rope",
    )
    model.load_state_dict(state)
    found = run(model)
    # By the names and parts of a checkpoint.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found["gradients"][name])
    return {**found, "gradients": model.state_dict()}


@pytest.mark.parametrize("depths, streams", [(1, 4), (2, 2)])
def test_losses_logits_and_gradients_are_those_of_megatrons_dev(dev, depths, streams):
    """fp32; dev adds its epsilon behind the root of the mappings' norm."""
    mhc = MHCConfig(preset="deepseek_v4", mtp="multistream", num_residual_streams=streams)
    expected = dev(depths, streams)
    state = convert.rename(expected["weights"], "megatron-dev", "plugin", mhc)
    found = ranks.run_ranks(1, ours, mhc, depths, state)[0]
    assert found["loss"] - expected["loss"] == pytest.approx(0, abs=1e-5)
    assert len(found["logits"]) == 1 + depths
    for one, other in zip(found["logits"], expected["logits"], strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()
    gradients = convert.rename(found["gradients"], "plugin", "megatron-dev", mhc)
    assert {name for name in expected["gradients"] if name.startswith("mtp.")} <= set(gradients)
    scale = max(gradient.abs().max() for gradient in expected["gradients"].values())
    errors = {}
    for name, other in expected["gradients"].items():
        assert other.abs().max() > 0, name
        largest = max(other.abs().max(), 1e-2 * scale)
        errors[name] = ((gradients[name] - other).abs().max() / largest).item()
    worst = max(errors, key=errors.get)
    print(f"worst gradient error {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= 1e-4, worst


def test_a_transposed_comb_of_the_depth_is_noticed(dev):
    """The comparison is a real one: H_res of the depth, which is as doubly stochastic turned round."""
    mhc = MHCConfig(preset="deepseek_v4", mtp="multistream")
    expected = dev(1, 4)
    state = convert.rename(expected["weights"], "megatron-dev", "plugin", mhc)
    for name, value in state.items():
        if name.startswith("mtp.") and "mlp_hyper_connection" in name and "alpha" not in name:
            state[name] = convert.transpose_res(value, 4, 0)
    found = ranks.run_ranks(1, ours, mhc, 1, state)[0]
    depth, decoder = (
        (one - other).abs().max() / other.abs().max()
        for one, other in zip(found["logits"], expected["logits"], strict=True)
    )
    assert depth > 1e-3 and decoder < 2e-5
