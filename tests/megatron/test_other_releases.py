"""Releases of Megatron-Core beside the installed one, and Megatron-LM's main: skipped unless they are named.

    MHC_MEGATRON=/path/to/Megatron-LM:/path/to/venv python -m pytest tests/megatron/test_other_releases.py

A checkout goes in front of the installed Megatron, with its scripts (`make -C megatron/core/datasets` first);
an environment brings its own, and torch and pytest, maybe by a .pth file.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pretrain_runs
import pytest

from megatron_mhc.releases import RELEASES

ROOT = Path(__file__).resolve().parents[2]
PATHS = [Path(path) for path in os.environ.get("MHC_MEGATRON", "").split(os.pathsep) if path]
WHEEL = ["-m", "megatron_mhc.pretrain_gpt"]
TWO_STAGES = ["--pipeline-model-parallel-size", "2"]
SPEC = ["--spec", "megatron_mhc.specs", "gpt_mhc_spec"]
HALF = pretrain_runs.STEPS // 2
pytestmark = [
    pytest.mark.skipif(not PATHS, reason="MHC_MEGATRON names no checkout and no environment"),
    pytest.mark.timeout(900),
]


class Megatron(NamedTuple):
    """One of PATHS: its Python, and the folder of its scripts, if it has any."""

    python: str
    scripts: Path | None

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        first = [str(self.scripts)] if self.scripts else []
        path = os.pathsep.join([*first, str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "NO_VCS_VERSION": "1", **variables}
        command = [self.python, *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)

    def attempt(self, door: list[str], *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Pretraining on two CPU processes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        given = [*pretrain_runs.ARGUMENTS, *self.vocabulary(), *arguments]
        return self.run(*launcher, "-m", "megatron_mhc.testing.cpu", *door, *given, **variables)

    def row(self) -> int:
        """Its place in RELEASES."""
        asked = "from megatron_mhc.releases import RELEASES, release; print(RELEASES.index(release()))"
        return int(self.run("-c", asked).stdout)

    def vocabulary(self) -> list[str]:
        """What makes as many tokens as the installed release's: the NullTokenizer of 0.17 adds one."""
        return ["--vocab-size", "127"] if RELEASES[self.row()].pretrain_parses else []

    def train(self, folder: Path, door: list[str], *arguments: str, **variables: str) -> list[float]:
        """The training losses of that."""
        done = self.attempt(door, "--tensorboard-dir", str(folder), *arguments, **variables)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        return pretrain_runs.losses(folder)


@pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.name)
def megatron(request):
    if (request.param / "bin" / "python").exists():
        return Megatron(str(request.param / "bin" / "python"), None)
    return Megatron(sys.executable, request.param)


