"""Train ContentV by reward gradient: `accelerate launch train_rlhf.py [--config FILE]`.

Without --config it runs configs/nano.yaml, the main job. Any setting is also a flag. The command
is rlhf/train.py; an installed package has it as `contentv-rlhf`.
"""

import sys

from rlhf.train import main

if __name__ == "__main__":
    sys.exit(main())
