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
FIXED = MHCConfig(h_res="identity", h_pre="fixed", h_post="fixed")  # its connections have no parameters
HY = MHCConfig(preset="hy_v4")
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
        with pytest.raises(ValueError, match="so is the optimizer state in it: pass --finetune, or --no-"):
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
    "mhc", [FOUR, DENSE, FIXED, MHCConfig(preset="deepseek_v4"), MHCConfig(h_res="unconstrained"), HY]
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


OTHERS = [
    (FOUR, MHCConfig(num_residual_streams=2), "pass --mhc-num-residual-streams 4"),
    (FOUR, MHCConfig(h_res="identity"), "pass --mhc-h-res sinkhorn"),
    (FOUR, MHCConfig(h_pre="fixed"), "pass --mhc-h-pre dynamic"),
    (FOUR, MHCConfig(h_post="fixed"), "pass --mhc-h-post dynamic"),
    (FOUR, MHCConfig(sinkhorn_iterations=10), "pass --mhc-sinkhorn-iterations 20"),
    (FOUR, MHCConfig(contract="sum"), "pass --mhc-contract mean"),
    (FOUR, MHCConfig(contract="learned_head"), "pass --mhc-contract mean"),
    (MHCConfig(contract="learned_head"), FOUR, "pass --mhc-contract learned_head"),
    (FOUR, MHCConfig(preset="deepseek_v4", contract="mean"), "pass --mhc-preset paper"),
    (FOUR, MHCConfig(h_res="unconstrained"), "pass --mhc-h-res sinkhorn"),
    (HY, MHCConfig(preset="hy_v4", post_magnitude=1.5), "pass --mhc-post-magnitude 2.0"),
    (HY, MHCConfig(h_res="identity", contract="learned_head"), "pass --mhc-preset hy_v4"),
    (MHCConfig(preset="glm_5_3"), MHCConfig(preset="deepseek_v4"), "pass --mhc-preset glm_5_3"),
    (FIXED, FOUR, "pass --mhc-h-res identity"),
    (FIXED, DENSE, "pass --mhc-h-res identity"),
    (FOUR, FIXED, "pass --mhc-h-res sinkhorn"),
]


@pytest.mark.parametrize("trained, other, words", OTHERS)
def test_mhc_checkpoint_of_other_options_is_refused_with_the_flag_that_differs(
    run_ranks, tmp_path, trained, other, words
):
    """In both formats."""

    def attempt():
        saved, model = gpt.build(trained), gpt.build(other)
        save(saved, tmp_path / "mhc")
        with pytest.raises(ValueError, match=words):
            load(model, tmp_path / "mhc")
        with pytest.raises(ValueError, match=words):
            model.load_state_dict(saved.state_dict())

    run_ranks(1, attempt)


def test_every_stage_names_the_options_of_a_checkpoint_that_does_not_fit(run_ranks, tmp_path):
    """A stage that has no final norm does not ask for the options that the norm keeps."""

    def attempt():
        save(gpt.build(MHCConfig(preset="deepseek_v4", h_pre="fixed")), tmp_path / "mhc")
        request = without_norm(gpt.build(FOUR).sharded_state_dict())
        with pytest.raises(ValueError, match="--mhc-preset deepseek_v4 .*--mhc-h-pre fixed"):
            dist_checkpointing.load({"model": request}, str(tmp_path / "mhc"))

    run_ranks(1, attempt)


def without_norm(state):
    return {key: value for key, value in state.items() if "final_layernorm" not in key}


def test_a_stage_of_fixed_mappings_loads_its_part(run_ranks, tmp_path):
    """Neither its request nor its state dict tells it from a plain model's."""

    def attempt():
        saved = scrambled(gpt.build(FIXED))
        save(saved, tmp_path / "mhc")
        request = without_norm(gpt.build(FIXED).sharded_state_dict())
        state = dist_checkpointing.load({"model": request}, str(tmp_path / "mhc"))["model"]
        for part in (state, without_norm(saved.state_dict())):
            fresh = gpt.build(FIXED)
            fresh.decoder.final_layernorm = None  # as Megatron has it in front of the last stage
            fresh.load_state_dict(part)
            name = "decoder.layers.1.mlp.linear_fc1.weight"
            assert torch.equal(fresh.state_dict()[name], saved.state_dict()[name])
        save(gpt.build(FOUR), tmp_path / "dynamic")
        with pytest.raises(ValueError, match="is an mHC model's"):
            dist_checkpointing.load({"model": request}, str(tmp_path / "dynamic"))

    run_ranks(1, attempt)


