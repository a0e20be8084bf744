"""The built-in rewards: one file per family."""
