"""ContentV's generator (arXiv 2506.05343): transformer and pipeline, without training."""
