"""What devices do in a second; see `rlhf.rates`.

Made by `python bench/package.py` from bench/results/planner.json: do not edit.
"""

RATES = {
    "NVIDIA H200": {
        "flops": {
            "matrix float32": 5e13,
            "conv float32": 3.385e14,
            "conv backward float32": 2.568e14,
            "attention float32": 3.548e13,
            "attention backward float32": 3.489e13,
            "matrix bfloat16": 7.406e14,
            "conv bfloat16": 4.481e14,
            "conv backward bfloat16": 4.744e14,
            "attention bfloat16": 4.73e14,
            "attention backward bfloat16": 4.599e14,
        },
        "bytes": 4.054e12,
        "call_seconds": 8.962e-06,
        "autograd_seconds": 1.032e-05,
        "link": 5.528e10,
        "beside": 804061184,
        "waits": False,
    },
}
