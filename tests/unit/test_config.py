"""Options: defaults, doors, and errors that name flag, value and remedy."""

import argparse
import dataclasses
import math
import subprocess
import sys
from random import Random

import pytest

from megatron_mhc.arguments import add_mhc_args
from megatron_mhc.config import MHCConfig


def test_defaults_are_the_papers():
    mhc = MHCConfig()
    assert (mhc.num_residual_streams, mhc.sinkhorn_iterations, mhc.init_gating_factor) == (4, 20, 0.01)
    assert (mhc.preset, mhc.h_res, mhc.contract) == ("paper", "sinkhorn", "mean")
    assert MHCConfig(preset="deepseek_v4").contract == "learned_head"
    assert (mhc.read, MHCConfig(read="previous").contract) == ("current", "h_pre")
    v41 = MHCConfig(preset="deepseek_v41")
    assert (v41.read, v41.contract, v41.has_deepseek_form) == ("previous", "h_pre", True)
    gated = MHCConfig(preset="qwen4_exp")
    assert (gated.h_res, gated.contract, gated.gated_rank) == ("identity", "mixer", 320)
    assert MHCConfig.from_options(gated.to_options()) == gated
    assert (mhc.init, mhc.post_magnitude) == ("home_stream", 2.0)
    assert mhc.pp_boundary == MHCConfig(pipeline_schedule="fused").pp_boundary == "whole"
    assert MHCConfig(pipeline_schedule="auto").pp_boundary == "auto"
    assert MHCConfig(pipeline_schedule="auto", pp_boundary="split").pp_boundary == "split"


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(num_residual_streams=0),
            "--mhc-num-residual-streams=0: give a whole number, at least 1 (default",
        ),
        (dict(num_residual_streams=True), "--mhc-num-residual-streams=True: give a whole number"),
        (dict(num_residual_streams=2**31), "--mhc-num-residual-streams=2147483648: give a whole number"),
        (dict(sinkhorn_iterations=20.9), "--mhc-sinkhorn-iterations=20.9: give a whole number, at least 1"),
        (dict(sinkhorn_iterations=None), "--mhc-sinkhorn-iterations=None: give"),
        (dict(preset="deepseek"), "--mhc-preset='deepseek': give one of paper, deepseek_v4,"),
        (dict(h_res=["sinkhorn"]), "--mhc-h-res=['sinkhorn']: give one of auto, sinkhorn, identity"),
        (
            dict(preset="qwen4_exp", h_res="sinkhorn"),
            "--mhc-h-res=sinkhorn has no form in --mhc-preset=qwen4",
        ),
        (dict(preset="qwen4_exp", h_pre="fixed"), "channel: use --mhc-h-pre=dynamic, or --mhc-preset=paper"),
        (dict(preset="qwen4_exp", h_post="fixed"), "its own: use --mhc-h-post=dynamic"),
        (dict(preset="qwen4_exp", init="uniform"), "--mhc-init=uniform has no form in"),
        (dict(preset="qwen4_exp", norm="folded"), "no norm in front of F: use --mhc-norm=apart"),
        (dict(preset="qwen4_exp", load_dense=True), "--mhc-load-dense=True has no form in"),
        (dict(preset="qwen4_exp", backend="triton"), "which has no kernels: use --mhc-backend=auto"),
        (
            dict(preset="qwen4_exp", recompute_layer_num="auto"),
            "give back: add --mhc-recompute-coefficients",
        ),
        (dict(contract="mixer"), "--mhc-contract=mixer belongs to --mhc-preset=qwen4_exp: add that, or drop"),
        (dict(gated_rank=64), "--mhc-gated-rank=64 belongs to --mhc-preset=qwen4_exp: add that, or drop"),
        (dict(preset="qwen4_exp", gated_rank=0), "--mhc-gated-rank=0: give a whole number, at least 1"),
        (dict(init_gating_factor=-1.0), "--mhc-init-gating-factor=-1.0: give a finite number, at least 0"),
        (dict(init_gating_factor=10**400), "--mhc-init-gating-factor=1000"),
        (dict(norm_eps=0.0), "--mhc-norm-eps=0.0: give a finite number, above 0 (default 1e-06)"),
        (dict(norm_eps=math.inf), "--mhc-norm-eps=inf: give a finite number"),
        (dict(alarm_gain=math.inf), "--mhc-alarm-gain=inf: give a finite number, above 1"),
        (dict(alarm_logit=math.nan), "--mhc-alarm-logit=nan: give a finite number, above 0"),
        (dict(load_dense=object), "--mhc-load-dense=<class 'object'>: give true or false (default False)"),
        (dict(preset="deepseek_v4", h_res="unconstrained"), "use --mhc-preset=paper"),
        (dict(preset="deepseek_v41", h_res="unconstrained"), "has no deepseek_v41 form: use --mhc-preset"),
        (
            dict(preset="deepseek_v41", read="current"),
            "contradicts --mhc-preset=deepseek_v41: use deepseek_v4",
        ),
        (dict(read="previous", h_pre="fixed"), "with --mhc-h-pre=fixed hands on nothing: drop one"),
        (dict(contract="library", mtp="multistream"), "contraction of its own: use --mhc-mtp=single"),
        (dict(read="previous", mtp="multistream"), "first read takes; use --mhc-mtp=single"),
        (dict(preset="qwen4_exp", mtp="multistream"), "between streams: use --mhc-mtp=single, or"),
        (dict(contract="h_pre"), "--mhc-contract=h_pre needs weights that no sub-layer reads with: add"),
        (
            dict(preset="hy_v4", h_res="unconstrained"),
            "--mhc-h-res=unconstrained has no hy_v4 form: use --mhc-preset=paper",
        ),
        (
            dict(preset="hy_v4", h_res="sinkhorn"),
            "--mhc-h-res=sinkhorn is not hy_v4's, which has identity: leave it out, or use --mhc-preset=dee",
        ),
        (dict(preset="hy_v4", h_post="fixed"), "--mhc-h-post=fixed is not hy_v4's, which has dynamic"),
        (dict(preset="hy_v4", contract="mean"), "--mhc-contract=mean is not hy_v4's, which has learned_head"),
        (
            dict(preset="glm_5_3", h_res="identity"),
            "--mhc-h-res=identity is not glm_5_3's, which has sinkhorn",
        ),
        (dict(preset="glm_5_3", h_pre="fixed"), "--mhc-h-pre=fixed is not glm_5_3's, which has dynamic"),
        (
            dict(preset="glm_5_3", contract="learned_head"),
            "--mhc-contract=learned_head is not glm_5_3's, which has mean: leave it out, or use --mhc-pre",
        ),
        (
            dict(preset="glm_5_3", post_magnitude=1.0),
            "--mhc-post-magnitude=1.0 belongs to hy_v4, glm_5_3 has 2.0: leave it out, or use --mhc-preset",
        ),
        (dict(preset="hy_v4", post_magnitude=0.0), "--mhc-post-magnitude=0.0: give a finite number, above 0"),
        (dict(alarm="stop"), "add --mhc-log-interval=100"),
        (dict(recompute_coefficients=True), "add --mhc-recompute-layer-num=auto"),
    ],
)
def test_wrong_value_names_flag_value_and_remedy(options, words):
    with pytest.raises(ValueError) as error:
        MHCConfig(**options)
    assert words in str(error.value)


