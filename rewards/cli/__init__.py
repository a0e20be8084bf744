"""What the commands share: flags, files and tables."""
