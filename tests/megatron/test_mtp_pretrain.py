"""`--mhc-mtp multistream` in megatron.training's loop: training, resume, what becomes of a checkpoint."""

import pytest
import torch
from pretrain_runs import MHC, STEPS, launch, tensors

from megatron_mhc.convert.files import convert_files
from megatron_mhc.export.folder import export

MTP = ["--mtp-num-layers", "2", "--mtp-loss-scaling-factor", "0.5", "--mhc-preset", "deepseek_v4"]
TWO_STAGES = ["--pipeline-model-parallel-size", "2"]
MULTISTREAM = [*MHC, *MTP, "--mhc-mtp", "multistream"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Ten steps on two stages, saved after five and after ten: (checkpoints, losses, output)."""
    folder = tmp_path_factory.mktemp("unbroken")
    saved = folder / "checkpoints"
    losses, output = launch(folder, *MULTISTREAM, *TWO_STAGES, "--save", str(saved))
    return saved, losses, output


def test_training_lowers_the_loss_of_every_depth(unbroken):
    _, losses, output = unbroken
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    for depth in (1, 2):
        said = [line for line in output.splitlines() if f"mtp_{depth} loss:" in line]
        first, last = (
            float(line.split(f"mtp_{depth} loss:")[1].split("|")[0]) for line in said[:: len(said) - 1]
        )
        assert last < first - 0.2


def test_training_resumes_bit_for_bit_and_in_another_layout(unbroken, tmp_path):
    saved, losses, _ = unbroken
    half = ["--load", str(saved), "--ckpt-step", str(STEPS // 2)]
    assert launch(tmp_path / "same", *MULTISTREAM, *TWO_STAGES, *half)[0] == losses[STEPS // 2 :]
    tp2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert launch(tmp_path / "tp2", *MULTISTREAM, *tp2, *half)[0] == pytest.approx(
        losses[STEPS // 2 :], abs=1e-5
    )


def test_a_checkpoint_goes_to_dev_and_back(unbroken, tmp_path):
    saved, *_ = unbroken
    convert_files("plugin", "megatron-dev", saved, tmp_path / "dev")
    options = "preset=deepseek_v4,mtp=multistream"
    convert_files("megatron-dev", "plugin", tmp_path / "dev", tmp_path / "back", options=options)
    there, back, first = (
        tensors(folder / f"iter_{STEPS:07d}") for folder in (tmp_path / "dev", tmp_path / "back", saved)
    )
    for name in (
        "hc_head_fn",
        "e_proj.weight",
        "transformer_layer.mlp_hyper_connection.bias",
        "hnorm.weight",
    ):
        assert f"mtp.layers.1.{name}" in there
    weights = {name for name in first if not name.startswith("optimizer")}
    assert weights == set(back)
    assert all(torch.equal(back[name], first[name]) for name in weights)


def test_exports_leave_the_depths_out_and_say_so(unbroken, tmp_path):
    saved, *_ = unbroken
    said = export(saved, tmp_path / "folder", trust=True)
    assert "the layers of --mtp-num-layers are left out: they take no part in generation" in said
