"""RLHF by reward gradient for ContentV: the generator, the trainer and the embedded nano model."""

import os

from rlhf.plugins import load_plugins

# Before torch starts OpenMP: a thread that waits for another should soon sleep instead of spinning. Otherwise a second
# busy program on the machine slows training on a CPU by more than ten times; alone, it makes no difference.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

load_plugins()  # before torch and diffusers are imported
