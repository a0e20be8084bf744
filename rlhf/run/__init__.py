"""A run on disk: folder, checkpoints, metrics, sample videos."""
