"""Train a stage of PLATO-2's curriculum: `python train.py --help` explains the groups and keys.

The configuration is conf/, composed by Hydra (plato2/commands/train.py); an installed plato2 has both, as
`plato2 train`.
"""

from pathlib import Path

from plato2.commands.train import command_line

if __name__ == "__main__":
    command_line(Path(__file__).with_name("conf"))
