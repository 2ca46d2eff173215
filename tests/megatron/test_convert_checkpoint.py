"""`python -m megatron_mhc.convert` on checkpoints that Megatron's own writers made and loaders read."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gpt
import pytest
import torch
from convert_cases import load, save, scrambled

from megatron_mhc import MHCConfig, convert
from megatron_mhc.checkpoint_keys import ARITHMETIC
from megatron_mhc.convert.files import convert_files
from megatron_mhc.convert.read import rank_files

ROOT = Path(__file__).resolve().parents[2]
V4 = MHCConfig(preset="deepseek_v4")
GATED = MHCConfig(preset="qwen4_exp", gated_rank=8)
MOE_KINDS = pytest.mark.parametrize("settings", [{}, gpt.MOE], ids=["stacked", "numbered"])


def run_script(source, target, load, save, options=None, into=None, **more):
    convert_files(source, target, load, save, options=options, into=into, **more)


def loss(model):
    return gpt.forward_backward(model)[0].item()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@MOE_KINDS
@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_plain_checkpoint_becomes_an_mhc_one_of_the_same_loss(run_ranks, tmp_path, settings, kind):
    def losses():
        plain = scrambled(gpt.build(**settings), 1)
        save(plain, tmp_path / "plain", kind)
        run_script("plain", "plugin", tmp_path / "plain", tmp_path / "mhc", "num_residual_streams=3")
        mhc = MHCConfig(num_residual_streams=3)
        model = scrambled(gpt.build(mhc, **settings), 2)
        load(model, tmp_path / "mhc", kind)
        fresh = parameters(gpt.build(mhc, **settings))
        got = parameters(model)
        assert all(torch.equal(got[name], fresh[name]) for name in got if "hyper_connection" in name)
        return loss(plain), loss(model)

    plain, ours = run_ranks(1, losses)[0]
    assert ours == pytest.approx(plain, rel=1e-4)


@MOE_KINDS
@pytest.mark.parametrize(
    "names, mhc",
    [("megatron-dev", V4), ("transformers", V4), ("transformers", GATED)],
    ids=["dev", "v4", "qwen4"],
)
def test_checkpoint_survives_the_way_there_and_back(run_ranks, tmp_path, settings, names, mhc):
    """torch_dist and torch, over the names of a branch and over published ones."""

    def compare():
        for kind in ("torch_dist", "torch"):
            folder = tmp_path / kind
            model = scrambled(gpt.build(mhc, **settings), 1)
            save(model, folder / "mhc", kind)
            if names == "megatron-dev":
                run_script("plugin", names, folder / "mhc", folder / "other")
                run_script(names, "plugin", folder / "other", folder / "back", "preset=deepseek_v4")
            else:
                run_script("plugin", names, folder / "mhc", folder / "other.pt")
                other = scrambled(gpt.build(mhc, **settings), 2)
                mappings = ("hyper_connection", "final_layernorm.head", "final_layernorm.contraction")
                with torch.no_grad():
                    theirs = dict(other.named_parameters())
                    for name, value in parameters(model).items():
                        if not any(word in name for word in mappings):
                            theirs[name].copy_(value)
                save(other, folder / "base", kind)
                run_script(names, "plugin", folder / "other.pt", folder / "back", None, folder / "base")
            loaded = scrambled(gpt.build(mhc, **settings), 3)
            load(loaded, folder / "back", kind)
            assert_same(parameters(loaded), parameters(model))

    run_ranks(1, compare)


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_the_commands_of_the_page_run_in_their_order(run_ranks, tmp_path, monkeypatch, kind):
    """In a folder that holds plain/ alone; what the page calls exact is."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    name, *lines = re.search(r"```bash\n(.*?)```", page, re.DOTALL).group(1).splitlines()
    assert name == 'convert="python -m megatron_mhc.convert"' and len(lines) == 5
    if not find_spec("safetensors"):
        lines = [line.replace(".safetensors", ".pt") for line in lines]
    monkeypatch.chdir(tmp_path)

    def run():
        save(scrambled(gpt.build(), 1), tmp_path / "plain", kind)
        for line in lines:
            command, *arguments = shlex.split(line)
            assert command == "$convert"
            sys.argv = ["convert", *arguments]
            runpy.run_module("megatron_mhc.convert", run_name="__main__")
        mhc = MHCConfig()
        models = {name: scrambled(gpt.build(mhc), i) for i, name in enumerate(("mhc", "from_dev", "new"))}
        for name, model in models.items():
            load(model, tmp_path / name, kind)
            assert_same(parameters(model), parameters(models["mhc"]))

    run_ranks(1, run)


