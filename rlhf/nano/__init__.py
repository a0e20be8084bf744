"""ContentV-nano, the embedded model: its world, its judges, its weights and how they are trained."""
