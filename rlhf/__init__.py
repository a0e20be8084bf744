"""RLHF by reward gradient for ContentV: the generator, the trainer and the embedded nano model."""