def test_the_converter_runs_by_its_name_and_its_errors_are_one_line(tmp_path):
    command = [sys.executable, "-m", "megatron_mhc.convert", "--from", "plain", "--to", "plugin"]
    command += ["--load", str(tmp_path / "none"), "--save", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"python -m megatron_mhc.convert: {tmp_path / 'none'} has")
    assert "Traceback" not in done.stderr


def test_torch_files_of_virtual_stages_are_numbered_as_megatron_lays_them_out(tmp_path):
    """Two stages of two chunks, of 1 + 2 + 1 + 1 layers: the model's order runs over stages, then chunks."""
    layers = {(0, 0): 1, (1, 0): 2, (0, 1): 1, (1, 1): 1}  # (stage, chunk)
    for stage in (0, 1):
        for tensor_rank in (0, 1):
            folder = tmp_path / f"mp_rank_{tensor_rank:02d}_{stage:03d}"
            folder.mkdir()
            saved = {"args": argparse.Namespace(pipeline_model_parallel_size=2)}
            for chunk in (0, 1):
                count = range(layers[stage, chunk])
                saved[f"model{chunk}"] = {f"decoder.layers.{i}.x": torch.zeros(1) for i in count}
            torch.save(saved, folder / "model_optim_rng.pt")
    files, layers = rank_files(tmp_path)
    assert layers == 5
    found = {file.parent.name: chunks for file, chunks in files}
    expected = {0: [("model0", 0), ("model1", 3)], 1: [("model0", 1), ("model1", 4)]}
    assert found == {f"mp_rank_{t:02d}_{s:03d}": expected[s] for s in (0, 1) for t in (0, 1)}


def test_users_mistakes_name_the_remedy(run_ranks, tmp_path):
    def attempt():
        save(gpt.build(), tmp_path / "plain")
        with pytest.raises(ValueError, match="needs --options"):
            run_script("megatron-dev", "plugin", tmp_path / "plain", tmp_path / "out")
        with pytest.raises(ValueError, match="not the checkpoint of a plugin"):
            run_script("plugin", "deepseek", tmp_path / "plain", tmp_path / "out")
        with pytest.raises(ValueError, match="drop it, the checkpoint says its own"):
            run_script("plugin", "deepseek", tmp_path / "plain", tmp_path / "out", "preset=paper")
        with pytest.raises(ValueError, match="--into belongs to"):
            run_script("deepseek", "plugin", tmp_path / "x.pt", tmp_path / "out", "preset=deepseek_v4")
        with pytest.raises(ValueError, match="is there already"):
            run_script("plain", "plugin", tmp_path / "plain", tmp_path / "plain")
        with pytest.raises(ValueError, match="neither metadata.json"):
            run_script("plain", "plugin", tmp_path, tmp_path / "out")

    run_ranks(1, attempt)


def test_megatrons_dense_norms_extra_state_moves_with_its_norm():
    """As TransformerEngine's norms save one; the plugin's own entry takes the place that they leave."""
    state = {
        "decoder.final_layernorm.weight": torch.ones(4),
        "decoder.final_layernorm._extra_state/shard_0_1": "te",
        "decoder.layers.self_attention.linear_proj.weight": torch.ones(2, 4, 4),
    }
    out = convert.from_plain(state, MHCConfig())
    assert out["decoder.final_layernorm.norm._extra_state/shard_0_1"] == "te"
    assert convert.read_arithmetic(out) == MHCConfig()
    back = convert.rename(out, "plugin", "megatron-main", MHCConfig())
    assert back["decoder.final_layernorm._extra_state/shard_0_1"] == "te"
    assert ARITHMETIC not in back
