"""Distil a reward of pixels into one of latents: `python -m rewards.distill --head FILE`."""

import sys

if __name__ == "__main__":
    from rlhf.distill import main  # which knows the trainer, as nothing else here does

    sys.exit(main())
