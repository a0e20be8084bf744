"""A run on disk, and what resumes and stops it."""
