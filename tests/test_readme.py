"""What the documentation shows runs, and what it points to exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


RUN = [
    README,
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("checkpoints", "memory", "operators", "passes", "pipelines", "plans", "sequences", "verification")
    ),
]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_python_block_runs(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": page.stem}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that a traceback has the page's line numbers
        exec(compile("\n" * above + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    paths = re.findall(r"`([\w./-]+(?:/|\.py))`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", README.read_text(), re.MULTILINE))
    assert named and named <= targets
