"""The documentation site needs nothing from a network; `.ci/run` builds it strictly."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from small import ROOT

pytest.importorskip("mkdocs", reason="pip install -r requirements-docs.txt")
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/x.css">'),
        ("a.html", "<img alt='x' src=http://example.org/x.png>"),
        ("a.css", "body { background: url('https://example.org/x.png') }"),
    ],
)
def test_what_is_loaded_from_a_network_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(HOOKS["PluginError"], match=f"{tmp_path}/{name}: .* is loaded from a network"):
        HOOKS["on_post_build"](SimpleNamespace(site_dir=tmp_path))


def test_links_and_own_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org">x</a><abbr title="x"><img src="../x.png">'
    )
    (tmp_path / "a.css").write_text("body { background: url('data:image/svg+xml;utf8,x') }")
    HOOKS["on_post_build"](SimpleNamespace(site_dir=tmp_path))


def test_every_document_is_in_the_navigation_and_nothing_else() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert len(listed) > 20
    assert {*listed, "README.md"} == {path for path in HOOKS["documents"](ROOT) if path.endswith(".md")}
