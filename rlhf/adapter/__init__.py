"""The trained part of the transformer."""
