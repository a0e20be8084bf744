"""The built-in rewards at a glance, and those that other packages bring: `python -m rewards.list`."""

from importlib.metadata import EntryPoint, entry_points

from rewards.catalogue import CATALOGUE, ENTRY_POINT_GROUP
from rewards.cli.table import format_table

HEADS = ("name", "input", "frames", "range", "licence of the weights", "memory")


def main() -> None:
    """Print the table."""
    rows = [(name, e.input, e.frames, e.range, e.licence, e.memory) for name, e in sorted(CATALOGUE.items())]
    print(format_table([HEADS, *rows]))
    print(
        "\nMemory is that of the weights with default settings. Licences are those of the published weights; what is "
        "marked\n'by your own path only' is never downloaded: get it under its licence and name the file."
    )
    plugins = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda plugin: plugin.name)
    if plugins:
        print("\nAnd those of other packages:\n\n" + "\n".join(map(_told, plugins)))


def _told(plugin: EntryPoint) -> str:
    hidden = f"; a built-in has this name, so name it {plugin.value}" if plugin.name in CATALOGUE else ""
    return f"{plugin.name}: {plugin.value}{hidden}"


if __name__ == "__main__":
    main()
