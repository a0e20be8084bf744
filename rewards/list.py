"""List the built-in rewards and those of other packages: `python -m rewards.list`."""

from importlib.metadata import EntryPoint, entry_points

from rewards.catalogue import CATALOGUE, ENTRY_POINT_GROUP
from rewards.cli.table import format_table

HEADER = ("name", "input", "frames", "range", "licence of the weights", "memory")


def main() -> None:
    """Print the table."""
    rows = [(name, e.input, e.frames, e.range, e.licence, e.memory) for name, e in sorted(CATALOGUE.items())]
    print(format_table([HEADER, *rows]))
    print(
        "\nMemory is that of the weights with default settings. Licences are those of the published weights. Weights "
        "marked\n'by your own path only' are never downloaded: get the file under its licence and pass its path."
    )
    plugins = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda plugin: plugin.name)
    if plugins:
        print("\nRewards of other packages:\n\n" + "\n".join(map(_describe_plugin, plugins)))


def _describe_plugin(plugin: EntryPoint) -> str:
    """Return a plug-in's line: name and module, and whether a built-in reward hides it."""
    hidden = f"; hidden by the built-in of this name, use {plugin.value}" if plugin.name in CATALOGUE else ""
    return f"{plugin.name}: {plugin.value}{hidden}"


if __name__ == "__main__":
    main()
