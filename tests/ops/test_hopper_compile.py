"""NVRTC compiles the kernels for Hopper as the product asks it to; this needs no GPU."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mhc.ops.hopper import compile, pre, pre_backward
from megatron_mhc.ops.options import Options, ReadNorm

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the packages cuda-bindings and NVRTC")
try:
    nvrtc.nvrtcVersion()
except Exception as missing:  # whatever the loader of that version raises
    pytest.skip(f"NVRTC: {missing}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
# One slice or many, of whole boxes or not, up to as many as a launch may have; with many a warp of `middle`
# takes one token at a time.
WIDTHS = [16, 48, 1040, 2560, 4096, 7168, 8448]
CALLS = ["pre", "pre_mix", "pre_backward", "pre_backward_df"]


@pytest.fixture
def asked(monkeypatch):
    """`asked(call, channels, ...)` is what a call on an H100 asks `compile.kernel` for."""

    plans = {module: module._plan.__wrapped__ for module in (pre, pre_backward)}

    def asked(call, channels, tokens=4096, v4=False, iterations=20, norm=None):
        found = []

        class Found:
            def plan(self, *args):
                return self

            def launch(self, *args):
                pass

        def kernel(source, device, shared, **defines):
            found.append((source.path, dict(SHARED=shared, **source.constants, **defines)))
            return Found()

        for module in (pre, pre_backward):
            monkeypatch.setattr(module, "kernel", kernel)
            monkeypatch.setattr(module, "raw_stream", lambda device: 0)
            monkeypatch.setattr(module, "_plan", plans[module])
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        x, f = torch.empty(tokens, 4, channels, dtype=BF16), torch.empty(tokens, channels, dtype=BF16)
        weight, affine, saved = torch.empty(24, 4 * channels), torch.empty(27), torch.empty(tokens, 25)
        options = Options(1e-6, iterations, v4)
        norm = norm and ReadNorm(torch.empty(channels, dtype=norm), 1e-5, False)
        if call == "pre":
            pre.pre_forward(x, weight, affine, options, norm=norm)
        elif call == "pre_mix":
            pre.post_res_pre(x, f, saved[:, :24], None, weight, affine, options, norm=norm)
        else:
            writer = (saved, affine) if call == "pre_backward_df" else None
            g, dl = torch.empty_like(x), torch.empty_like(f)
            more = dict(writer=writer, norm=norm, norm_saved=None)
            pre_backward.pre_backward(x, g, f, dl, weight, affine, saved, options, **more)
        return found[0]

    return asked


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("channels", [48, 4096])
@pytest.mark.parametrize("call", CALLS)
def test_a_variant_compiles_and_its_layout_is_what_python_says(asked, call, channels, v4):
    source, defines = asked(call, channels, v4=v4)
    assert compile.cubin(source, **defines)[:4] == b"\x7fELF"


@pytest.mark.parametrize("norm", [BF16, torch.float32])
@pytest.mark.parametrize("call", ["pre_mix", "pre_backward_df"])
def test_a_variant_with_a_norm_compiles(asked, call, norm):
    source, defines = asked(call, 4096, norm=norm)
    assert compile.cubin(source, **defines)[:4] == b"\x7fELF"


def test_a_norm_of_another_dtype_is_refused(asked):
    with pytest.raises(ValueError, match="the norm's weight is torch.float16, not"):
        asked("pre", 48, norm=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, BF16, torch.float32])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("call", CALLS)
def test_every_variant_compiles(asked, call, channels, norm):
    for tokens, v4, iterations in itertools.product((1, 4096), (False, True), (1, 20, 64)):
        source, defines = asked(call, channels, tokens, v4, iterations, norm)
        assert compile.cubin(source, **defines)


@pytest.mark.parametrize("call", ["pre", "pre_mix", "pre_backward"])
def test_a_layout_that_python_and_cuda_disagree_on_is_refused(asked, call):
    source, defines = asked(call, 4096)
    with pytest.raises(RuntimeError, match=r"memory\(\) of pre\w*.py lays out otherwise"):
        compile.cubin(source, **defines | dict(SHARED=defines["SHARED"] - 64))
    with pytest.raises(RuntimeError, match="every warp has a role"):
        compile.cubin(source, **defines | dict(THREADS=480))
    with pytest.raises(RuntimeError, match="an atom has four words"):
        compile.cubin(source, **defines | dict(PART=defines["PART"] + 4))


def test_an_error_names_the_file_and_its_line(asked, monkeypatch, tmp_path):
    for path in compile.HERE.glob("*.cu*"):
        shutil.copy(path, tmp_path)
    header = tmp_path / "sinkhorn.cuh"
    lines = header.read_text().splitlines()
    header.write_text("\n".join([*lines, "int broken = ;"]))
    monkeypatch.setattr(compile, "HERE", tmp_path)
    source, defines = asked("pre", 48)
    place = rf"sinkhorn.cuh\({len(lines) + 1}\)"
    with pytest.raises(RuntimeError, match=f"{place}: error: expected an expression"):
        compile.cubin(tmp_path / source.name, **defines)


def test_nothing_is_compiled_twice(asked, monkeypatch):
    """Neither for a second call nor for a second GPU, of which `cubin` does not know."""
    made, original = [], nvrtc.nvrtcCreateProgram
    monkeypatch.setattr(nvrtc, "nvrtcCreateProgram", lambda *args: (made.append(0), original(*args))[1])
    compile.cubin.cache_clear()
    for _ in range(2):
        source, defines = asked("pre", 48)
        compile.cubin(source, **defines)
    assert len(made) == 1


@pytest.mark.parametrize("header", sorted(compile.HERE.glob("*.cuh")), ids=lambda path: path.name)
def test_a_header_includes_what_it_needs(asked, tmp_path, header):
    defines = asked("pre", 48)[1] | asked("pre_backward", 48)[1]
    (tmp_path / "alone.cu").write_text(f'#include "{header.name}"\n' * 2)
    assert compile.cubin(tmp_path / "alone.cu", **defines)


def test_a_build_with_marks_compiles(asked):
    """As benchmarks/hopper_stages.py does."""
    for call in CALLS:
        source, defines = asked(call, 48)
        assert compile.cubin(source, MARKS=256, MARKED=128, POINTS=11, **defines)
