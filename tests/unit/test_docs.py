"""Links of every Markdown page lead to files and headings that are there; API pages can be built."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {".venv", "build", "dist", "runs", "node_modules"}
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part in LEFT_OUT or part.endswith("_cache") for part in page.relative_to(ROOT).parts)
)


def prose(page):
    """The text without code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = 0
        while name in found:
            again += 1
            name = f"{anchor}-{again}"
        found.add(name)
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def dead_links(page):
    dead = []
    text = prose(page)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    links += re.findall(r"^ *\[[^]]+\]: +(\S+)", text, re.MULTILINE)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def test_there_are_pages():
    assert {ROOT / "README.md", ROOT / "docs" / "pipeline.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_dead_links_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One thing: `this`\n## Two\n## Two\n")
    page.write_text(
        "[a](missing.md) [b](other.md#two-1) [c](other.md#three) ![d](no.png) [e](https://x.y) `[f](g)`\n"
        "[h](#here) [i](other.md#one-thing-this)\n"
    )
    assert dead_links(page) == ["missing.md", "other.md#three", "no.png", "#here"]


def test_api_pages_show_the_public_names(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "scripts" / "api_docs.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for page, names in {
        "megatron_mhc": ["MHCConfig", "register", "wrap_block_spec", "wrap_layer_spec"],
        "megatron_mhc/pipeline": ["forward_backward"],
        "megatron_mhc/recompute": ["handle", "replay"],
        "megatron_mhc/diagnostics": ["Sampler"],
        "megatron_mhc/convert": ["from_plain"],
    }.items():
        text = (tmp_path / f"{page}.html").read_text()
        for name in names:
            assert f'<section id="{name}">' in text, (page, name)
