"""A MkDocs hook. Pages link to files beside docs/, which the site lacks: the link leads to the hub, or, without one, is a path."""

import re
from typing import Any

_LINK = re.compile(r"\[[^\]]+\]\(\.\./(([^)#]+)[^)]*)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """MkDocs calls it with each page's text."""
    if config.repo_url:
        hub = f"{config.repo_url.rstrip('/')}/blob/main"
        return _LINK.sub(lambda link: link[0].replace("../", f"{hub}/", 1), markdown)
    return _LINK.sub(r"`\2`", markdown)
