"""The seed of a test run, and whether it is the long one.

`WAYSTATION_SEED` repeats what a run drew; it is told in the run's head. `WAYSTATION_SOAK=1` is what `make soak` sets.
"""

from __future__ import annotations

import os
import random
from typing import Final

SOAK: Final = os.environ.get("WAYSTATION_SOAK") == "1"
# In the environment, so that all workers of a run have the same.
SEED: Final = int(os.environ.setdefault("WAYSTATION_SEED", str(random.SystemRandom().randrange(1, 1 << 32))))


def chance(*names: object) -> random.Random:
    """What a test draws from: another one in each run and for each of `names`."""
    return random.Random(f"{SEED} {' '.join(map(str, names))}")
