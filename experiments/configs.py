"""The resolved configuration of a run, kept beside the results of an experiment."""

from __future__ import annotations

from pathlib import Path

import yaml


def keep_config(run: Path, file: Path, runs: Path | None = None) -> None:
    """Copies the configuration of a run, without the places where it ran; nothing of a model folder.

    Args:
        run: the run's folder.
        file: where to write; its folder is made.
        runs: the folder of an experiment's own runs: which of them a run starts from stays in its
            configuration. The start from any other run becomes `auto`.
    """
    if not (run / "config.yaml").is_file():
        return
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    start = config["init_from"]
    if runs is not None and Path(start).is_relative_to(runs):
        start = str(Path(start).relative_to(runs))
    elif start != "scratch":
        start = "auto"
    config |= {"output_dir": "outputs", "init_from": start}
    config["data"]["path"] = f"data/{Path(config['data']['path']).name}"
    for key in ("path", "base"):  # of a pretrained decoder
        if place := config["model"].get(key):
            config["model"][key] = f"models/{Path(place).name}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
