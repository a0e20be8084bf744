"""What devices do in a second; see `rlhf.rates`.

Made by `python bench/package.py` from bench/results/planner.json: do not edit.
"""

RATES = {
    "NVIDIA H200": {
        "flops": {
            "matrix float32": 4.995e13,
            "conv float32": 3.398e14,
            "conv backward float32": 2.566e14,
            "attention float32": 3.552e13,
            "attention backward float32": 3.44e13,
            "matrix bfloat16": 7.617e14,
            "conv bfloat16": 4.492e14,
            "conv backward bfloat16": 4.75e14,
            "attention bfloat16": 4.832e14,
            "attention backward bfloat16": 4.585e14,
        },
        "bytes": 1.685e12,
        "call_seconds": 8.371e-06,
        "autograd_seconds": 1.243e-05,
        "link": 5.403e10,
        "beside": 806158336,
        "waits": False,
        "between": 3.856e11,
    },
}
