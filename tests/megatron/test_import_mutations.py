"""Mutated folders imported and mutated checkpoints exported: an error that names them, or the right result.

A mutation follows from its number. The right result of a folder is what transformers computes from it, of a
checkpoint what torch's own readers find in it.
"""

import json
import random
import re
import shutil

import gpt
import pytest
import torch
from convert_cases import save
from pretrain_runs import tensors as read_by_dcp
from test_convert_mutations import BREAKS, KEEPS
from test_export import CASES, trained, transformers
from test_import import DENSE, dense

from megatron_mhc.convert.read import FILE, TRACKER
from megatron_mhc.export import export, weights
from megatron_mhc.export.folder import read
from megatron_mhc.import_hf import import_folder
from megatron_mhc.testing.ranks import run_ranks as forked

safetensors = pytest.importorskip("safetensors.torch")
FOLDERS = ("exported", "llama", "qwen2", "qwen3_moe_sparse", "deepseek_v3_yarn")
CHECKPOINTS = ("torch_dist", "torch")
TENSORS = (r"model\.(layers|embed|norm)", r"lm_head", r"(decoder|embedding|output_layer)\.")
LEAVES = (
    None,
    0,
    1,
    -1,
    2**31,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "7",
    "default",
    [],
    {},
    [0],
    True,
    False,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")

    def make():
        model, args = trained(CASES["gqa"])
        for kind in CHECKPOINTS:
            save(model, root / kind, kind, args)
        export(root / "torch_dist", root / "exported")
        for name in FOLDERS[1:]:
            dense(*DENSE[name], root / name, max_shard_size="20KB")

    forked(1, make)
    return root


class Mutation:
    """One of a file of a copy of an original.

    Attributes:
        names: of which the message of an error has to hold one.
        key: of config.json, which transformers may do without.
    """

    def __init__(self, number, originals, folder):
        self.random, self.originals = random.Random(number), originals
        torch.manual_seed(number)
        self.kind = self.random.choice(FOLDERS * 2 + CHECKPOINTS)
        self.load, self.key, self.names = folder / self.kind, None, [r"never"]
        shutil.copytree(originals / self.kind, self.load)
        how = [self.bytes_]
        if self.kind in FOLDERS:
            how += [self.config, self.config, self.tensor, self.tensor, self.index]
        self.how = self.random.choice(how)
        self.what = f"{self.kind}, {self.how.__name__}, {self.how()}"

    def bytes_(self):
        """Some of a file's bytes: cut off, flipped, made zero, or others behind them."""
        file = self.random.choice(
            sorted(f for f in self.load.rglob("*") if f.is_file() and f.suffix != ".py")
        )
        data = bytearray(file.read_bytes())
        at, way = (
            self.random.randrange(len(data)),
            self.random.choice(("cut", "bit", "zero", "more", "absent")),
        )
        if way == "cut":
            del data[at:]
        elif way == "bit":
            data[at] ^= 1 << self.random.randrange(8)
        elif way == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        else:
            data += self.random.randbytes(self.random.randrange(1, 64))
        file.write_bytes(data)
        # A flipped bit may also make of a name another one, which is then absent or too many.
        self.names = [re.escape(file.name), *TENSORS]
        if file.name == TRACKER or file.name == "metadata.json":
            self.names.append("metadata.json")
        if way == "absent":
            self.names.append(r"no folder of \*\.safetensors")
            file.unlink()
        return f"{way} of {file.name} at {at}"

    def config(self):
        """A value of config.json: absent, of another type, larger or smaller."""
        file = self.load / "config.json"
        content = json.loads(file.read_text())
        inside = content
        key = self.random.choice(sorted(content))
        while isinstance(inside[key], dict) and inside[key] and self.random.random() < 0.8:
            inside = inside[key]
            key = self.random.choice(sorted(inside))
        value = inside[key]
        ways = [lambda: self.random.choice(LEAVES)]
        if type(value) in (int, float):
            ways += [
                lambda: value + 1,
                lambda: value - 1,
                lambda: value * 2,
                lambda: value / 2,
                lambda: -value,
            ]
        if isinstance(value, list) and value:
            ways += [lambda: value[1:], lambda: value + value[:1], lambda: [*value[:-1], "x"]]
        if self.random.random() < 0.2:
            del inside[key]
            made = "absent"
        else:
            inside[key] = made = self.random.choice(ways)()
        self.key = key
        self.names = ["config.json", re.escape(key), *TENSORS]
        file.write_text(json.dumps(content))
        return f"{key}: {value!r} -> {made!r}"

    def tensor(self):
        """One tensor: absent, of another shape or dtype, not finite, other values, or twice."""
        file = self.random.choice(sorted(self.load.glob("*.safetensors")))
        state = safetensors.load_file(file)
        key = self.random.choice(sorted(state))
        how = self.random.choice([*BREAKS, *KEEPS, "renamed"])
        random.seed(self.random.randrange(10**6))
        self.names = [re.escape(key)]
        if ".experts." in key:  # whose shapes are compared with those of the first
            self.names.append(re.sub(r"(.*experts)\.\d+\.(.*)", r"\1\\.\\d+\\.\2", key))
        if how == "complex":
            how = "NaN"
        if how == "renamed":
            self.names.append(r"model\.layers\.7")
            state[key.replace("layers.1.", "layers.7.") + "x"] = state.pop(key)
        elif (value := (BREAKS | KEEPS)[how](state[key])) is None:
            del state[key]
        else:
            state[key] = value.contiguous()
        safetensors.save_file(state, file, metadata={"format": "pt"})
        return f"{how} of {key}"

    def index(self):
        """Which file a tensor is said to be in."""
        file = self.load / "model.safetensors.index.json"
        if not file.exists():
            return self.tensor()
        content = json.loads(file.read_text())
        placed = content["weight_map"]
        key = self.random.choice(sorted(placed))
        way = self.random.choice(("absent", "elsewhere", "nowhere", "number"))
        self.names = [re.escape(key), r"x\.safetensors"]
        if way == "absent":
            del placed[key]
        else:
            placed[key] = {"elsewhere": min(placed.values()), "nowhere": "x.safetensors", "number": 3}[way]
        file.write_text(json.dumps(content))
        return f"{way}: {key}"

    def run(self, out):
        """Import or export; returns the message of the error, None where there was none."""
        try:
            if self.kind in FOLDERS:
                import_folder(self.load, out, transformer_impl="local")
            else:
                export(self.load, out)
        except ValueError as error:
            return str(error)
        return None

    def check(self, out):
        """Compare a result with what is right."""
        if self.kind in CHECKPOINTS:
            return self.check_checkpoint()
        export(out, out / "hf")
        with torch.no_grad():
            tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
            found = load(out / "hf")(tokens).logits
            bound, expected = 1e-6 if self.kind == "exported" else 1e-4, self.by_transformers()(tokens).logits
        if self.load.joinpath("config.json").read_text().find("float16") >= 0:
            bound = 0.1
        config = json.loads((self.load / "config.json").read_text())
        if self.kind != "exported" and not 0 < config["rms_norm_eps"] <= 1e-4:
            return  # of a larger epsilon the norms no longer take back the scale of H_pre
        if expected.isfinite().all():  # a flipped bit may make a weight of 1e38
            difference = (found - expected).abs().max()
            assert difference <= bound * expected.std(), f"logits differ by {difference}"

    def by_transformers(self):
        """The folder by transformers; what is in the way of that alone is taken away."""
        index = "model.safetensors.index.json"
        there = self.originals / self.kind / index
        if there.exists() and not (self.load / index).exists():  # the files alone say it all
            shutil.copyfile(there, self.load / index)
        try:
            return load(self.load)
        except Exception:
            other = self.load.with_name("without")
            shutil.copytree(self.load, other)
            content = json.loads((other / "config.json").read_text())
            for inside in (content, *(value for value in content.values() if isinstance(value, dict))):
                inside.pop(self.key, None)
            there = json.loads((self.originals / self.kind / "config.json").read_text())
            content |= {key: there[key] for key in ("auto_map", "architectures") if key in there}
            (other / "config.json").write_text(json.dumps(content))
            return load(other)

    def check_checkpoint(self):
        _, found, args = read(self.load)
        if self.kind == "torch":
            state = torch.load(self.load / "iter_0000003" / "mp_rank_00" / FILE, weights_only=False)["model"]
        else:
            state = read_by_dcp(self.load / "iter_0000003")
        state = {key: value for key, value in state.items() if torch.is_tensor(value) and "_extra" not in key}
        state = weights.translate(weights.stack_experts(dict(weights._number_layers(state))), args)
        assert state.keys() == found.keys()
        for key, value in state.items():
            assert torch.equal(value, found[key]), key


def load(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    if hasattr(
        model.model, "rotary_emb"
    ):  # a buffer that transformers makes anew by what a CPU test replaced
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def attempt(numbers, originals, folder):
    """Run mutations; returns how many were refused and how many gave a right result."""
    gpt.start()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    counts, failures = [0, 0], []
    for number in numbers:
        here = folder / str(number)
        here.mkdir()
        mutation = Mutation(number, originals, here)
        before = sorted(here.iterdir())
        try:
            said = mutation.run(here / "out")
            counts[said is None] += 1
            if said is None:
                mutation.check(here / "out")
            else:
                assert str(mutation.load) in said and len(said.splitlines()) == 1, said
                assert re.search("|".join(mutation.names), said), said
                assert sorted(here.iterdir()) == before, "something was written"
        except BaseException as error:
            line = (str(error).splitlines() or [""])[0]
            failures.append(f"{number}: {mutation.what}: {type(error).__name__}: {line}")
        shutil.rmtree(here)
    return counts, failures


def test_a_mutated_file_gives_an_error_that_names_it_or_the_right_result(run_ranks, originals, tmp_path):
    (refused, right), failures = run_ranks(1, attempt, range(100), originals, tmp_path)[0]
    assert not failures, "\n".join(failures)
    assert refused > 40 and right > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 20))
def test_many_mutated_files(run_ranks, originals, tmp_path, part):
    numbers = range(100 * part, 100 * (part + 1))
    counts, failures = run_ranks(1, attempt, numbers, originals, tmp_path, timeout=290)[0]
    print(part, counts)
    assert not failures, "\n".join(failures)
