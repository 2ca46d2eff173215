"""Make the text of the quality runs: sources and documentation of Python packages, as a Megatron dataset.

    python examples/quality/data.py FOLDER

Writes train.bin and .idx, held_out.bin and .idx, tokenizer.json and data.json. The packages are named below.
Those that are installed are taken, each with the files that its wheel recorded; a file that is there twice is
taken once. Whole packages are held out for validation. data.json has the recipe: every package with its
version, the tokens, and a SHA-256 of the token streams. With these versions installed from a registry the
text is the same on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = set(".py .pyi .pyx .pxd .rst .md .txt .h .hpp .cuh .inl .cu .cpp .c".split())
LARGEST = 400_000  # bytes of a file; what is larger is mostly generated
SMALLEST = 64
TOKENIZER_BYTES = 48_000_000  # of the training text, on which the tokenizer is trained


class Recipe(NamedTuple):
    """Packages to train on, packages held out, and the size of the vocabulary with its end of document."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    vocabulary: int


RECIPE = Recipe(
    train=tuple(
        """
        absl-py accelerate aiohttp anyio attrs botorch build chex click cloudpickle contourpy coverage
        cuda-bindings cuda-core cupy-cuda13x cython diffrax e3nn einops equinox etils flatbuffers flax
        fonttools formulaic fsspec gpytorch grpcio h5py httpcore httpx huggingface-hub humanize imageio
        jax jaxlib jaxtyping joblib lightning linear-operator lineax llvmlite lxml markdown matplotlib
        meson ml-dtypes mpmath narwhals numba numba-cuda numpy numpyro nvidia-cublas nvidia-cuda-nvrtc
        nvidia-cuda-runtime nvidia-cudnn-cu13 onnx onnxruntime onnxscript opt-einsum optimistix
        orbax-checkpoint packaging pandas patsy peft pillow pip prometheus-client protobuf psutil pyarrow
        pybind11 pygments pyparsing pytest python-dateutil pyyaml requests rich safetensors
        scikit-build-core scikit-image scikit-learn scipy sentence-transformers setuptools simplejson
        statsmodels sympy tensorboard tensorstore tifffile timm tokenizers torch torch-geometric
        torchaudio torchmetrics torchvision tqdm transformers treescope triton typer urllib3 werkzeug
        """.split()
    ),
    held_out=tuple("hypothesis jinja2 networkx optax seaborn xarray".split()),
    vocabulary=8192,
)
# Of a test: packages that are there where Megatron trains.
TINY = Recipe(train=("pyyaml", "tqdm"), held_out=("packaging",), vocabulary=512)


class Source(NamedTuple):
    """A file of a package."""

    package: str
    name: str
    text: str


def package_files(package: str) -> tuple[str, list[tuple[str, Path]]]:
    """The version of an installed package, and its text files by name, sorted."""
    found = metadata.distribution(package)
    names = {str(name): Path(str(name.locate())) for name in found.files or ()}
    chosen = [(n, p) for n, p in names.items() if p.suffix in SUFFIXES and ".." not in Path(n).parts]
    return found.version, sorted((n, p) for n, p in chosen if ".dist-info" not in n)


def text_of(path: Path) -> str | None:
    """The text of a file; None where it is too small, too large, or not UTF-8."""
    try:
        if not SMALLEST <= path.stat().st_size <= LARGEST:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def collect(packages: Iterable[str], seen: set[bytes]) -> tuple[dict[str, dict[str, Any]], list[Source]]:
    """What is installed of the packages, and their files that are not in `seen`, which is extended."""
    about: dict[str, dict[str, Any]] = {}
    sources: list[Source] = []
    for package in sorted(packages):
        try:
            version, files = package_files(package)
        except metadata.PackageNotFoundError:
            continue
        about[package] = {"version": version, "files": 0, "bytes": 0}
        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(text_of, (path for _, path in files)))
        for (name, _), text in zip(files, texts, strict=True):
            if text is None or (digest := hashlib.sha256(text.encode()).digest()) in seen:
                continue
            seen.add(digest)
            sources.append(Source(package, name, text))
            about[package]["files"] += 1
            about[package]["bytes"] += len(text.encode())
    return about, sources


def train_tokenizer(sources: list[Source], vocabulary: int) -> Any:
    """A byte-level BPE, trained on an even sample of the files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    total = sum(len(source.text) for source in sources)
    stride = max(1, total // TOKENIZER_BYTES)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,  # the last number ends a document
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source.text for source in sources[::stride]), trainer)
    return tokenizer


def documents(tokenizer: Any, sources: list[Source], end: int) -> Iterator[np.ndarray]:
    """The tokens of each file, uint16, with an end of document behind them."""
    for first in range(0, len(sources), 1024):
        batch = [source.text for source in sources[first : first + 1024]]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.append(np.asarray(encoding.ids, dtype=np.uint16), np.uint16(end))


def write(prefix: Path, every: Iterator[np.ndarray]) -> dict[str, Any]:
    """Write a dataset; returns its documents, tokens and hash."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    digest, number, tokens = hashlib.sha256(), 0, 0
    for document in every:
        builder.add_document(document, [document.size])
        digest.update(document.tobytes())
        number, tokens = number + 1, tokens + document.size
    builder.finalize(f"{prefix}.idx")
    return {"documents": number, "tokens": tokens, "sha256": digest.hexdigest()}


def prepare(folder: Path, recipe: Recipe = RECIPE, kept_tokenizer: Path | None = None) -> dict[str, Any]:
    """Make the dataset in `folder`, if it is not there; returns what data.json says.

    Args:
        kept_tokenizer: a tokenizer.json to take in place of training one.
    """
    record = folder / "data.json"
    if record.exists():
        return json.loads(record.read_text())
    from tokenizers import Tokenizer

    started = time.time()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    # Held-out files first: a file that is there twice is then not trained on.
    held_out, held_out_sources = collect(recipe.held_out, seen)
    train, train_sources = collect(recipe.train, seen)
    if not held_out or not train:
        raise SystemExit("no package to train on, or none to hold out: pip install those that data.py names")
    print(f"{len(train_sources)} files of {len(train)} packages in {time.time() - started:.0f} s", flush=True)
    if kept_tokenizer is not None and kept_tokenizer.exists():
        tokenizer = Tokenizer.from_file(str(kept_tokenizer))
    else:
        tokenizer = train_tokenizer(train_sources, recipe.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    print(f"tokenizer after {time.time() - started:.0f} s", flush=True)
    about: dict[str, Any] = {
        "vocabulary": recipe.vocabulary,
        "suffixes": sorted(SUFFIXES),
        "largest_file": LARGEST,
        "packages": train,
        "held_out_packages": held_out,
        "missing_packages": sorted({*recipe.train, *recipe.held_out} - train.keys() - held_out.keys()),
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    }
    size = sum(package["bytes"] for package in train.values())
    for name, sources in (("held_out", held_out_sources), ("train", train_sources)):
        about[name] = write(folder / name, documents(tokenizer, sources, recipe.vocabulary - 1))
    about["bytes_per_token"] = round(size / about["train"]["tokens"], 3)
    streams = about["train"]["sha256"] + about["held_out"]["sha256"]
    about["hash"] = hashlib.sha256(streams.encode()).hexdigest()[:16]
    record.write_text(json.dumps(about, indent=1) + "\n")
    millions = {name: f"{about[name]['tokens'] / 1e6:.2f} million" for name in ("train", "held_out")}
    print(
        f"{millions['train']} tokens, {millions['held_out']} held out, {time.time() - started:.0f} s",
        flush=True,
    )
    return about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)


if __name__ == "__main__":
    main()
