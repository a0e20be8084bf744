"""Raw results for the site: bench/results/*.md as pages, bench/results/*.json as files."""

from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

FOLDER = Path(__file__).parents[1] / "bench" / "results"


def on_files(files, config, **_):
    """Add all raw results; links of a page to the guides become those of the site."""
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8").replace("](../../docs/", "](../")
        page = File.generated(config, f"results/{path.name}", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    for path in sorted(FOLDER.glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Return a guide with its links to raw results as the site has them."""
    return markdown.replace("](../bench/results/", "](results/")
