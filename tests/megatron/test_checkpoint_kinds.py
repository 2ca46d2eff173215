"""Plain and mHC checkpoints: each model takes its own kind, and the other only when told to."""

import gpt
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_mhc import MHCConfig

FOUR = MHCConfig()
DENSE = MHCConfig(load_dense=True)


def save(model, folder):
    folder.mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))


def load(model, folder, **more):
    state = dist_checkpointing.load({"model": model.sharded_state_dict(), **more}, str(folder))
    model.load_state_dict(state["model"])


def scrambled(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hyper_connection" not in name:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("settings", [{}, gpt.MOE], ids=["dense", "moe"])
def test_plain_checkpoint_starts_an_mhc_model_when_told_to(run_ranks, tmp_path, settings):
    def losses():
        plain = scrambled(gpt.build(**settings))
        save(plain, tmp_path / "plain")
        model = gpt.build(DENSE, **settings)
        mappings = {n: p.clone() for n, p in model.named_parameters() if "hyper_connection" in n}
        load(model, tmp_path / "plain")
        loaded = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            ours = name.replace("final_layernorm.", "final_layernorm.norm.")
            assert torch.equal(parameter, loaded[ours]), name
        assert all(torch.equal(loaded[name], value) for name, value in mappings.items())
        return gpt.forward_backward(plain)[0].item(), gpt.forward_backward(model)[0].item()

    plain, ours = run_ranks(1, losses)[0]
    assert ours == pytest.approx(plain, rel=1e-3)


def test_plain_checkpoint_is_refused_by_default(run_ranks, tmp_path):
    def attempt():
        save(gpt.build(), tmp_path / "plain")
        with pytest.raises(ValueError, match="--mhc-load-dense together with --finetune or --no-load-optim"):
            load(gpt.build(FOUR), tmp_path / "plain")

    run_ranks(1, attempt)


def test_plain_checkpoints_optimizer_is_refused(run_ranks, tmp_path):
    def attempt():
        save(gpt.build(), tmp_path / "plain")
        model = gpt.build(DENSE)
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
        request = optimizer.sharded_state_dict(model.sharded_state_dict())
        with pytest.raises(ValueError, match="--no-load-optim"):
            load(model, tmp_path / "plain", optimizer=request)

    run_ranks(1, attempt)


def test_mhc_checkpoint_is_refused_by_a_plain_model(run_ranks, tmp_path):
    """By stock Megatron itself, plugin off: the final norm is missing under its plain name."""

    def attempt():
        from megatron_mhc import hooks

        save(gpt.build(FOUR), tmp_path / "mhc")
        hooks.revert_all()
        with pytest.raises(CheckpointException, match="decoder.final_layernorm.weight"):
            load(gpt.build(), tmp_path / "mhc")

    run_ranks(1, attempt)


@pytest.mark.parametrize(
    "mhc", [FOUR, DENSE, MHCConfig(preset="deepseek_v4"), MHCConfig(h_res="unconstrained")]
)
def test_mhc_checkpoint_round_trips(run_ranks, tmp_path, mhc):
    def compare():
        saved = scrambled(gpt.build(mhc))
        with torch.no_grad():
            for name, parameter in saved.named_parameters():
                if "hyper_connection" in name or "final_layernorm.head" in name:
                    parameter.normal_()
        save(saved, tmp_path / "mhc")
        model = gpt.build(mhc)
        load(model, tmp_path / "mhc")
        for (name, a), b in zip(saved.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), name

    run_ranks(1, compare)


@pytest.mark.parametrize(
    "other, words",
    [
        (MHCConfig(num_residual_streams=2), "--mhc-num-residual-streams"),
        (MHCConfig(h_res="identity"), "other --mhc-\\* options"),
        (MHCConfig(sinkhorn_iterations=10), "pass --mhc-sinkhorn-iterations 20"),
        (MHCConfig(contract="sum"), "pass --mhc-contract mean"),
        (MHCConfig(preset="deepseek_v4", contract="mean"), "pass --mhc-preset paper"),
    ],
)
def test_mhc_checkpoint_of_other_options_is_refused(run_ranks, tmp_path, other, words):
    def attempt():
        save(gpt.build(FOUR), tmp_path / "mhc")
        with pytest.raises(ValueError, match=words):
            load(gpt.build(other), tmp_path / "mhc")

    run_ranks(1, attempt)


def test_torch_format_state_dict_follows_the_same_rules(run_ranks):
    def attempt():
        plain = scrambled(gpt.build())
        state = plain.state_dict()
        with pytest.raises(ValueError, match=r"--mhc-load-dense .* \(in MEGATRON_MHC: load_dense=true\)"):
            gpt.build(FOUR).load_state_dict(dict(state))
        model = gpt.build(DENSE)
        model.load_state_dict(dict(state))
        assert torch.equal(model.decoder.final_layernorm.norm.weight, plain.decoder.final_layernorm.weight)
        two = gpt.build(MHCConfig(sinkhorn_iterations=5)).state_dict()
        words = r"pass --mhc-sinkhorn-iterations 5 \(in MEGATRON_MHC: sinkhorn_iterations=5\)"
        with pytest.raises(ValueError, match=words):
            gpt.build(FOUR).load_state_dict(two)

    run_ranks(1, attempt)


def test_mhc_checkpoint_is_refused_by_a_plain_model_with_a_remedy(run_ranks, tmp_path):
    """With the hooks registered, as `pretrain_gpt --no-mhc` has them."""

    def attempt():
        save(gpt.build(FOUR), tmp_path / "mhc")
        with pytest.raises(ValueError, match="drop --no-mhc"):
            load(gpt.build(), tmp_path / "mhc")

    run_ranks(1, attempt)
