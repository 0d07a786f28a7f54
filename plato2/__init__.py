"""plato2: PLATO-2 (Bao et al., 2021) in PyTorch Lightning. `python -m plato2 --help` lists the verbs."""

__version__ = "0.1.0"
