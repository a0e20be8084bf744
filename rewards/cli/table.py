"""The one text table of all commands."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return rows as text in columns, with a line below the first row, the head.

    numbers: align all columns but the first to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = lambda i, cell: cell.rjust(widths[i]) if numbers and i else cell.ljust(widths[i])
    head, *body = ["  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join([head, "-" * max(map(len, [head, *body])), *body])
