"""Train a stage of PLATO-2's curriculum: `python train.py --help` explains the groups and keys.

The configuration is conf/, composed by Hydra (plato2/commands/train.py); an installed plato2 has both, as
`plato2 train`.
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported, Ctrl-C ends at once
    from plato2.commands.train import command_line

    signal.signal(signal.SIGINT, heard)
    command_line(Path(__file__).with_name("conf"))
