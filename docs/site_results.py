"""Pages of raw results for the site: mkdocs shows bench/results/*.md as results/*.md."""

from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

FOLDER = Path(__file__).parents[1] / "bench" / "results"


def on_files(files, config, **_):
    """Add a page for each file of raw results, with links to the guides as the site has them."""
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8").replace("](../../docs/", "](../")
        page = File.generated(config, f"results/{path.name}", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Return a guide with its links to raw results as the site has them."""
    return markdown.replace("](../bench/results/", "](results/")
