"""Broken checkpoints of every format, converted: an error that names file and key, or the right result.

Conversions that keep every value are used, so that the right result is known without the converter:
plugin -> megatron-main for `preset=paper`, deepseek -> plugin for `preset=deepseek_v4`.
"""

import os
import pickle
import random
import shutil
from importlib.util import find_spec

import gpt
import pytest
import torch
from convert_cases import save, scrambled
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_mhc import MHCConfig, convert
from megatron_mhc.checkpoint_keys import ARITHMETIC
from megatron_mhc.convert.files import convert_files
from megatron_mhc.convert.read import FILE, TRACKER, iteration_folder, read_published, read_torch_dist

V4 = MHCConfig(preset="deepseek_v4")
FORMATS = ["torch_dist", "torch", "pt"] + ["safetensors"] * (find_spec("safetensors") is not None)


def wider(value, dim):
    return torch.cat([value, value.narrow(dim, 0, 1)], dim)


def narrower(value, dim):
    """Of one row there is none to take away."""
    rows = value.shape[dim]
    return value.narrow(dim, 0, rows - 1).contiguous() if rows > 1 else wider(value, dim)


def with_(value, number):
    value = value.clone()
    value.view(-1)[random.randrange(value.numel())] = number
    return value


# What becomes of one mapping parameter's value; None takes it away.
BREAKS = {
    "absent": lambda value: None,
    "wider": lambda value: wider(value, -1),
    "longer": lambda value: wider(value, 0),
    "narrower": lambda value: narrower(value, -1),
    "shorter": lambda value: narrower(value, 0),
    "a scalar": lambda value: value.flatten()[0].clone(),
    "one dimension more": lambda value: value[None],
    "integers": lambda value: value.long(),
    "booleans": lambda value: value > 0,
    "complex": lambda value: value.to(torch.complex64),
    "NaN": lambda value: with_(value, float("nan")),
    "infinite": lambda value: with_(value, -float("inf")),
}
LISTS = {"a list": lambda value: value.tolist(), "a number": lambda value: 1.0, "text": lambda value: "fn"}
KEEPS = {
    "other values": lambda value: torch.randn_like(value),
    "zeros": torch.zeros_like,
    "doubles": lambda value: value.double(),
    "bf16": lambda value: value.bfloat16(),
}


