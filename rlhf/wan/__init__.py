"""Wan 2.1's generator (arXiv 2503.20314): transformer and pipeline, without training."""