def test_a_preset_implies_the_form_of_its_model():
    said = {
        name: (m.h_res, m.h_pre, m.h_post, m.contract, m.init, m.post_eps, m.has_deepseek_form, m.parts)
        for name in ("glm_5_3", "hy_v4")
        for m in [MHCConfig(preset=name)]
    }
    dynamic = ("dynamic", "dynamic")
    parts = {"pre": 4, "post": 4}
    glm = ("sinkhorn", *dynamic, "mean", "home_stream", 0.0, True, parts | {"res": 16})
    assert said == {
        "glm_5_3": glm,
        "hy_v4": ("identity", *dynamic, "learned_head", "mean_read", 1e-6, True, parts),
    }
    spelled = MHCConfig(preset="hy_v4", h_res="identity", contract="learned_head", post_magnitude=1.5)
    assert MHCConfig.from_options(spelled.to_options()) == spelled
    assert MHCConfig(preset="hy_v4", init="home_stream").init == "home_stream"


def test_options_round_trip_through_every_door(tmp_path, monkeypatch):
    want = MHCConfig(num_residual_streams=2, preset="deepseek_v4", init="uniform", load_dense=True)
    assert MHCConfig.from_options(want.to_options()) == want

    file = tmp_path / "mhc.yaml"
    file.write_text("num-residual-streams: 2\npreset: deepseek_v4\ninit: uniform\nload_dense: true\n")
    monkeypatch.setenv("MEGATRON_MHC", str(file))
    assert MHCConfig.from_environment() == want

    flags = "--mhc-num-residual-streams 2 --mhc-preset deepseek_v4 --mhc-init uniform --mhc-load-dense"
    parser = add_mhc_args(argparse.ArgumentParser())
    assert MHCConfig.from_args(parser.parse_args(flags.split())) == want
    assert MHCConfig.from_args(parser.parse_args([])) == MHCConfig()


