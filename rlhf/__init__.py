"""RLHF by reward gradient for ContentV: the generator, the trainer and the embedded nano model."""

from rlhf.plugins import load_plugins

load_plugins()  # before torch and diffusers are imported
