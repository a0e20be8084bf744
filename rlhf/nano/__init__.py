"""ContentV-nano, the embedded model: its world, judges and weights."""
