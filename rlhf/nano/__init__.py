"""ContentV-nano, the embedded model: its world, judges, weights and pretraining."""
