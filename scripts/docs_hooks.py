"""What mkdocs does beside its usual work: links out of docs/ lead to copies of the repository's files in the site.

On GitHub a page links to `../benchmarks/results/cpu.csv`. The site has no folder above it, so that each such file is
copied below `repository/`, and the link leads there. A link to a file that does not exist stays as it is, and the
strict build refuses it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
OUTWARD = re.compile(r'(\]\(|\b(?:src|srcset|href)=")\.\./([^)#"\s]+)')


def on_files(files: Files, config: Any) -> Files:
    """Add each file outside docs/ that a page links to."""
    names = {
        found[2]
        for file in files.documentation_pages()
        for found in OUTWARD.finditer(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
    }
    for name in sorted(names):
        source = (ROOT / name).resolve()
        if source.is_relative_to(ROOT) and source.is_file():
            files.append(File.generated(config, f"{COPIES}/{name}", abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turn links to those files towards their copies."""

    def inward(found: re.Match[str]) -> str:
        copy = f"{COPIES}/{found[2]}"
        return f"{found[1]}{copy}" if files.get_file_from_path(copy) else found[0]

    return OUTWARD.sub(inward, markdown)
