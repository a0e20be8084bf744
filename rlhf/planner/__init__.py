"""Memory and time of a step, computed without a GPU."""
