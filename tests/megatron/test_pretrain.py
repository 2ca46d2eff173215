"""Megatron's own pretrain() through megatron_mhc.pretrain_gpt, on gloo processes.

Losses come from TensorBoard, which keeps all of their 32 bits; the oracle of a resumed run is the run
that was never interrupted.
"""

import re

import pytest
import torch
from pretrain_runs import MHC, STEPS, attempt, launch, tensors


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Ten steps with mHC on two pipeline stages, saved after five and after ten."""
    folder = tmp_path_factory.mktemp("unbroken")
    values, output = launch(
        folder,
        *(*MHC, "--pipeline-model-parallel-size", "2", "--save", str(folder / "checkpoint")),
        by_torchrun=True,
    )
    return folder / "checkpoint", values, output


def test_training_with_mhc_lowers_the_loss(unbroken):
    checkpoint, values, output = unbroken
    assert len(values) == STEPS
    assert values[-1] < values[0] - 0.2
    assert "validation loss at iteration 10 on validation set" in output
    assert any("hyper_connection.mapping_proj.weight" in key for key in tensors(checkpoint / "iter_0000010"))


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken, tmp_path):
    checkpoint, values, _ = unbroken
    resumed, _ = launch(
        tmp_path,
        *MHC,
        *("--pipeline-model-parallel-size", "2", "--load", str(checkpoint), "--ckpt-step", "5"),
        *("--save", str(tmp_path / "checkpoint")),
    )
    assert resumed == values[5:]
    expected, got = tensors(checkpoint / "iter_0000010"), tensors(tmp_path / "checkpoint" / "iter_0000010")
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_a_run_saved_on_two_stages_resumes_on_two_tensor_parallel_ranks(unbroken, tmp_path):
    checkpoint, values, _ = unbroken
    resumed, _ = launch(
        tmp_path,
        *MHC,
        *("--tensor-model-parallel-size", "2", "--load", str(checkpoint), "--ckpt-step", "5"),
    )
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(values[5:]), rtol=1e-5, atol=0)


TORCH = "--pipeline-model-parallel-size 2 --ckpt-format torch --train-iters 1 --eval-iters 0".split()


@pytest.mark.parametrize(
    "saved, loaded, words",
    [
        (MHC, ["--no-mhc"], "drop --no-mhc"),
        pytest.param(["--no-mhc"], MHC, "--mhc-load-dense together with", marks=pytest.mark.slow),
    ],
    ids=["plain", "mhc"],
)
def test_checkpoints_of_the_other_kind_are_refused_in_the_torch_format(tmp_path, saved, loaded, words):
    """megatron.training's second attempt, which is not strict, would train on without the streams."""
    folder = str(tmp_path / "checkpoint")
    launch(tmp_path / "saved", *saved, *TORCH, "--save", folder)
    code, output = attempt(tmp_path / "loaded", *loaded, *TORCH, "--load", folder, "--finetune")
    assert code != 0 and words in output, output[-3000:]
    assert "lm loss:" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [[], ["--use-distributed-optimizer"]], ids=["replicated", "distributed"]
)
def test_fully_parallel_save_and_load_resume_bit_for_bit(tmp_path, optimizer):
    """Two data-parallel ranks share the writing (Megatron's default) and the reading of a checkpoint."""
    arguments = [*MHC, *optimizer, "--ckpt-fully-parallel-load"]
    values, output = launch(tmp_path / "whole", *arguments, "--save", str(tmp_path / "checkpoint"))
    assert re.search(r"ckpt_fully_parallel_save \.+ True", output)
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "5"]
    resumed, _ = launch(tmp_path / "resumed", *arguments, *load)
    assert resumed == values[5:]


LAYER_WISE = "--optimizer muon --use-distributed-optimizer --bf16".split()
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore --bf16".split()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(LAYER_WISE, id="layer_wise_muon", marks=pytest.mark.slow),
        pytest.param(ASYNC, id="async_save"),
    ],
)
def test_run_resumed_under_a_switch_equals_the_unbroken_one_bit_for_bit(tmp_path, arguments):
    if arguments is LAYER_WISE:
        pytest.importorskip("emerging_optimizers")
    folder = str(tmp_path / "checkpoint")
    values, _ = launch(tmp_path / "whole", *MHC, *arguments)
    assert values[-1] < values[0] - 0.2
    # The saving run ends there: Megatron's asynchronous writer reads CPU tensors in place, which a
    # further step would change; of a GPU's tensors it takes copies.
    stopped, _ = launch(tmp_path / "stopped", *MHC, *arguments, "--save", folder, "--exit-interval", "5")
    assert stopped == values[:5]
    resumed, _ = launch(tmp_path / "resumed", *MHC, *arguments, "--load", folder, "--ckpt-step", "5")
    assert resumed == values[5:]


