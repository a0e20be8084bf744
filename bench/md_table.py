"""Markdown tables of measured results: one formatter, and the line that names the device."""

GONE = {  # arms of settings that the project no longer has: their rows stay in the JSON files alone
    "exact, caches recomputed",
    "exact, VAE channels last",
    "8-bit base",
    "guidance every 2nd step",
    "8-bit optimizer",
    "merged copy",
    "float8 copy",
    "a quarter of the steps, rollouts used 4 times, float8 copy, FlashAttention-3",
    "draft_k, K = 4, block 2 whole",
}
LABELS = {  # name of an arm in the JSON files: what the tables call it
    "attention computed again": "attention recomputed",
    "nothing twice": "no recomputation",
    "peers' way": "VideoX-Fun's step",
}


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    first, *others = (f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in (headings, *rows))
    return f"{first}{'|---' * len(headings)}|\n{''.join(others)}"


def label(arm: str) -> str:
    """Return the name of an arm as the tables show it."""
    for name, shown in LABELS.items():
        arm = arm.replace(name, shown)
    return arm


def made_on(result: dict) -> str:
    """Return the sentence that names the device and the cores of its host."""
    about = result["environment"]
    cores = sorted({row.get("cores", about["cores"]) for row in result["rows"]})
    return f"Measured on {about['device']} ({' or '.join(map(str, cores))} cores), torch {about['torch']}."
