"""examples/quality on a CPU: which runs it plans and starts, what it keeps of them, and what it reports."""

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("tokenizers")  # transformers brings it

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "quality"


@pytest.fixture(scope="module")
def quality():
    """The example's modules by name; `run` and `report` are also names of other examples'."""
    names = ("plan", "logs", "data", "run", "results", "figures", "report")
    hidden = {name: sys.modules.pop(name, None) for name in (*names, "settings")}
    before = list(sys.path)
    sys.path[:0] = [str(FOLDER), str(ROOT / "examples" / "quickstart")]
    loaded = {}
    try:
        for name in names:
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
    finally:
        sys.path[:] = before
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return type("Quality", (), loaded)


def log_of(run, final, **more):
    """A kept log of a planned run."""
    log = dataclasses.asdict(run) | dict(name=run.name, reached=run.steps, finished=True, diverged=None)
    log |= dict(final=final, parameters=1_000_000, data="d", gains={}, device="CPU", versions={}, commit="c")
    log |= dict(loss=[[1, 3.0], [run.steps, 2.0]], gradient_norm=[[run.steps, 0.5]], validation=[])
    return log | dict(step_ms=10.0, date="2026-12-01", alone=True) | more


def finished(plan, scale, budget, loss, known=()):
    """Logs of all runs that can start, again and again until none is left; `loss` gives each run's end."""
    known = list(known)
    while True:
        there = {log["name"] for log in known}
        runs = [run for run in plan.plan(scale, budget, known) if run.name not in there and run.startable]
        if not runs:
            return known
        known += [log_of(run, loss(run)) for run in runs]


# The plan


def test_runs_have_names_of_their_own_and_each_form_sweeps_five_rates(quality):
    plan = quality.plan
    runs = plan.plan(plan.SCALES["full"], 20)
    assert len({run.name for run in runs}) == len(runs)
    for form in plan.FORMS:
        rates = {run.lr for run in runs if (run.study, run.form) == ("sweep", form)}
        assert len(rates) == 5, form
    small = plan.SIZES["30m"]
    assert runs[0].steps * small.batch * small.sequence >= 20 * small.parameters
    assert [run.name for run in runs[:2]] == ["30m-t20-vanilla-lr0.004-s1", "30m-t20-mhc4-lr0.004-s1"]
    parts = {run.form for run in runs if run.study in ("hc_parts", "mhc_parts", "streams")}
    assert parts == {"hc-res", "hc-res-pre", "mhc-res", "mhc-res-pre", "mhc1", "mhc8"}


def test_sizes_are_about_what_they_are_called(quality):
    for name, size in quality.plan.SIZES.items():
        assert size.parameters / 1e6 == pytest.approx(int(name.removesuffix("m")), rel=0.05)


def test_further_seeds_wait_for_the_whole_sweep_and_take_its_best_rate(quality):
    plan, scale = quality.plan, quality.plan.SCALES["full"]
    losses = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5, 8e-3: math.inf, 16e-3: math.inf}
    sweep = plan.sweep(scale, 20, "hc")
    logs = [log_of(run, losses[run.lr], diverged=9 if losses[run.lr] == math.inf else None) for run in sweep]

    def further(logs):
        return [run for run in plan.plan(scale, 20, logs) if (run.study, run.form) == ("seeds", "hc")]

    assert all(run.lr is None and run.waits_for == "the sweep of hc" for run in further(logs[:4]))
    assert {(run.lr, run.seed) for run in further(logs)} == {(2e-3, 2), (2e-3, 3)}
    parts = [run for run in plan.plan(scale, 20, logs) if run.study == "hc_parts"]
    assert {run.lr for run in parts} == {2e-3} and all(run.startable for run in parts)
    larger = [run for run in plan.plan(scale, 20, logs) if (run.size, run.form) == ("110m", "hc")]
    assert {run.lr for run in larger if run.study == "size"} == {0.00133}  # 2e-3 * 512 / 768


