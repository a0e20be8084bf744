"""What devices do in a second; see `rlhf.rates`.

Made by `python bench/package.py` from bench/results/planner.json: do not edit.
"""

RATES = {}
