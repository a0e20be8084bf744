"""Train ContentV by reward gradient: `accelerate launch train_rlhf.py [--config FILE] [--any_key value]`.

Without --config it runs configs/nano.yaml, the main job. It is rlhf/train.py, and `contentv-rlhf` once installed.
"""

import sys

from rlhf.train import main

if __name__ == "__main__":
    sys.exit(main())
