"""Where a pretrained decoder is to be asked for z and told it, and what keeps its latents apart.

    python -m experiments.decoder_latents.decoder_latents --base FOLDER --data DIR
    python -m experiments.decoder_latents.decoder_latents ... --keep    # does only what results.json lacks

The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.configs import keep_config
from experiments.decoder_latents.slots import LENGTHS, heeded, read_pairs, readings
from experiments.rates.rates import MADE_WITH, finished, recorded
from plato2.config import ModelConfig
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.model.decoder_folder import from_folder
from plato2.model.networks import GenerationNetwork
from plato2.runs.folder import provenance
from plato2.weights.folder import load_generation

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COARSE = "experiments/pretrained/1_coarse"
STEPS = 60
COMMON = [
    *("model=pretrained_lora", "model.max_position=192", "model.adapter_rank=8", "model.adapter_alpha=16"),
    *("model.context_mask=causal", "data=shards", "data.unit_tokens=1024", "data.row_length=256"),
    *("data.valid_units=48", "stage=2_gen", f"init_from={COARSE}", "optim.batch_tokens=1024"),
    *(f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS // 2}"),
    *(f"optim.warmup_steps={STEPS // 6}", "optim.schedule=linear", "seed=0", "strategy=cpu"),
    *("checkpoint_steps=10", "sample_replies=0", "latent_contexts=0", "report=false"),
]
LEARNED, SHORT, FRONT = "stage.recognition_bias=learned", "model.latent_scale=1", "model.latent_at=front"
VARIANTS = {
    "recipe": [],
    "learned": [LEARNED],
    "short": [SHORT],
    "front": [FRONT],
    "as_ours": [LEARNED, SHORT, FRONT],
    "rate-1.25e-3": ["optim.lr=1.25e-3"],
    "rate-2e-4": ["optim.lr=2e-4"],
}


def backbones(base: str) -> dict[str, Callable[[], GenerationNetwork]]:
    """SmolLM2 as it is, and after stage 1; each is loaded when it is asked for."""
    config = ModelConfig(path=base, max_position=192, dropout=0.0, context_mask="causal")

    def as_it_is() -> GenerationNetwork:
        network = GenerationNetwork(from_folder(config, DecoderTokenizer.from_model), has_latents=False)
        network.backbone.load_base()  # type: ignore[operator]
        return network.eval()

    return {"as_it_is": as_it_is, "1_coarse": lambda: load_generation(ROOT / COARSE)}


def looked_at(base: str, data: Path) -> dict[str, Any]:
    """What slots know and heed; see slots.py."""
    pairs, found = read_pairs(data), {}
    for name, load in backbones(base).items():
        backbone = load().backbone
        found[name] = {
            "read": {mask: readings(backbone, pairs, mask) for mask in ("causal", "prefix")},
            "heeded": heeded(backbone, pairs),
        }
        print(name, json.dumps(found[name]), flush=True)
    return {"records": len(pairs) ** 2, "contexts": len(pairs), "lengths": LENGTHS, "decoders": found}


def main() -> None:
    """Looks, trains what is not finished, and records everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="SmolLM2's folder")
    parser.add_argument("--data", required=True, help="the prepared corpus")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/decoder_latents"), help="folder of the runs"
    )
    parser.add_argument("--keep", action="store_true", help="do not do again what results.json has")
    given = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if given.keep and file.exists() else {}

    def keep() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if "slots" not in results:
        made_with = {key: value for key, value in provenance().items() if key in MADE_WITH}
        results["slots"] = looked_at(given.base, Path(given.data)) | {"made_with": made_with}
        keep()
    out = given.out.absolute()
    places = [f"model.path={given.base}", f"data.path={given.data}"]
    places += [f"output_dir={out.parent}", f"name={out.name}"]
    for name, options in VARIANTS.items():
        run = out / name
        if name in results.setdefault("runs", {}):
            continue
        if not finished(run):
            command = [sys.executable, "train.py", *COMMON, *options, *places, f"run_id={name}"]
            print("+", *command[1:], flush=True)
            subprocess.run(command, cwd=ROOT, check=True)
        results["runs"][name] = {"options": options, **recorded(run)}
        keep_config(run, HERE / "config" / f"{name}.yaml")
        keep()


if __name__ == "__main__":
    main()
