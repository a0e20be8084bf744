"""A run under torchrun whose process 1 is killed in its third step, once. Arguments: its folder,
its settings.
"""

import json
import os
import signal
import sys
from pathlib import Path

import many_runs
from toy_rewards import redness


def killing(video, prompts, **info):
    if info["step"] == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(video, prompts)


if __name__ == "__main__":
    many_runs.REWARDS["killing"] = killing
    many_runs.runs(Path(sys.argv[1]), {"run": json.loads(sys.argv[2])})