@pytest.mark.parametrize(
    "text, words",
    [
        ("streams=4", "MEGATRON_MHC: no mHC option 'streams'; there are num_residual_streams, preset, "),
        ("num_residual_streams=four", "MEGATRON_MHC: num_residual_streams='four': give a whole number"),
        ("sinkhorn_iterations=20.9", "MEGATRON_MHC: sinkhorn_iterations='20.9': give a whole number"),
        ("norm_eps=1e400", "MEGATRON_MHC: norm_eps='1e400': give a finite number"),
        ("load_dense=maybe", "MEGATRON_MHC: load_dense='maybe': give true or false"),
        ("alarm=warn", "MEGATRON_MHC: alarm=warn looks at logging steps only: add log_interval=100"),
        ("preset=", "MEGATRON_MHC: preset='': give one of paper, deepseek_v4"),
        ("4", "'4' is not key=value"),
        ("init=uniform,init=home_stream", "init is given twice, 'uniform' and 'home_stream': drop one"),
        ("log-interval=2,log_interval=2", "log_interval is given twice, '2' and '2': drop one"),
        ("/nowhere/mhc.yaml", "No such file or directory: '/nowhere/mhc.yaml'; give a YAML file of"),
        ("nul\0.yaml", "give a YAML file of"),
    ],
)
def test_wrong_options_text_is_refused_in_its_own_spelling(text, words):
    with pytest.raises(ValueError) as error:
        MHCConfig.from_options(text)
    assert words in str(error.value) and "--mhc" not in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"num_residual_streams: yes", "num_residual_streams='yes': give a whole number, at least 1"),
        (b"sinkhorn_iterations: 20.9", "sinkhorn_iterations='20.9': give a whole number"),
        (b"alarm_gain: .inf", "alarm_gain='.inf': give a finite number"),
        (b"init: uniform\ninit: home_stream", "init is given twice"),
        (b"log-interval: 1\nlog_interval: 2", "log_interval is given twice, '1' and '2': drop one"),
        (b"preset: null", "preset='null': give one of"),
        (b"preset:", "preset='': give one of"),
        (b"init: uniform\npreset: [paper]", "line 2, column 9; give a YAML file of"),
        (b"? [preset]\n: paper", "line 1, column "),
        (b"- preset", "line 1, column "),
        (b"preset", "line 1, column "),
        (b"preset: 'paper", "while scanning a quoted scalar"),
        (b"init: uniform\n--- {}", "but found another document"),
        (b'preset: "\\UFFFFFFFF"', "give a YAML file of `option: value` lines, or key=value,..."),
        (b"preset: \xff", "give a YAML file of"),
        (b"[" * 5000, "give a YAML file of"),
        (b"!!python/object/apply:os.getcwd []", "line 1, column "),
    ],
)
def test_wrong_yaml_is_refused(tmp_path, content, words):
    file = tmp_path / "mhc.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        MHCConfig.from_options(str(file))
    assert words in str(error.value) and str(file) in str(error.value)


def test_a_folder_is_no_yaml_file(tmp_path):
    folder = tmp_path / "mhc.yaml"
    folder.mkdir()
    with pytest.raises(ValueError, match="Is a directory.*; give a YAML file"):
        MHCConfig.from_options(str(folder))


def test_yaml_says_off_and_yes_as_the_options_do(tmp_path):
    file = tmp_path / "mhc.yaml"
    file.write_text("recompute_layer_num: off\nalarm: off\nload_dense: yes\nnorm_eps: 1e-5\n")
    assert MHCConfig.from_options(str(file)) == MHCConfig(load_dense=True, norm_eps=1e-5)
    assert MHCConfig.from_mapping({"alarm": False, "recompute_layer_num": False}) == MHCConfig()
    file.write_text("")
    assert MHCConfig.from_options(str(file)) == MHCConfig()


@pytest.mark.parametrize("options", [["preset"], None, "preset=paper", {4: "paper"}, {None: 1}])
def test_what_maps_no_options_is_refused(options):
    with pytest.raises(ValueError, match="^here: "):
        MHCConfig.from_mapping(options, "here")


