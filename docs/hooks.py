"""Hooks of mkdocs.yml: which files the site is made of, GitHub's anchors, and no asset from a network."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

LINK = re.compile(r"\]\(([^)#\s]+)")
ASSET = re.compile(
    r"<(?!a\b)\w+\b[^>]*\s(?:src|href)=[\"']?(?:https?:)?//[^>]*>|url\([\"']?(?:https?:)?//[^)]*\)"
)
"""What a browser would fetch from another host to show a page; a link that a reader may follow is none."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors that code hosts give them."""
    config.mdx_configs["toc"] = {"permalink": True, "toc_depth": 3, "slugify": slugify(case="lower")}
    return config


def documents(root: Path) -> list[str]:
    """README.md, docs/*.md, what they link to, and so on: paths from the top of the repository."""
    found = ["README.md", *(f"docs/{path.name}" for path in sorted((root / "docs").glob("*.md")))]
    for path in found:  # it grows
        if path.endswith(".md"):
            for target in LINK.findall((root / path).read_text(encoding="utf-8")):
                linked = os.path.normpath(os.path.join(os.path.dirname(path), target))
                if linked not in found and (root / linked).is_file():
                    found.append(linked)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files keep their paths, so that a relative link means the same here and on a code host.

    Sources are shown as text, whatever a browser thinks of `.py` and `.yaml`.
    """
    root = Path(config.config_file_path).parent
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in documents(root):
        shown = path.endswith((".md", ".svg", ".png"))
        target = None if shown else f"{path}.txt"
        files.append(File(path, str(root), config.site_dir, config.use_directory_urls, dest_uri=target))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Refuses a site of which a part would come from another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (asset := ASSET.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path}: {asset[0][:200]} is loaded from a network; copy it into docs/")


class OptionHelp(griffe.Extension):
    """A field made by `plato2.config.option(default, help=...)` is documented by its help."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Griffe has read a field."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "option":
            arguments = attr.value.arguments
            named = {one.name: one.value for one in arguments if isinstance(one, griffe.ExprKeyword)}
            if isinstance(named["help"], str):  # the source of a text
                attr.docstring = griffe.Docstring(ast.literal_eval(named["help"]), parent=attr)
            attr.value = (
                named.get("factory") if isinstance(arguments[0], griffe.ExprKeyword) else arguments[0]
            )
