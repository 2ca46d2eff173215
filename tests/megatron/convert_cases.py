"""Checkpoints of tiny models, written and read as megatron.training does."""

import argparse

import torch
from megatron.core import dist_checkpointing


def save(model, folder, kind="torch_dist", arguments=None):
    """As megatron.training lays a checkpoint out; `arguments` of the run that trained it."""
    iteration = folder / "iter_0000003"
    iteration.mkdir(parents=True, exist_ok=True)  # by each of several ranks
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    arguments = arguments or argparse.Namespace(pipeline_model_parallel_size=1)
    common = {"args": arguments, "iteration": 3, "checkpoint_version": 3.0, "optimizer": {"step": 3}}
    if kind == "torch_dist":
        state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
        metadata = {"singleton_local_shards": False}
        dist_checkpointing.save({**state, **common}, str(iteration), content_metadata=metadata)
    else:
        (iteration / "mp_rank_00").mkdir()
        state = model.state_dict_for_save_checkpoint()
        torch.save({"model": state, **common}, iteration / "mp_rank_00" / "model_optim_rng.pt")


def load(model, folder, kind="torch_dist"):
    iteration = folder / "iter_0000003"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    if kind == "torch_dist":
        request = model.sharded_state_dict(metadata={"singleton_local_shards": False})
        state = dist_checkpointing.load(request, str(iteration), strict="raise_all")
        assert "optimizer" not in state and state["iteration"] == 3
        model.load_state_dict({key: state[key] for key in request})
    else:
        saved = torch.load(iteration / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
        assert "optimizer" not in saved and saved["iteration"] == 3
        model.load_state_dict(saved["model"])


def scrambled(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
