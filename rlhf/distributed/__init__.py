"""Which processes work together."""
