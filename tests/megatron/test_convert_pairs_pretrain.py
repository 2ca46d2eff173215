"""Runs of a GPT that go on as a HybridModel's, and back, by the converter; through Megatron's pretrain()."""

from importlib.util import find_spec

import pytest
import torch
from pretrain_runs import MHC, launch, run, tensors

COMMON = "--save-interval 2 --pipeline-model-parallel-size 2 --lr-decay-iters 10".split()
FRESH = ["--no-load-optim", "--no-load-rng"]


def convert(source, load, save, model, *more):
    words = ["--from", source, "--to", "plugin", "--load", str(load), "--save", str(save), "--model", model]
    code, output = run(["megatron_mhc.convert", *words, *more], 1)
    assert code == 0, output
    return output


def weights(folder, iteration):
    state = tensors(folder / f"iter_{iteration:07d}")
    return {key: value for key, value in state.items() if not key.startswith("optimizer")}


def test_a_gpt_goes_on_as_a_hybrid_model_and_back(tmp_path):
    launch(tmp_path / "a", *MHC, *COMMON, "--train-iters", "2", "--save", str(tmp_path / "gpt"))
    output = convert("plugin", tmp_path / "gpt", tmp_path / "converted", "hybrid")
    assert "a HybridModel: --hybrid-layer-pattern '*-*-*-*-' in the place of --num-layers" in output
    more = [*MHC, *COMMON, *FRESH, "--train-iters", "4"]
    pattern = ["--hybrid-layer-pattern", "*-*-|*-*-"]
    losses, _ = launch(tmp_path / "b", *more, "--load", str(tmp_path / "gpt"), "--save", str(tmp_path / "on"))
    found, output = launch(
        *(tmp_path / "c", *more, *pattern, "--load", str(tmp_path / "converted")),
        *("--save", str(tmp_path / "hybrid")),
    )
    assert "loading a GPT checkpoint into the hybrid model" not in output  # it is one
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-6, atol=0)

    output = convert("plugin", tmp_path / "hybrid", tmp_path / "back", "gpt")
    assert "a GPTModel: --num-layers 4 in the place of --hybrid-layer-pattern" in output
    expected, back = weights(tmp_path / "on", 4), weights(tmp_path / "back", 4)
    assert expected.keys() == back.keys()
    for key in expected:
        torch.testing.assert_close(back[key], expected[key], rtol=1e-4, atol=1e-5)
    last = [*FRESH, "--train-iters", "5", "--tensor-model-parallel-size", "2"]
    found, _ = launch(tmp_path / "d", *MHC, *last, "--load", str(tmp_path / "back"))
    assert len(found) == 1 and found[0] < losses[0]
    if find_spec("safetensors"):
        code, output = run(
            ["megatron_mhc.export", "--load", str(tmp_path / "back"), "--out", str(tmp_path / "folder")], 1
        )
        assert code == 0, output


@pytest.mark.slow
def test_a_plain_gpt_starts_a_hybrid_model_with_mhc(tmp_path):
    launch(tmp_path / "a", "--no-mhc", *COMMON, "--train-iters", "2", "--save", str(tmp_path / "gpt"))
    convert("plain", tmp_path / "gpt", tmp_path / "hybrid", "hybrid")
    more = [*COMMON, *FRESH, "--train-iters", "4"]
    losses, _ = launch(tmp_path / "b", "--no-mhc", *more, "--load", str(tmp_path / "gpt"))
    pattern = ["--hybrid-layer-pattern", "*-*-|*-*-", "--mhc-num-residual-streams", "4"]
    found, _ = launch(tmp_path / "c", *more, *pattern, "--load", str(tmp_path / "hybrid"))
    assert found[0] == pytest.approx(losses[0], abs=1e-3)
    assert len(found) == 2
