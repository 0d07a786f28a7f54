"""Hydra's compositions, remembered: it takes most of the time of a train.py that trains for two steps."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import Overrides
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from small import ROOT


def remember(patch: pytest.MonkeyPatch) -> None:
    """Reads each file, parses each override and composes each choice of groups of conf/ once.

    Values are set on a copy. Other folders of configuration are composed anew, since tests write them.
    """
    find = config_loader_impl.create_defaults_list
    compose = ConfigLoaderImpl._compose_config_from_defaults_list
    found: dict[tuple[Any, ...], Any] = {}
    composed: dict[int, DictConfig] = {}

    def find_once(repo: Any, overrides_list: list[Any], **given: Any) -> Any:
        values = Overrides(repo, overrides_list).config_overrides
        numbers = {id(value) for value in values}
        groups = (word.input_line for word in overrides_list if id(word) not in numbers)
        folders = (source.path for source in repo.get_sources() if source.scheme() == "file")
        key = (*folders, *given.items(), *groups)
        if key[0] != str(ROOT / "conf") or key[1] != ("config_name", "train"):
            return find(repo=repo, overrides_list=overrides_list, **given)
        if key not in found:
            found[key] = find(repo=repo, overrides_list=overrides_list, **given)
        return replace(found[key], config_overrides=values)

    def compose_once(loader: Any, defaults: list[Any], repo: Any) -> DictConfig:
        if not any(defaults is known.defaults for known in found.values()):
            return compose(loader, defaults, repo)
        if id(defaults) not in composed:
            composed[id(defaults)] = compose(loader, defaults, repo)
        return copy.deepcopy(composed[id(defaults)])

    read = OmegaConf.load

    @cache
    def read_once(path: str, changed_at: int) -> Any:
        return read(path)

    def load(file: Any) -> Any:
        path = file if isinstance(file, str | Path) else file.name
        return copy.deepcopy(read_once(str(path), os.stat(path).st_mtime_ns))

    parse = OverridesParser.parse_rule
    reader = OverridesParser.create()

    @cache
    def parsed_once(text: str, rule: str) -> Any:
        return parse(reader, text, rule)

    def parse_rule(_: Any, text: str, rule: str) -> Any:
        return copy.deepcopy(parsed_once(text, rule))

    patch.setattr(OverridesParser, "parse_rule", parse_rule)
    patch.setattr(OmegaConf, "load", load)
    patch.setattr(config_loader_impl, "create_defaults_list", find_once)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_once)
