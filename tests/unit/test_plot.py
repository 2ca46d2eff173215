"""Figures and comparisons of logs whose numbers are known: gaps, tables, seeds, resumed runs, figures."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import loss_compare  # noqa: E402


def of_stability(name):
    """A script of examples/stability, as a module."""
    path = SCRIPTS.parent / "examples/stability" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"stability_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stability_run, stability_report = of_stability("run"), of_stability("report")

from megatron_mhc import MHCConfig, plot, run_logs  # noqa: E402
from megatron_mhc.arguments import add_mhc_args  # noqa: E402
from megatron_mhc.diagnostics.report import KINDS  # noqa: E402


def write_run(folder: Path, losses: dict[int, float], gains: dict[int, list[float]] | None = None) -> Path:
    """A TensorBoard folder with losses, gradient norms of 1 and, by step, composite gains of sub-layers."""
    writer = SummaryWriter(str(folder))
    for step, loss in losses.items():
        writer.add_scalar("lm loss", loss, step)
        writer.add_scalar("grad-norm", 1.0 + step, step)
    writer.add_scalar("lm loss validation", 9.0, max(losses))
    for step, values in (gains or {}).items():
        for name in ("gain", "composite_gain"):
            for direction in ("forward", "backward"):
                writer.add_scalar(f"mhc/{name}_{direction}", max(values), step)
                for i, value in enumerate(values):
                    part = ("attention", "mlp")[i % 2]
                    writer.add_scalar(f"mhc/{name}_{direction}/layer_{i // 2 + 1:03d}_{part}", value, step)
        matrices = [[[1.0, 2.0], [-3.0, 4.0]]] * len(values)
        writer.add_tensor("mhc/h_res", torch.tensor(matrices), step)
        writer.add_tensor("mhc/composite", torch.tensor(matrices), step)
    writer.close()
    return folder


STEPS = range(1, 11)


@pytest.fixture
def runs(tmp_path):
    """Two seeds of a reference whose loss is 10 - step + seed, and of a model that is 0.5 and 0.7 below."""
    folders = []
    for seed in (0, 1):
        plain = {step: 10.0 - step + seed for step in STEPS}
        lower = {step: value - 0.5 - 0.2 * seed for step, value in plain.items()}
        folders.append(f"plain={write_run(tmp_path / f'plain{seed}', plain)}")
        gains = {5: [1.0, 2.0, 3.0, 4.0], 10: [10.0, 20.0, 30.0, 40.0]}
        folders.append(f"mHC={write_run(tmp_path / f'mhc{seed}', lower, gains)}")
    return folders


def test_reports_are_read_back_by_step_and_sublayer(runs):
    run = run_logs.read_run(runs[1])
    assert run.label == "mHC" and sorted(run.reports) == [5, 10]
    assert run.report(5)["statistics"]["composite_gain_forward"] == [1.0, 2.0, 3.0, 4.0]
    assert run.report()["statistics"]["gain_backward"] == [10.0, 20.0, 30.0, 40.0]
    assert run.report()["h_res"] == [[[1.0, 2.0], [-3.0, 4.0]]] * 4
    with pytest.raises(SystemExit, match=r"no diagnostics of step 7; there are \[5, 10\]"):
        run.report(7)
    with pytest.raises(SystemExit, match="train with --mhc-log-interval"):
        run_logs.read_run(runs[0]).report()


def test_a_resumed_run_counts_each_step_once(tmp_path):
    folder = write_run(tmp_path / "run", {step: 1.0 for step in STEPS})
    later = SummaryWriter(str(folder), filename_suffix=".resumed")
    for step in range(6, 13):
        later.add_scalar("lm loss", 2.0, step)
    later.close()
    losses = run_logs.series(run_logs.read_run(str(folder)), "lm loss")
    assert losses == {step: 1.0 if step < 6 else 2.0 for step in range(1, 13)}


def test_gaps_are_between_runs_of_one_seed(runs):
    groups = run_logs.by_label(map(run_logs.read_run, runs))
    first, second = run_logs.losses_minus(groups["mHC"], groups["plain"])
    assert first == pytest.approx(dict.fromkeys(STEPS, -0.5), abs=1e-6)
    assert second == pytest.approx(dict.fromkeys(STEPS, -0.7), abs=1e-6)
    # One run against two: their mean, half a unit above the first seed.
    (alone,) = run_logs.losses_minus(groups["mHC"][:1], groups["plain"])
    assert alone == pytest.approx(dict.fromkeys(STEPS, -1.0), abs=1e-6)


def test_smoothing_is_a_trailing_mean():
    assert run_logs.smooth([1.0, 2.0, 6.0, 0.0], 2) == [1.0, 1.5, 4.0, 3.0]


def test_band_is_where_all_curves_are():
    steps, mean, low, high = run_logs.mean_and_range([{1: 1.0, 2: 4.0}, {2: 2.0, 3: 9.0}])
    assert (steps, mean, low, high) == ([2], [3.0], [2.0], [4.0])


def test_table_has_the_numbers(runs):
    rows = loss_compare.compare(
        run_logs.by_label(map(run_logs.read_run, runs)), "plain", window=2, tag="lm loss"
    )
    plain, mhc = rows
    # Last two steps: 1 and 0 plus the seed.
    assert plain["loss"] == pytest.approx(1.0) and plain["loss_std"] == pytest.approx(0.5**0.5)
    assert mhc["gap"] == pytest.approx(-0.6, abs=1e-6)
    assert mhc["gap_std"] == pytest.approx(0.02**0.5, abs=1e-6)
    assert plain["gap"] is None and plain["validation"] == 9.0 and plain["largest_gradient_norm"] == 11.0
    lines = loss_compare.table(rows).splitlines()
    assert lines[2].startswith("| plain | 2 | 10 | 1.0000 ± 0.7071 | - | 9.0000 | 11.00 |")
    assert "| -0.6000 ± 0.1414 |" in lines[3]


def test_sublayers_of_every_kind_are_read_back_in_the_order_in_which_they_run(tmp_path):
    """Those of a HybridModel, one a layer, and of multi-token prediction behind the decoder's."""
    kinds = sorted(KINDS.values())
    names = [f"layer_{layer:03d}_{kind}" for layer, kind in enumerate(kinds, start=998)]
    names += ["mtp_001_attention", "mtp_001_mlp", "mtp_002_attention", "mtp_002_mlp"]
    writer = SummaryWriter(str(tmp_path))
    for place, name in reversed(list(enumerate(names))):
        writer.add_scalar(f"mhc/gain_forward/{name}", float(place), 7)
    writer.close()
    report = run_logs.read_run(str(tmp_path)).report()
    assert report["sublayers"] == names
    assert report["statistics"]["gain_forward"] == list(range(len(names)))