@pytest.fixture
def script(megatron):
    """The path of its pretrain_gpt.py."""
    if megatron.scripts is None:
        pytest.skip("an environment has no scripts")
    return str(megatron.scripts / "pretrain_gpt.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The losses of the installed release on two stages, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("installed")
    losses, _ = pretrain_runs.launch(
        folder, *pretrain_runs.MHC, *TWO_STAGES, "--save", str(folder / "checkpoints")
    )
    return losses, folder / "checkpoints"


@pytest.fixture(scope="module")
def own(megatron, tmp_path_factory):
    """The losses of this Megatron on two stages, by the wheel's door, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("own")
    saved = folder / "checkpoints"
    words = [*pretrain_runs.MHC, *TWO_STAGES, "--save", str(saved)]
    return megatron.train(folder / "tensorboard", WHEEL, *words), saved


@pytest.fixture(scope="module")
def row(megatron):
    return RELEASES[megatron.row()]


def resume(checkpoints: Path) -> list[str]:
    return [*TWO_STAGES, "--load", str(checkpoints), "--ckpt-step", str(HALF)]


def test_every_symbol_is_as_the_row_of_its_release_says(megatron):
    code = (
        "from megatron_mhc.testing import cpu; cpu.install();"
        "from megatron_mhc import hooks; from megatron_mhc.hooks import uses;"
        "hooks.register(training=True, schedule=True, fsdp=True);"
        "hooks.check_uses(uses.HYBRID_USES + uses.SPEC_USES + uses.PRETRAIN_USES)"
    )
    done = megatron.run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_wheel_door_trains_as_under_the_installed_release_and_resumes(megatron, own, installed, tmp_path):
    losses, saved = own
    assert losses == pytest.approx(installed[0], rel=1e-5)
    assert megatron.train(tmp_path, WHEEL, *pretrain_runs.MHC, *resume(saved)) == losses[HALF:]


def test_the_installed_release_continues_its_checkpoint(own, tmp_path):
    losses, saved = own
    found, _ = pretrain_runs.launch(tmp_path, *pretrain_runs.MHC, *resume(saved))
    assert found == pytest.approx(losses[HALF:], rel=1e-5)


def test_it_continues_a_checkpoint_of_the_installed_release(megatron, row, installed, tmp_path):
    if not row.spec_is_called:
        pytest.skip("stock 0.17 and 0.18 find no common.pt in what 0.19 saves")
    losses, saved = installed
    found = megatron.train(tmp_path, WHEEL, *pretrain_runs.MHC, *resume(saved))
    assert found == pytest.approx(losses[HALF:], rel=1e-5)


def test_its_own_script_trains_by_spec_and_by_the_launcher(megatron, script, own, tmp_path):
    losses, saved = own
    options = {"MEGATRON_MHC": "init=uniform,init_gating_factor=0.5"}
    by_spec = megatron.train(tmp_path / "spec", [script], *SPEC, *resume(saved), **options)
    launcher = ["-m", "megatron_mhc.launch", script]
    by_launcher = megatron.train(tmp_path / "launch", launcher, *pretrain_runs.MHC, *resume(saved))
    assert by_spec == by_launcher == losses[HALF:]


def test_its_own_script_is_as_without_the_plugin_where_mhc_is_off(megatron, script, tmp_path):
    plain = megatron.train(tmp_path / "plain", [script], *TWO_STAGES)
    assert megatron.train(tmp_path / "off", WHEEL, "--no-mhc", *TWO_STAGES) == plain


def test_megatrons_own_mhc_is_refused_by_name(megatron, row, script):
    """Where it has one: its flags are then its own, and the plugin's spec is not combined with it."""
    if not row.own_mhc:
        pytest.skip("it has none")
    own = "--enable-mhc-connections"
    for door, words, said in (
        (WHEEL, [own], f"{own} turns on Megatron's own mHC, beside this plugin's"),
        ([script], [own, *SPEC], f"{own} turns on Megatron's own mHC, beside this plugin's"),
        ([script], ["--mhc-num-residual-streams", "2", *SPEC], "is here a flag of Megatron's own mHC"),
    ):
        done = megatron.attempt(door, *words)
        assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]


def test_what_it_lacks_is_refused_by_name(megatron, row, tmp_path):
    if row.hybrid:
        pytest.skip("nothing of what is refused here")
    multistream = ["--mhc-mtp", "multistream", "--mtp-num-layers", "1"]
    for words, said in (
        (
            ["--hybrid-layer-pattern", "*-*-"],
            "*-*- is of a HybridModel, which Megatron-Core 0.17 does not",
        ),
        (multistream, "--mhc-mtp multistream with --mtp-num-layers under Megatron-Core 0.17"),
    ):
        done = megatron.attempt(WHEEL, *words)
        assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
    done = megatron.run("-c", "from megatron_mhc import wrap_hybrid_spec")
    assert done.returncode != 0 and "has no HybridModel: install 0.18 or later" in done.stderr
    spec = megatron.run("-c", "from megatron_mhc.specs import hybrid_mhc_spec; hybrid_mhc_spec.module")
    assert spec.returncode != 0 and "has no HybridModel: install 0.18 or later" in spec.stderr


def test_layouts_match_a_single_process(megatron, row):
    """TP2, PP2, VPP2 and EP2, with n = 2 and 4, and stock's own."""
    chosen = "core_layout or stock_layout or unreduced or float32_layout"
    if not row.keeps_what_it_sends:  # stock's own then reads what is freed
        chosen = f"({chosen}) and not vpp2"
    done = megatron.run("-m", "pytest", "-q", "tests/distributed/test_parity.py", "-k", chosen)
    assert done.returncode == 0, done.stdout[-4000:]
