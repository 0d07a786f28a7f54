"""The ranges of pyproject.toml hold what is tested: requirements.txt, for extras requirements-dev.txt."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from small import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_wheel_needs_what_is_tested() -> None:
    needed = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    tested = pins("requirements.txt")
    assert needed.keys() == tested.keys()
    assert [name for name, version in tested.items() if version not in needed[name]] == []
    assert [name for name, versions in needed.items() if not any(s.operator == ">=" for s in versions)] == []


def test_extras_take_what_is_tested() -> None:
    tested = pins("requirements.txt") | pins("requirements-dev.txt")
    tested |= dict.fromkeys(("s3fs", "gcsfs"), tested["fsspec"])  # released together with it
    extras = [Requirement(one) for extra in PROJECT["optional-dependencies"].values() for one in extra]
    assert [str(one) for one in extras if tested[one.name] not in one.specifier] == []