def test_losses_are_compared_at_a_step_that_all_have(monkeypatch, runs, tmp_path):
    out = tmp_path / "gap.png"
    run_script(monkeypatch, loss_compare, *runs, "--until", "4", "--window", "1", "--out", str(out))
    plain, mhc = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert plain["steps"] == mhc["steps"] == 4 and plain["loss"] == pytest.approx(6.5)
    assert plain["largest_gradient_norm"] == 5.0 and plain["validation"] is None


def test_stability_report_takes_in_unfinished_runs(tmp_path):
    gains = {4: [2.0, 3.0], 8: [5.0, 4.0]}
    write_run(tmp_path / "plain_seed1/tensorboard", {step: 10.0 - step for step in range(1, 11)})
    write_run(tmp_path / "mhc_seed1/tensorboard", {step: 9.5 - step for step in range(1, 9)}, gains)
    write_run(tmp_path / "hc_seed1/tensorboard", {1: 9.0})  # ended before its first diagnostics
    command = [sys.executable, str(SCRIPTS.parent / "examples/stability/report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hc_seed1/tensorboard: nothing logged yet, left out" in done.stdout
    plain, mhc = json.loads((tmp_path / "figures/summary.json").read_text())
    assert plain["steps"] == [10] and mhc["steps"] == [8] and mhc["peak_composite_gain_forward"] == 5.0
    rows = json.loads((tmp_path / "figures/loss_gap.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [8, 8] and rows[1]["gap"] == pytest.approx(-0.5)
    assert {"gains.png", "heatmaps.png", "curves.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}


def test_the_stability_experiment_has_every_form_and_a_label_of_it(tmp_path):
    """A form that report.py does not know would be trained and left out of the figures."""
    models = {"plain", "hc", "mhc", "single_pass", "identity", "gated"}
    assert set(stability_run.MODELS) == set(stability_report.LABELS) == models
    forms = {}
    for model, words in stability_run.MODELS.items():
        parser = argparse.ArgumentParser()
        add_mhc_args(parser)
        parser.add_argument("--no-mhc", action="store_true")
        args = parser.parse_args(words)
        forms[model] = None if args.no_mhc else MHCConfig.from_args(args)
    assert forms["identity"].h_res == "identity" and forms["gated"].is_gated
    for model in models:
        gains = None if model == "plain" else {4: [1.0, 1.0]}
        write_run(tmp_path / f"{model}_seed1/tensorboard", {1: 9.0, 4: 8.0}, gains)
    found = [argument.partition("=")[0] for argument in stability_report.started(tmp_path)]
    assert found == [stability_report.LABELS[model] for model in stability_run.MODELS]


def run_script(monkeypatch, module, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def test_every_figure_is_drawn(monkeypatch, runs, tmp_path, capsys):
    for suffix in ("png", "pdf"):
        run_script(monkeypatch, plot, "gains", *runs, "--out", str(tmp_path / f"g.{suffix}"))
        assert "plain: no mHC diagnostics, left out" in capsys.readouterr().out
        run_script(monkeypatch, plot, "heatmaps", runs[1], "--out", str(tmp_path / f"h.{suffix}"))
        curves = ["curves", *runs, "--reference", "plain", "--out", str(tmp_path / f"c.{suffix}")]
        run_script(monkeypatch, plot, *curves)
        run_script(monkeypatch, loss_compare, *runs, "--out", str(tmp_path / f"l.{suffix}"))
        for name in "ghcl":
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 5000
    assert json.loads((tmp_path / "l.json").read_text())["rows"][1]["gap"] == pytest.approx(-0.6, abs=1e-6)


def test_a_measured_report_is_drawn_like_a_log(monkeypatch, tmp_path):
    gains = {
        f"{kind}_{d}": [1.0, 2.0] for kind in ("gain", "composite_gain") for d in ("forward", "backward")
    }
    matrices = [[[0.5, 0.5], [0.5, 0.5]]] * 2
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"statistics": gains, "h_res": matrices, "composite": matrices}))
    for kind in ("gains", "heatmaps"):
        run_script(monkeypatch, plot, kind, f"x={report}", "--out", str(tmp_path / f"{kind}.png"))
        assert (tmp_path / f"{kind}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "words, message",
    [
        (["curves", "RUN", "--reference", "other", "--out", "x.png"], "--reference other: no such label"),
        (["gains", "/nowhere", "--out", "x.png"], "/nowhere: no TensorBoard events there"),
        (["heatmaps", "RUN", "--sublayers", "9", "--out", "x.png"], "--sublayers 9: there are 1 to 4"),
        (["gains", "RUN", "--out", "x.jpeg"], r"ends in .png or .pdf"),
    ],
)
def test_mistakes_are_named(monkeypatch, runs, words, message):
    words = [runs[1] if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, plot, *words)


def test_loss_compare_needs_two_labels(runs):
    command = [sys.executable, str(SCRIPTS / "loss_compare.py"), runs[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "at least two labels" in done.stderr


def test_plot_is_a_module_of_the_package(tmp_path):
    command = [sys.executable, "-m", "megatron_mhc.plot", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "python -m megatron_mhc.plot heatmaps" in done.stdout, done.stderr
    imports = (
        "import sys, megatron_mhc.plot; assert not {'torch', 'megatron', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", imports], check=True)


def test_a_folder_that_is_made_is_named(monkeypatch, runs, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    run_script(monkeypatch, plot, "heatmaps", runs[1], "--out", str(folder / "h.png"))
    assert capsys.readouterr().out == f"made the folder {folder}\n{folder}/h.png\n"
    run_script(monkeypatch, plot, "heatmaps", runs[1], "--out", str(folder / "h.png"))
    assert capsys.readouterr().out == f"{folder}/h.png\n"


def test_a_heatmap_names_its_streams_and_its_colours():
    plt = run_logs.pyplot()
    figure, axes = plt.subplots()
    # Stream 1 reads 1 and 2; stream 2 reads -3 and 4: rows are written, columns are read.
    plot.draw_matrix(axes, [[1.0, 2.0], [-3.0, 4.0]], "title")
    assert "stream written" in axes.get_ylabel() and "row" in axes.get_ylabel()
    assert "stream read" in axes.get_xlabel() and "column" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1: Σ 3.00", "2: Σ 1.00"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\nΣ -2.00", "2\nΣ 6.00"]
    image, bar = axes.images[0], figure.axes[1]
    assert bar.get_ylim() == (image.norm.vmin, image.norm.vmax) == (-4.0, 4.0)
    plt.close(figure)
