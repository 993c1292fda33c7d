"""headway: train, tune and serve PyTorch models on the machines people actually have.

The package itself imports nothing heavy. Methods live in the packages of their role
(`headway.optim`, `headway.schedules`, ...) and are listed in `headway.catalogue`.
"""

__version__ = "0.1.0"