def test_runs_of_equal_time_have_the_steps_that_the_timings_say(quality):
    plan, scale = quality.plan, quality.plan.SCALES["tiny"]

    def loss(run):
        return 2.0

    known = finished(plan, scale, 20, loss)
    for log in known:
        if log["study"] == "timing":
            log["step_ms"] = 10.0 if log["form"] == "vanilla" else 16.0
    equal = [run for run in plan.plan(scale, 20, known) if run.study == "time"]
    steps = scale.sizes["tiny"].steps(20)
    assert equal and {run.steps for run in equal} == {round(steps * 10 / 16)}


def test_every_form_and_size_is_accepted_by_megatron(quality, tmp_path, run_ranks):
    run, plan = quality.run, quality.plan
    runs = run.Runs(run.parse(["--out", str(tmp_path), "--cpu"]))
    runs.about = {"held_out": {"tokens": 3_000_000}, "vocabulary": 8192}
    known = finished(plan, runs.scale, 20, lambda _: 2.0)
    every = {(one.size, one.form): one for one in plan.plan(runs.scale, 20, known) if one.study != "timing"}
    chosen = {key: one for key, one in every.items() if key[0] == "30m" or key[1] == "vanilla"}
    words = {"-".join(key): runs.arguments(one) for key, one in chosen.items()}
    options = run_ranks(1, parsed, words)[0]
    assert options.keys() == words.keys() and len(words) == len(plan.ALL_FORMS) + 2
    assert options["30m-hc-res"][:3] == (4, "unconstrained", "fixed")
    assert options["30m-single"][3] == "previous" and options["30m-mhc2u"][4] == "uniform"
    assert not any(words_of.count("--use-distributed-optimizer") for words_of in words.values())


