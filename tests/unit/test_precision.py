"""FP8 and FP4 are accepted where machine and Transformer Engine have them, else refused at build time.

The machines are stand-ins.
"""

import re

import megatron.core.utils
import pytest
import torch
from megatron.core.enums import Fp4Recipe, Fp8Recipe
from megatron.core.transformer import TransformerConfig
from packaging.version import Version

from megatron_mhc import MHCConfig, parallel
from megatron_mhc.precision import NEEDS, recipe

ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)


def config(name, **settings):
    """A small TransformerConfig of this recipe; `settings` are set after its own checks."""
    out = TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=2)
    kind = dict(fp4="e2m1", fp4_recipe=name) if name == "nvfp4" else dict(fp8="hybrid", fp8_recipe=name)
    for key, value in (kind | settings).items():
        setattr(out, key, value)
    return out


@pytest.fixture
def machine(monkeypatch):
    def pretend(engine="2.9.0", capability=HOPPER, cuda="12.9"):
        monkeypatch.setattr(megatron.core.utils, "get_te_version", lambda: Version(engine))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability, raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return pretend


@pytest.mark.parametrize(
    "name, what",
    [
        ("delayed", dict(capability=ADA)),
        ("tensorwise", dict(capability=HOPPER)),
        ("blockwise", dict(capability=HOPPER)),
        ("blockwise", dict(capability=BLACKWELL, cuda="13.0")),
        ("mxfp8", dict(capability=BLACKWELL)),
        ("nvfp4", dict(capability=BLACKWELL)),
        ("mxfp8", dict(capability=None)),  # where a launch is planned, and not run
        ("mxfp8", dict(engine="0.0.0")),  # as on a login node
    ],
)
def test_a_recipe_is_accepted_where_the_machine_has_it(machine, name, what):
    machine(**what)
    parallel.validate(config(name), MHCConfig())


@pytest.mark.parametrize(
    "name, what, words",
    [
        (
            "delayed",
            dict(capability=(8, 0)),
            "--fp8-recipe delayed needs .* 8.9, these have 8.0: drop it",
        ),
        ("blockwise", dict(capability=ADA), "--fp8-recipe blockwise needs GPUs of compute capability 9.0"),
        (
            "blockwise",
            dict(cuda="12.8"),
            "needs CUDA 12.9, this PyTorch has 12.8: use --fp8-recipe",
        ),
        (
            "mxfp8",
            {},
            "--fp8-format hybrid --fp8-recipe mxfp8 needs .* 10.0, .* 9.0: use --fp8-recipe",
        ),
        ("nvfp4", {}, "--fp4-format e2m1 --fp4-recipe nvfp4 needs .* 10.0, .* 9.0: use --fp8-format"),
        ("nvfp4", dict(engine="2.6.0"), "needs Transformer Engine 2.7.0, here is 2.6.0: install it"),
        ("blockwise", dict(engine="2.2.0"), "needs Transformer Engine 2.3.0, here is 2.2.0"),
    ],
)
def test_a_recipe_is_refused_where_the_machine_lacks_it(machine, name, what, words):
    machine(**what)
    with pytest.raises(ValueError, match=words):
        parallel.validate(config(name), MHCConfig())


def test_linears_without_fp8_are_refused(machine):
    machine()
    with pytest.raises(ValueError, match="hybrid --fp8-recipe delayed with --transformer-impl local"):
        parallel.validate(config("delayed", transformer_impl="local"), MHCConfig())


def test_every_recipe_of_megatron_has_its_needs():
    names = [one.value for one in (*Fp8Recipe, *Fp4Recipe)]
    assert set(names) == set(NEEDS)
    assert [recipe(config(one.value, fp8_recipe=one)) for one in Fp8Recipe] == [
        one.value for one in Fp8Recipe
    ]
    assert recipe(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)) is None


def test_a_remedy_is_another_recipe_or_none():
    for needs in NEEDS.values():
        assert all(name in NEEDS for name in re.findall("--fp8-recipe ([a-z]+)", needs.instead))
