"""The embedded model nano: its world, judges and weights."""