def test_mhc_options_contradict_no_mhc():
    from argparse import ArgumentParser

    from megatron_mhc.pretrain_gpt import add_args, check_args

    parser = ArgumentParser()
    parser.add_argument("--spec", nargs="*", default=None)
    args = add_args(parser).parse_args(["--no-mhc", "--mhc-num-residual-streams", "2"])
    with pytest.raises(ValueError, match="--no-mhc"):
        check_args(args)
    args = parser.parse_args(["--spec", "a", "b"])
    with pytest.raises(ValueError, match="--spec a b: drop it"):
        check_args(args)


def sampled(folder, *graphs):
    """Losses of six steps, of which the fifth is sampled."""
    few = "--train-iters 6 --num-layers 2 --global-batch-size 2 --use-distributed-optimizer".split()
    few += ["--overlap-grad-reduce", "--overlap-param-gather", "--no-check-for-nan-in-loss-and-grad"]
    few += ["--mhc-log-interval", "5"]
    values, output = launch(folder, *MHC, *few, *graphs)
    assert "validation loss at iteration 6 on validation set" in output
    return values


@pytest.fixture(scope="module")
def without_graphs(tmp_path_factory):
    return sampled(tmp_path_factory.mktemp("without_graphs"))


@pytest.mark.parametrize("impl", ["local", "full_iteration"])
def test_a_run_in_graphs_has_the_losses_of_one_without(without_graphs, tmp_path, impl):
    assert sampled(tmp_path, "--cuda-graph-impl", impl) == without_graphs
    assert without_graphs[-1] < without_graphs[0]


HYBRID = (
    "--hybrid-layer-pattern M*|-E --num-experts 2 --moe-ffn-hidden-size 32 --pipeline-model-parallel-size 2"
)
HYBRID += " --train-iters 4 --save-interval 2 --lr-decay-iters 10 --logging-level 20 --mhc-log-interval 2"


def test_a_hybrid_model_trains_and_is_sampled(tmp_path):
    values, output = launch(tmp_path, *MHC, *HYBRID.split())
    assert values[-1] < values[0]
    assert "mHC: num_residual_streams=4" in output


@pytest.mark.slow
def test_a_hybrid_run_resumed_equals_the_unbroken_one_bit_for_bit(tmp_path):
    values, _ = launch(tmp_path / "whole", *MHC, *HYBRID.split(), "--save", str(tmp_path / "checkpoint"))
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "2"]
    resumed, _ = launch(tmp_path / "resumed", *MHC, *HYBRID.split(), *load)
    assert resumed == values[2:]
    code, output = attempt(tmp_path / "plain", *HYBRID.rsplit(" --mhc", 1)[0].split(), "--no-mhc", *load)
    assert code != 0 and "is an mHC model's: add --spec megatron_mhc.specs hybrid_mhc_spec" in output


@pytest.mark.slow
def test_a_model_of_gated_delta_nets_trains_and_goes_on_in_another_layout(tmp_path):
    common = [*MHC, *HYBRID.split("E", 1)[1].replace("--pipeline-model-parallel-size 2", "").split()]
    common += "--linear-key-head-dim 8 --linear-value-head-dim 6 --linear-num-key-heads 2".split()
    common += ["--linear-num-value-heads", "4", "--hybrid-layer-pattern"]
    two_stages = ["G*|-E", "--pipeline-model-parallel-size", "2", "--save", str(tmp_path / "checkpoint")]
    values, _ = launch(tmp_path / "whole", *common, *two_stages)
    assert values[-1] < values[0]
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "2"]
    resumed, _ = launch(
        *(tmp_path / "resumed", *common, "G*-E", *load, "--sequence-parallel"),
        *("--tensor-model-parallel-size", "2"),
    )
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(values[2:]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_hybrid_model_goes_on_from_the_checkpoint_of_the_same_gpt(tmp_path):
    """By Megatron's own translation as it loads: weights, mappings and optimizer."""
    common = [*MHC, *"--train-iters 4 --save-interval 2 --pipeline-model-parallel-size 2".split()]
    values, _ = launch(tmp_path / "gpt", *common, "--save", str(tmp_path / "checkpoint"))
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "2"]
    found, output = launch(tmp_path / "hybrid", *common, *load, "--hybrid-layer-pattern", "*-*-|*-*-")
    assert "4 GPT layers feed 4 attention and 4 MLP positions" in output
    torch.testing.assert_close(torch.tensor(found), torch.tensor(values[2:]), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_hybrid_model_starts_from_the_checkpoint_of_a_plain_gpt(tmp_path):
    """Megatron asks for a GPT's optimizer state under --finetune too."""
    common = "--train-iters 4 --save-interval 2 --pipeline-model-parallel-size 2".split()
    launch(tmp_path / "gpt", "--no-mhc", *common, "--save", str(tmp_path / "checkpoint"))
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "2", "--mhc-load-dense", *common]
    load += ["--hybrid-layer-pattern", "*-*-|*-*-"]
    code, output = attempt(tmp_path / "refused", "--mhc-num-residual-streams", "4", *load, "--finetune")
    assert code != 0 and "Megatron looks at --no-load-optim alone" in output
    values, _ = launch(tmp_path / "hybrid", "--mhc-num-residual-streams", "4", *load, "--no-load-optim")
    assert len(values) == 2
