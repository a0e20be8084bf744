"""Flags, files and tables of the commands."""
