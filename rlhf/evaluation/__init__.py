"""Evaluation on held-out prompts: measures, statistics, video sets."""