def parsed(every):
    """The mHC options of each command line, by Megatron's parser and checks."""
    import os

    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    from megatron_mhc.config import MHCConfig
    from megatron_mhc.pretrain_gpt import add_args, check_args

    os.environ.update(RANK="0", WORLD_SIZE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    found = {}
    for name, words in every.items():
        sys.argv = ["pretrain_gpt", *words]
        args = parse_args(add_args)
        validate_args(args, {})
        check_args(args)
        args.padded_vocab_size = 8192
        core_transformer_config_from_args(args)
        mhc = MHCConfig.from_args(args)
        found[name] = (mhc.num_residual_streams, mhc.h_res, mhc.h_pre, mhc.read, mhc.init)
    assert dist.is_initialized()
    return found


# The text


def test_text_is_the_same_twice_and_holds_whole_packages_out(quality, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    data = quality.data
    first = data.prepare(tmp_path / "a", data.TINY)
    again = data.prepare(tmp_path / "b", data.TINY)
    assert first == again and first["packages"].keys() == {"pyyaml", "tqdm"}
    kept = data.prepare(tmp_path / "c", data.TINY, tmp_path / "a" / "tokenizer.json")
    assert kept["hash"] == first["hash"]
    assert first["held_out_packages"].keys() == {"packaging"}
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    held_out = IndexedDataset(str(tmp_path / "a" / "held_out"))
    tokens = held_out[0]
    assert tokens[-1] == data.TINY.vocabulary - 1 and tokens.max() == tokens[-1]
    import packaging

    texts = [path.read_text() for path in Path(packaging.__file__).parent.rglob("*.py")]
    assert tokenizer.decode(tokens[:-1].tolist()) in texts


# The runner


class Ended:
    """A process that has ended."""

    def __init__(self, status=0):
        self.status = status

    def poll(self):
        return self.status

    def send_signal(self, _):
        raise AssertionError("it has ended")


def printed(steps, reached=None, loss=2.0):
    """What Megatron would print of a run."""
    lines = [
        f" iteration {step:8}/{steps:8} | elapsed time per iteration (ms): 12.5 | lm loss: {loss:.6E} | "
        f"grad norm: 0.500 |"
        for step in range(1, (reached or steps) + 1)
    ]
    if reached in (None, steps):
        lines.append(f" validation loss at iteration {steps} on validation set | lm loss value: 2.2E+00 |")
        lines.append(f" validation loss at iteration {steps} on test set | lm loss value: 2.125000E+00 |")
    return "\n".join(lines) + "\n"


class Launcher:
    """In place of training: writes what `says` gives of a run's number of steps; keeps the order."""

    def __init__(self, says=printed, status=0):
        self.says, self.status, self.started = says, status, []

    def __call__(self, words, log, gpu):
        self.started.append(log.parent.name)
        with open(log, "a") as file:
            file.write(self.says(int(words[words.index("--train-iters") + 1])))
        return Ended(self.status)


def call(quality, out, launch, *more):
    base = ["--scale", "tiny", "--cpu", "--out", str(out), "--tokens-per-parameter", "0.1", "--poll", "0"]
    return quality.run.main([*base, *more], launch)


def test_a_call_trains_all_and_a_second_one_nothing(quality, tmp_path, capsys):
    first, second, other = Launcher(), Launcher(), Launcher()
    assert call(quality, tmp_path / "a", first) == 0
    plan = quality.plan
    known = quality.logs.read(tmp_path / "a" / "logs")
    every = [run.name for run in plan.plan(plan.SCALES["tiny"], 0.1, known)]
    assert sorted(first.started) == sorted(every) and not any("best" in name for name in every)
    assert {log["final"] for log in known if log["study"] != "timing"} == {2.125}
    assert call(quality, tmp_path / "a", second) == 0 and second.started == []
    # On another machine the kept logs stand for the runs.
    assert call(quality, tmp_path / "b", other, "--kept", str(tmp_path / "a" / "logs")) == 0
    assert other.started == []
    assert call(quality, tmp_path / "a", other, "--list") == 0
    assert "missing: 0.0 GPU hours" in capsys.readouterr().out


def test_logs_of_another_text_are_no_reason_to_leave_a_run_out(quality, tmp_path):
    call(quality, tmp_path / "a", Launcher())
    for path in (tmp_path / "a" / "logs").glob("*-t0.1-*.json"):
        path.write_text(path.read_text().replace('"data": "', '"data": "other'))
    other = Launcher()
    assert call(quality, tmp_path / "b", other, "--kept", str(tmp_path / "a" / "logs")) == 0
    assert "tiny-t0.1-vanilla-lr0.01-s1" in other.started


def test_a_run_of_a_new_text_reads_nothing_that_one_of_the_old_text_left(quality, tmp_path):
    name = "tiny-t0.1-vanilla-lr0.01-s1"
    assert call(quality, tmp_path, Launcher(), "--only", name) == 0
    path = tmp_path / "logs" / f"{name}.json"
    path.write_text(path.read_text().replace('"data": "', '"data": "other'))
    checkpoint = tmp_path / "runs" / name / "checkpoint"
    checkpoint.mkdir()
    cut = Launcher(says=lambda steps: printed(steps, reached=3), status=1)
    assert call(quality, tmp_path, cut, "--only", name) == 1
    kept = json.loads(path.read_text())
    assert (kept["finished"], kept["reached"], kept["final"]) == (False, 3, None)
    assert not checkpoint.exists()


def test_a_failure_is_said_and_other_runs_go_on(quality, tmp_path, capsys):
    launch = Launcher(says=lambda steps: printed(steps, reached=3), status=1)
    assert call(quality, tmp_path, launch, "--only", "*vanilla-lr*", "--only", "*mhc4-lr*") == 1
    assert len(launch.started) == len(set(launch.started)) == 4
    assert "tiny-t0.1-vanilla-lr0.01-s1: exit status 1; see" in capsys.readouterr().err
    kept = json.loads((tmp_path / "logs" / "tiny-t0.1-vanilla-lr0.01-s1.json").read_text())
    assert (kept["finished"], kept["reached"]) == (False, 3)


def test_a_diverged_run_is_ended_and_kept_as_such(quality, tmp_path):
    class Running(Ended):
        status = None

        def __init__(self):
            pass

        def kill(self):
            self.status = -9

        def wait(self):
            return self.status

    def launch(words, log, gpu):
        log.write_text(printed(20, reached=2) + printed(20, reached=5, loss=math.nan))
        return Running()

    assert call(quality, tmp_path, launch, "--only", "*vanilla-lr0.01-s1") == 0
    kept = json.loads((tmp_path / "logs" / "tiny-t0.1-vanilla-lr0.01-s1.json").read_text())
    assert kept["finished"] and kept["diverged"] == 1 and quality.plan.final(kept) == math.inf


def test_timings_are_alone_on_their_gpu(quality, tmp_path):
    beside = []

    class Slow(Ended):
        left = 3

        def poll(self):
            self.left -= 1
            return None if self.left > 0 else 0

    runs = quality.run.Runs(
        quality.run.parse(["--scale", "tiny", "--cpu", "--out", str(tmp_path), "--jobs", "3", "--poll", "0"]),
        lambda words, log, gpu: (log.write_text(printed(60)), Slow())[1],
    )
    begin = runs.begin

    def noted(run, gpu):
        here = [one.run.study for one in runs.running if one.gpu == gpu]
        beside.append((run.study, here))
        begin(run, gpu)

    runs.begin = noted
    runs.prepare()
    runs.train(gpus=2)
    assert any(len(here) == 2 for _, here in beside)
    assert all(not here for study, here in beside if study == "timing")
    assert not any("timing" in here for _, here in beside)


def test_a_budget_leaves_out_what_cannot_end(quality, tmp_path):
    launch = Launcher()
    call(quality, tmp_path, launch, "--whole", "--budget-minutes", "3", "--tokens-per-parameter", "20000")
    assert launch.started and not any("-t20000-" in name for name in launch.started)
    with pytest.raises(SystemExit):
        quality.run.parse(["--budget-minutes", "0.5"])


def test_a_resumed_log_has_the_later_of_a_repeated_step(quality):
    text = printed(4, reached=3, loss=3.0) + printed(4).replace("iteration        1/", "iteration        x/")
    found = quality.logs.parse(text)
    assert dict(map(tuple, found["loss"])) == {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.0}
    assert (found["final"], found["reached"], found["step_ms"]) == (2.125, 4, 12.5)
    many = quality.logs.means({step: float(step) for step in range(1, 1001)})
    assert len(many) <= quality.logs.POINTS and many[-1][0] == 1000 and many[0] == [9, 5.0]


# The report


@pytest.fixture
def page(tmp_path):
    """A copy of the page."""
    path = tmp_path / "quality.md"
    path.write_text((ROOT / "docs" / "quality.md").read_text())
    return path


def keep(folder, known, about):
    folder.mkdir(exist_ok=True)
    for log in known:
        (folder / f"{log['name']}.json").write_text(json.dumps(log))
    (folder / "data.json").write_text(json.dumps(about))


ABOUT = {
    "hash": "d",
    "vocabulary": 512,
    "bytes_per_token": 3.5,
    "packages": {"tqdm": {"version": "1"}},
    "held_out_packages": {"packaging": {"version": "2"}},
    "train": {"tokens": 1_000_000},
    "held_out": {"tokens": 100_000},
}


def test_gaps_are_of_the_same_seed_with_their_standard_error(quality, tmp_path, page):
    plan, report = quality.plan, quality.report
    scale = dataclasses.replace(plan.SCALES["tiny"], sizes={"tiny": with_seeds(plan, (1, 2, 3))})

    def loss(run):
        plain = 3.0 + 0.5 * run.seed + (run.lr or 0)  # seeds are far apart, pairs are not
        if run.form == "vanilla":
            return plain
        return plain - (0.1 + 0.01 * run.seed) if run.study != "time" else plain + 1.0

    known = finished(plan, scale, 20, loss)
    [one] = report.experiments(scale, known, "d")
    gap = one.gap("tiny", "mhc4")
    assert gap.mean == pytest.approx(-0.12) and gap.error == pytest.approx(0.01 / math.sqrt(3))
    assert gap.seeds == 3 and gap.shown
    said = report.conclusion([one])
    assert "is, at tiny, 0.1200 ± 0.0058 below the plain residual's at equal steps and 1.0000 " in said
    assert "± 0.0000 above the plain residual's at equal GPU time." in said
    assert said.count(". ") == 1 and one.missing == []
    assert not report.Estimate(-0.1, 0.05, 3).shown and not report.Estimate(-0.1, math.nan, 1).shown
    text = report.section(one, ABOUT, [])
    assert "| mHC n=4 | 1.0 | 0.01 | 3 | 3.8900 ± 0.2829 | -0.1200 ± 0.0058 | +1.0000 ± 0.0000 |" in text


def with_seeds(plan, seeds):
    return dataclasses.replace(plan.TINY_SIZES["tiny"], seeds=seeds)


def test_a_gap_of_seeds_that_diverged_on_either_side_is_diverged(quality):
    plan = quality.plan
    scale = plan.SCALES["tiny"]

    def loss(run):
        return math.inf if (run.form, run.seed) in (("vanilla", 1), ("mhc4", 2)) else 2.0

    known = [log | {"final": None, "diverged": 3} if log["final"] == math.inf else log
             for log in finished(plan, scale, 20, loss)]  # fmt: skip
    gap = quality.results.Experiment(scale, 20, known).gap("tiny", "mhc4")
    assert (gap.signed, gap.seeds, gap.shown) == ("diverged", 2, False)


def test_what_is_missing_cut_or_diverged_is_said(quality, tmp_path):
    plan, report, scale = quality.plan, quality.report, quality.plan.SCALES["tiny"]
    runs = plan.sweep(scale, 20, "vanilla") + plan.sweep(scale, 20, "mhc4")
    known = [log_of(runs[0], 2.0), log_of(runs[1], None, finished=False, reached=7)]
    known += [log_of(runs[2], None, diverged=5)]
    [one] = report.experiments(scale, known, "d")
    text = report.section(one, ABOUT, [])
    assert f"| vanilla lr0.03-s1 (at step 7 of {runs[1].steps}); mhc4 lr0.03-s1 |" in text
    assert "| plain residual | **2.0000** | missing |" in text and "| mHC n=4 | diverged | missing |" in text
    assert "| 0.01* |" in text
    assert re.fullmatch(r"\*\*No conclusion: \d+ of \d+ runs are missing.\*\*\n", report.conclusion([one]))


def test_gaps_at_equal_gpu_time_compare_the_step_that_the_plain_form_has_reached(quality):
    steps = list(range(2, 101, 2))
    plain = {1: {step: 10.0 - step / 10 for step in steps}}
    # Twice as slow, and at every step 1 below: 1 below at the same step, less far at the same time.
    log = {"loss": [[step, 9.0 - step / 10] for step in steps]}
    window = 5  # of smoothing, by a trailing mean, which lags by two points of 0.2
    [equal] = quality.figures._gaps({1: log, 2: log}, plain, 1.0)
    assert equal[100] == pytest.approx(-1.0 + 0.2 * (window - 1) / 2)
    [timed] = quality.figures._gaps({1: log}, plain, 2.0)
    assert max(timed) == 100 and timed[100] == pytest.approx(9.0 - 5.0 - 0.0 + 0.4)


def test_runs_of_another_text_are_counted_and_in_no_table(quality):
    scale = quality.plan.SCALES["tiny"]
    run = quality.plan.sweep(scale, 20, "vanilla")[0]
    known = [log_of(run, 2.0), log_of(run, 1.0, data="other")]
    text = "".join(quality.report.parts(scale, known, ABOUT, []).values())
    assert "1 kept runs are of other texts (other), in no table here" in text
    assert "**2.0000**" in text and "1.0000" not in text
    assert "0.0 million" not in text and "1.0 million tokens of 1 packages" in text


def test_the_page_is_what_the_kept_logs_give(quality):
    report, scale = quality.report, quality.plan.SCALES["full"]
    assert report.PAGE.read_text() == report.made(report.PAGE, report.KEPT, scale), (
        "python examples/quality/report.py writes it"
    )


def test_without_a_run_the_page_says_so(quality, tmp_path, page):
    quality.report.main(["--kept", str(tmp_path / "none"), "--page", str(page)])
    text = page.read_text()
    assert "**No conclusion: " in text and "No run is kept." in text and "0 of 35" in text


# All of it


def test_the_chain_trains_resumes_and_reports(quality, tmp_path, page, capsys):
    import pretrain_runs

    cut = []

    def launch(words, log, gpu):
        module, name = words[2:], log.parent.name  # without the runner that the forked processes have
        assert module[0] == "megatron_mhc.pretrain_gpt"
        if name.endswith("mhc4-lr0.01-s1") and not cut:
            cut.append(name)
            module = [*module, "--exit-interval", "6"]
        status, text = pretrain_runs.run(module, 1)
        with open(log, "a") as file:
            file.write(text)
        return Ended(status)

    only = [word for name in ("vanilla", "mhc4") for word in ("--only", f"*{name}-lr0.01-s1")]
    assert call(quality, tmp_path, launch, *only, "--extra", "--eval-iters 2") == 0
    said = capsys.readouterr().out
    assert "mhc4-lr0.01-s1: ended at step 6 of 15" in said and "0 runs missing" in said
    kept = json.loads((tmp_path / "logs" / "tiny-t0.1-mhc4-lr0.01-s1.json").read_text())
    assert kept["finished"] and kept["reached"] == kept["steps"] and kept["parameters"] > 1000
    assert [step for step, _ in kept["loss"]] == list(range(1, 16))
    assert kept["loss"][-1][1] < kept["loss"][0][1]
    log = (tmp_path / "runs" / cut[0] / "log.txt").read_text()
    assert re.search("successfully loaded checkpoint from .* at iteration 6", log)
    assert kept["gains"]["composite_gain_forward"][-1][1] == pytest.approx(1, abs=1e-3)
    assert not (tmp_path / "runs" / cut[0] / "checkpoint").exists()
    quality.report.main(["--kept", str(tmp_path / "logs"), "--page", str(page), "--scale", "tiny"])
    text = page.read_text()
    assert "logs/tiny_t0.1_loss.png" in text and (tmp_path / "logs" / "tiny_t0.1_loss.png").exists()
    plain = json.loads((tmp_path / "logs" / "tiny-t0.1-vanilla-lr0.01-s1.json").read_text())
    assert f"{kept['final'] - plain['final']:+.4f}" in text and "2 of 4" in text


@pytest.mark.slow
def test_a_run_that_its_budget_cuts_off_saves_and_goes_on(quality, tmp_path):
    """With processes of its own, which SIGTERM has save."""
    words = ["--scale", "tiny", "--cpu", "--out", str(tmp_path), "--tokens-per-parameter", "4"]
    words += ["--only", "*mhc4-lr0.01-s1", "--extra", "--eval-iters 2"]
    runs = quality.run.Runs(quality.run.parse(words))
    log = tmp_path / "runs" / "tiny-t4-mhc4-lr0.01-s1" / "log.txt"
    watch = runs.watch

    def until_step_50(one):
        if re.search(r"iteration +50/", log.read_text()):
            runs.deadline = 0
        return watch(one)

    runs.watch = until_step_50
    runs.prepare()
    runs.train(gpus=1)
    path = tmp_path / "logs" / "tiny-t4-mhc4-lr0.01-s1.json"
    first = json.loads(path.read_text())
    assert not first["finished"] and 50 <= first["reached"] < first["steps"]
    assert quality.run.main(words) == 0
    kept = json.loads(path.read_text())
    assert kept["finished"] and kept["seconds"] > first["seconds"]
    at = int(re.search(r"successfully loaded checkpoint .* at iteration (\d+)", log.read_text())[1])
    assert first["reached"] <= at < first["reached"] + 10
    assert not log.with_name("checkpoint").exists()
