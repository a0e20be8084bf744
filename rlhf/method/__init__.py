"""Reward gradients by the published methods: noise, prefix, window, score, gradient."""
