"""headway: train, tune and serve PyTorch models on the machines people actually have.

The package itself imports nothing heavy. Methods live in the packages of their role
(`headway.optim`, `headway.schedules`, ...) and are listed in `headway.catalogue`.
"""

import time

__version__ = "0.1.0"

# When this process began to use the package, by `time.perf_counter`: a run's report tells what the whole command took.
started = time.perf_counter()
