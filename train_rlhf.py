"""Train a generator by reward gradient: `accelerate launch train_rlhf.py [--config FILE]`.

Without --config it runs configs/nano.yaml, the main job. Any setting is also a flag. The command
is rlhf/train.py; an installed package has it as `contentv-rlhf`.
"""

import sys

try:
    from rlhf.train import main
except KeyboardInterrupt:  # `main` explains a later one
    print("train_rlhf: interrupted before the training began; nothing was lost.", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
