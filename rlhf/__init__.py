"""RLHF by reward gradient for ContentV: the generator, the trainer and the embedded nano model."""

import os

# Before torch starts OpenMP: threads that wait should sleep, not spin. A second busy program would otherwise slow
# training on a CPU by more than ten times, since spinning threads keep the one that has work off its core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
