"""What is released: a wheel that trains outside of the checkout, and a source distribution that is whole."""

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import megatron_mhc

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".git", ".*_cache", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", ".te_hopper")
ARGUMENTS = (ROOT / "tests" / "unit" / "cpu_model.args").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution, of a copy: setuptools builds inside the tree."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def environment(folder, *what):
    """A fresh environment, beside the packages of this one, with what pip installs; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Behind the environment's own packages; this checkout, which a .pth file may add to them, stays out.
    beside = [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]
    (folder / "lib" / version / "site-packages" / "beside.pth").write_text("\n".join(beside))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", *map(str, what)]
    # A checkout on PYTHONPATH that was itself installed has an .egg-info: pip would take it for ours.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel."""
    return environment(tmp_path_factory.mktemp("environment"), built[0])


def run(python, *words, cwd=None, **environment):
    """Run it outside of the checkout."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MEGATRON_MHC")}
    command = [str(python), *words]
    return subprocess.run(
        command,
        env=clean | environment,
        cwd=cwd or python.parent,
        capture_output=True,
        text=True,
        timeout=200,
        errors="replace",
    )


def test_wheel_has_sources_of_kernels_and_types(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "megatron_mhc").rglob("*.cu*")}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "megatron_mhc").rglob("*.py")}
    assert sources | {"megatron_mhc/py.typed"} <= names
    assert not any(name.startswith(("tests/", "examples/", "scripts/")) for name in names)


def test_metadata_is_what_an_index_shows(built):
    archive = zipfile.ZipFile(built[0])
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    assert f"Version: {megatron_mhc.__version__}\n" in metadata and "Author: " in metadata
    assert "Classifier: Programming Language :: Python :: 3.13" in metadata
    description = metadata.split("\n\n", 1)[1]
    assert description.startswith("# megatron-mhc\n")
    # No address of the repository is known, so relative links would lead nowhere.
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", description))


def test_source_distribution_has_tests_docs_and_examples(built):
    names = {name.split("/", 1)[-1] for name in tarfile.open(built[1]).getnames()}
    for folder in ("benchmarks", "docs", "examples", "patches", "scripts", "tests"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        missing = {str(p.relative_to(ROOT)) for p in files} - names
        assert not missing, missing
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"} <= names


def test_the_version_is_said_once():
    version = megatron_mhc.__version__
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_wheel_is_imported_and_has_its_program(installed):
    done = run(installed, "-c", "import megatron_mhc as m; print(m.__file__, m.__version__)")
    assert done.stdout.split() == [
        str(next(installed.parents[1].glob("lib/*/site-packages/megatron_mhc/__init__.py"))),
        megatron_mhc.__version__,
    ], done.stderr
    done = run(installed.with_name("megatron-mhc"), "--help")
    assert done.returncode == 0 and "doctor" in done.stdout


def test_a_checkout_on_the_path_that_was_installed_itself_is_in_nobodys_way(built, tmp_path, monkeypatch):
    about = tmp_path / "checkout" / "megatron_mhc.egg-info" / "PKG-INFO"
    about.parent.mkdir(parents=True)
    version = megatron_mhc.__version__
    about.write_text(f"Metadata-Version: 2.1\nName: megatron-mhc\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "checkout"))
    python = environment(tmp_path / "environment", built[0])
    assert list(python.parents[1].glob("lib/*/site-packages/megatron_mhc/__init__.py"))


def test_an_editable_installation_is_found_from_the_folder_that_holds_the_clone(tmp_path):
    """`import megatron_mhc` there finds the clone itself first, a folder without __init__.py."""
    clone = tmp_path / "megatron_mhc"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*LEFT_OUT, "tests", "docs"))
    python = environment(tmp_path / "environment", "-e", clone)
    for folder in (tmp_path, clone, tmp_path / "environment"):
        done = run(python, "-c", "import megatron_mhc as m; print(m.__file__, m.MHCConfig)", cwd=folder)
        assert done.stdout.split()[0] == str(clone / "megatron_mhc" / "__init__.py"), done.stderr


def test_wheel_trains_three_steps_by_its_door(installed):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    done = run(
        installed,
        *("-m", "megatron_mhc.testing.cpu", "-m", "megatron_mhc.pretrain_gpt", *ARGUMENTS.split()),
        **dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port)),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    losses = [float(found) for found in re.findall(r"lm loss: (\S+)", done.stdout)]
    assert len(losses) >= 3 and losses[2] < losses[0]
