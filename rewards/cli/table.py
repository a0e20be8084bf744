"""Tables in plain text."""


def format_table(rows: list[tuple[str, ...]], numbers: bool = False) -> str:
    """Return rows of text as aligned columns; the first row is the header.

    numbers: align all columns but the first to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = lambda i, cell: cell.rjust(widths[i]) if numbers and i else cell.ljust(widths[i])
    lines = ["  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