class Case:
    """A checkpoint of one format under `folder`, its mapping parameters, and its conversion."""

    trust = False

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.published = kind in ("pt", "safetensors")
        self.load = folder / f"hc.{kind}" if self.published else folder / "mhc"

    def make(self):
        """Have Megatron's own writer save it; the published form is the converter's."""
        model = scrambled(gpt.build(V4 if self.published else MHCConfig()), 1)
        save(model, self.folder / "mhc", "torch_dist" if self.published else self.kind)
        if self.published:
            convert_files("plugin", "deepseek", self.folder / "mhc", self.load)

    def convert(self, out):
        if self.published:
            more = dict(into=self.folder / "mhc", trust=self.trust)
            convert_files("deepseek", "plugin", self.load, out, **more)
        else:
            convert_files("plugin", "megatron-main", self.load, out, trust=self.trust)

    @property
    def iteration(self):
        return iteration_folder(self.load)

    def read(self):
        """All entries, as they are in the files."""
        if self.kind == "torch_dist":
            return read_torch_dist(self.iteration)[0]
        if self.kind == "torch":
            return torch.load(self.iteration / "mp_rank_00" / FILE, weights_only=False)["model"]
        # Not the file's own memory, which `write` writes to.
        return {key: value.clone() for key, value in read_published(self.load).items()}

    def write(self, state):
        if self.kind == "safetensors":
            import safetensors.torch

            self.load.unlink()
            safetensors.torch.save_file(state, self.load)
        elif self.kind == "pt":
            torch.save(state, self.load)
        elif self.kind == "torch":
            file = self.iteration / "mp_rank_00" / FILE
            torch.save(torch.load(file, weights_only=False) | {"model": state}, file)
        else:
            common = read_torch_dist(self.iteration)[1]
            folder = self.iteration
            shutil.rmtree(folder)
            folder.mkdir()
            sharded = dict(common)
            for key, value in state.items():
                if isinstance(value, ShardedObject):
                    value.key = key.split("/")[0]
                    sharded[key] = value
                elif isinstance(value, torch.Tensor) and key != ARITHMETIC:
                    sharded[key] = ShardedTensor.from_rank_offsets(key, value)
                else:
                    sharded[key] = ShardedObject(key, value, (1,), (0,))
            dist_checkpointing.save(sharded, str(folder))

    def mappings(self, state):
        if self.published:
            return sorted(state)
        return sorted(key for key in state if "hyper_connection" in key)

    def result(self, out):
        """The values of the converted checkpoint, by the keys of the source."""
        kind = "torch_dist" if self.published else self.kind
        there = Case(kind, out)
        there.load = out
        state = there.read()
        return convert.to_published(state, "deepseek", V4) if self.published else state

    def files(self):
        if self.published:
            return [self.load]
        return sorted(file for file in self.load.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    from megatron_mhc.testing.ranks import run_ranks

    cases = {kind: Case(kind, tmp_path_factory.mktemp(kind)) for kind in FORMATS}
    run_ranks(1, lambda: [case.make() for case in cases.values()] and None)
    return cases


def copy(original, folder):
    shutil.copytree(original.folder, folder)
    return Case(original.kind, folder)


def refused(case, out, *names):
    """Convert, expecting one error that holds the names, and nothing written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError) as caught:
        case.convert(out)
    message = str(caught.value)
    assert str(case.load) in message and len(message.splitlines()) == 1, message
    assert all(name in message for name in names), (names, message)
    assert sorted(out.parent.iterdir()) == before


def break_entry(case, out, how, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    state = case.read()
    key = random.choice(case.mappings(state))
    value = {**BREAKS, **LISTS, **KEEPS}[how](state[key])
    if value is None:
        del state[key]
    else:
        state[key] = value
    case.write(state)
    if how not in KEEPS:
        return refused(case, out, key)
    case.convert(out)
    got = case.result(out)
    for name in case.mappings(state):
        torch.testing.assert_close(got[name], state[name], rtol=0, atol=0, check_dtype=False)


def break_file(case, out, how, seed):
    random.seed(seed)
    file = random.choice([f for f in case.files() if f.name != "metadata.json" or how != "zeros"])
    data = file.read_bytes()
    cut = random.randrange(len(data))
    if how == "absent":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[:cut] if file.name != TRACKER else b"")
    elif how == "zeros":
        file.write_bytes(bytes(len(data)))
    else:
        file.write_bytes(random.randbytes(len(data)))
    if how == "absent" and file.name == TRACKER:
        # What is left is a folder of iterations, of which none is named.
        return refused(case, out)
    refused(case, out, file.name if how != "absent" or file.suffix == ".distcp" else "")


FILES = ("absent", "truncated", "zeros", "noise")


def run(originals, folder, kind, mutations):
    for i, (how, seed) in enumerate(mutations):
        case = copy(originals[kind], folder / str(i))
        (folder / str(i) / "to").mkdir()
        mutate = break_file if how in FILES else break_entry
        try:
            mutate(case, folder / str(i) / "to" / "out", how, seed)
        except BaseException as error:
            raise AssertionError(f"{kind}, {how}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder / str(i))


def mutations(kind, count):
    tensors = kind == "safetensors"  # which holds tensors alone
    entries = [*BREAKS, *([] if tensors else LISTS), *KEEPS]
    entries.remove("complex") if tensors else None
    return [(how, seed) for seed in range(count) for how in (*entries, *(f for f in FILES if f != "absent"))]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_checkpoint_gives_an_error_that_names_it_or_the_right_result(
    run_ranks, originals, tmp_path, kind
):
    run_ranks(1, run, originals, tmp_path, kind, mutations(kind, 1) + [("absent", s) for s in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_many_broken_checkpoints(run_ranks, originals, tmp_path, kind):
    run_ranks(1, run, originals, tmp_path, kind, mutations(kind, 10)[len(mutations(kind, 1)) :], timeout=280)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.makedirs, (str(self.made), 0o777, True)


def with_code(case, where, payload):
    """Put code into one of the pickles of a checkpoint."""
    folder = case.iteration if not case.published else None
    if where == "metadata":
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        metadata.planner_data = payload
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where == "common.pt":
        torch.save({"args": payload}, folder / "common.pt")
    elif where == "arguments":
        file = folder / "mp_rank_00" / FILE
        torch.save(torch.load(file, weights_only=False) | {"args_of_a_run": payload}, file)
    elif where == "object":
        state, common = read_torch_dist(folder)
        key = next(key for key, value in state.items() if isinstance(value, ShardedObject))
        state[key].data = payload
        case.write(state)
    else:
        torch.save(case.read() | {"layers.0.hc_attn_fn": payload}, case.load)


@pytest.mark.parametrize(
    "kind, where",
    [
        ("torch_dist", "metadata"),
        ("torch_dist", "common.pt"),
        ("torch_dist", "object"),
        ("torch", "arguments"),
        ("pt", "tensor"),
    ],
)
def test_no_code_of_a_checkpoint_runs_unless_it_is_trusted(run_ranks, originals, tmp_path, kind, where):
    def attempt():
        case = copy(originals[kind], tmp_path / "case")
        (tmp_path / "to").mkdir()
        made = tmp_path / "made"
        with_code(case, where, Payload(made))
        assert not made.exists()
        refused(case, tmp_path / "to" / "out", "--trust")
        assert not made.exists()
        case.trust = True
        try:
            case.convert(tmp_path / "to" / "out")
        except ValueError:
            assert where == "tensor"  # which has become what the code returned
        assert made.exists()

    run_ranks(1, attempt)