@pytest.mark.parametrize(
    "name, text", [("norm-eps", "inf"), ("sinkhorn-iterations", "20.9"), ("recompute-layer-num", "many")]
)
def test_the_command_line_names_what_a_flag_takes(name, text, capsys):
    with pytest.raises(SystemExit):
        add_mhc_args(argparse.ArgumentParser()).parse_args([f"--mhc-{name}", text])
    assert f"--mhc-{name}='{text}': give " in capsys.readouterr().err


ODD = [None, True, False, 0, 1, -1, 4, 20.9, 2**31, 10**400, 1e-6, math.inf, -math.inf, math.nan, b"4", 1j]
ODD += [
    [],
    ["paper"],
    {},
    {"a": 1},
    (),
    object(),
    object,
    "",
    " ",
    "0",
    "1",
    "4",
    "-1",
    "20.9",
    "1e-3",
    "1e400",
]
ODD += [
    "nan",
    "inf",
    "off",
    "on",
    "yes",
    "no",
    "auto",
    "true",
    "None",
    "null",
    "9" * 5000,
    "\u0664",
    "\ud800",
    "a,b",
]
ODD += ["mean=sum", "--mhc-preset", "[", "{a: b}", "&a *a", "'", '"\\x"', "#", "!!int 4", "\x00", "\t", "1_0"]
REMEDIES = ("give ", "add ", "use ", "drop ", "there are ", "is not key=value", "does not map options")


def some_options(random):
    """Names and values, right and wrong, some names twice in two spellings."""
    options = random.choices(dataclasses.fields(MHCConfig), k=random.randint(0, 4))
    pairs = []
    for option in options:
        right = [option.default, str(option.default), *option.metadata["choices"]]
        name = random.choice(
            [option.name] * 8 + [option.name.replace("_", "-")] * 2 + ["", option.name.upper()]
        )
        pairs.append((name, random.choice(right + random.sample(ODD, 3))))
    return pairs


def as_bytes(text, random):
    content = bytearray(text.encode(errors="surrogatepass"))
    if content and random.random() < 0.3:
        content[random.randrange(len(content))] = random.randrange(256)
    return bytes(content)


@pytest.mark.parametrize("door", ["constructor", "mapping", "text", "yaml"])
def test_any_options_make_a_valid_configuration_or_an_error_with_its_remedy(door, tmp_path):
    random, file, refused = Random(f"options by {door}"), tmp_path / "mhc.yaml", 0
    for _ in range(1000):
        pairs = some_options(random)
        try:
            if door == "constructor":
                pairs = [(name.lower().replace("-", "_") or "preset", value) for name, value in pairs]
                mhc, source = None, "--mhc-"
                mhc = MHCConfig(**dict(pairs))
            elif door == "mapping":
                source = "here: "
                mhc = MHCConfig.from_mapping(dict(pairs), "here")
            elif door == "text":
                source = "MEGATRON_MHC: "
                mhc = MHCConfig.from_options(",".join(f"{name}={value}" for name, value in pairs))
            else:
                source = str(file)
                file.write_bytes(as_bytes("".join(f"{name}: {value}\n" for name, value in pairs), random))
                mhc = MHCConfig.from_options(str(file))
        except ValueError as error:
            refused += 1
            assert source in str(error) and any(word in str(error) for word in REMEDIES), (pairs, str(error))
            continue
        for option in dataclasses.fields(mhc):
            value = getattr(mhc, option.name)
            assert type(value).__name__ == option.type and value not in (math.inf, -math.inf), pairs
        assert MHCConfig.from_options(mhc.to_options()) == mhc == dataclasses.replace(mhc)
    assert 200 < refused < 900


def test_checkpoints_store_the_options_that_change_the_arithmetic():
    assert MHCConfig(norm_eps=1e-5).arithmetic() == {
        "num_residual_streams": 4,
        "preset": "paper",
        "h_res": "sinkhorn",
        "h_pre": "dynamic",
        "h_post": "dynamic",
        "read": "current",
        "post_magnitude": 2.0,
        "sinkhorn_iterations": 20,
        "contract": "mean",
        "mtp": "single",
        "norm_eps": 1e-5,
    }
    gated = MHCConfig(preset="qwen4_exp", gated_rank=64).arithmetic()
    assert (gated["contract"], gated["gated_rank"]) == ("mixer", 64)


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_mhc; print({'torch', 'megatron'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