def test_branch_checkpoint_is_sent_to_the_converter(run_ranks, tmp_path):
    def attempt():
        state = gpt.build(FOUR).sharded_state_dict()
        state["decoder.final_layernorm.weight"] = state.pop("decoder.final_layernorm.norm.weight")
        state["decoder.final_layernorm.weight"].key = "decoder.final_layernorm.weight"
        del state["decoder.final_layernorm._extra_state"]
        (tmp_path / "branch").mkdir()
        dist_checkpointing.save({"model": state}, str(tmp_path / "branch"))
        with pytest.raises(ValueError, match="python -m megatron_mhc.convert"):
            load(gpt.build(FOUR), tmp_path / "branch")
        state = gpt.build(FOUR).state_dict()
        state["decoder.final_layernorm.weight"] = state.pop("decoder.final_layernorm.norm.weight")
        with pytest.raises(ValueError, match="python -m megatron_mhc.convert"):
            gpt.build(FOUR).load_state_dict(state)

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


@pytest.mark.parametrize("mhc", [FOUR, FIXED], ids=["dynamic", "fixed"])
def test_mhc_checkpoint_is_refused_by_a_plain_model_with_a_remedy(run_ranks, tmp_path, mhc):
    """With the hooks registered, as `pretrain_gpt --no-mhc` has them; in both formats, strict or not."""

    def attempt():
        ours = gpt.build(mhc)
        save(ours, tmp_path / "mhc")
        with pytest.raises(ValueError, match="drop --no-mhc"):
            load(gpt.build(), tmp_path / "mhc")
        for strict in (True, False):
            with pytest.raises(ValueError, match="drop --no-mhc"):
                gpt.build().load_state_dict(ours.state_dict(), strict=strict)

    run_ranks(1, attempt)


@pytest.mark.parametrize("mhc", [FOUR, FIXED], ids=["dynamic", "fixed"])
def test_plain_checkpoint_is_refused_in_both_formats(run_ranks, tmp_path, mhc):
    def attempt():
        plain = gpt.build()
        save(plain, tmp_path / "plain")
        with pytest.raises(ValueError, match="--mhc-load-dense"):
            load(gpt.build(mhc), tmp_path / "plain")
        for strict in (True, False):
            with pytest.raises(ValueError, match="--mhc-load-dense"):
                gpt.build(mhc).load_state_dict(plain.state_dict(), strict=strict)

    run_ranks(1, attempt)


PARTIAL = [
    (FOUR, "self_attention_hyper_connection.bias"),
    (FOUR, "mlp_hyper_connection.alpha_pre"),
    (FOUR, "mlp_hyper_connection.mapping_proj.weight"),
    (DENSE, "mlp_hyper_connection.alpha_res"),
    (MHCConfig(contract="learned_head"), "final_layernorm.head.alpha"),
    (MHCConfig(preset="qwen4_exp"), "mlp_hyper_connection.read_up.weight"),
]


@pytest.mark.parametrize("mhc, name", PARTIAL, ids=[name for _, name in PARTIAL])
@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_a_mappings_entries_is_refused_by_name(run_ranks, mhc, name, strict):
    """megatron.training's second attempt, which is not strict, would start the absent one anew."""

    def attempt():
        model = gpt.build(mhc)
        state = model.state_dict()
        (absent, *_) = [key for key in state if key.endswith(name)]
        del state[absent]
        with pytest.raises(ValueError, match=f"{absent} is not in the checkpoint, which has "):
            gpt.build(mhc).load_state_dict(state, strict=strict)

    run_ranks(1, attempt)


@pytest.mark.parametrize("mhc", [FOUR, DENSE], ids=["four", "dense"])
def test_a_joined_entry_beside_an_absent_one_is_refused_by_name(run_ranks, mhc):
    """As torch_dist's factory joins the parts: one of them there is no plain model's checkpoint."""

    def attempt():
        model = gpt.build(mhc)
        state = model.state_dict()
        (phi, *_) = [key for key in state if key.endswith("mlp_hyper_connection.mapping_proj.weight")]
        at = phi.removesuffix("mapping_proj.weight")
        connection = model.get_submodule(at.rstrip("."))
        state = {key: value for key, value in state.items() if not key.startswith(at)}
        state[at + "affine"] = connection.affine
        with pytest.raises(ValueError, match=f"{phi} is not in the checkpoint, which has {at}affine"):
            gpt.build(mhc).load_state_dict(state, strict=False)

    run_ranks(1, attempt)


def test_stock_megatron_drops_the_streams_of_a_state_dict_unseen(run_ranks):
    """What the README warns of: without the hooks, the second, non-strict attempt succeeds."""

    def attempt():
        from megatron_mhc import hooks

        state = gpt.build(FOUR).state_dict()
        hooks.revert_all()
        gpt.build().load_state_dict(state, strict=False)

    run_ranks(1, attempt)
