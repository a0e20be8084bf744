"""The built-in rewards at a glance: `python -m rewards.list`."""

from rewards.catalogue import CATALOGUE

HEADS = ("name", "input", "frames", "range", "licence of the weights", "memory")


def main() -> None:
    """Print the table."""
    rows = [(name, e.input, e.frames, e.range, e.licence, e.memory) for name, e in sorted(CATALOGUE.items())]
    print(table([HEADS, *rows]))
    print(
        "\nMemory is that of the weights with default settings. Licences are those of the published weights; what is "
        "marked\n'by your own path only' is never downloaded: get it under its licence and name the file."
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Text in columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


if __name__ == "__main__":
    main()
