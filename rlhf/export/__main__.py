"""Command `python -m rlhf.export`; see `rlhf.export`."""

from rlhf.export import main

if __name__ == "__main__":
    main()
