"""The site that MkDocs makes of docs/: every link leads somewhere, and nothing is fetched from elsewhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(project, folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", project / "mkdocs.yml", "--site-dir", folder]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, and what can be linked to in it."""

    def __init__(self, file):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag == "link" or "src" in attrs:
            self.loads.append(attrs.get("src") or attrs["href"])


def pages(site):
    return [file for file in site.rglob("*.html") if file.name != "404.html"]  # which has the addresses of a server's root


def test_every_link_of_the_site_leads_somewhere(site):
    read = {file: Page(file) for file in pages(site)}
    n_links = 0
    for file, page in read.items():
        for link in (*page.links, *page.loads):
            url = urlsplit(link)
            if url.scheme or not (url.path or url.fragment):
                continue
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (file, link)
            assert not url.fragment or unquote(url.fragment) in read[target].anchors, (file, link)
            n_links += 1
    assert n_links > 500


def test_no_page_loads_anything_from_elsewhere(site):
    loads = {load for file in pages(site) for load in Page(file).loads}
    assert any(load.endswith(".js") for load in loads)
    assert not [load for load in loads if urlsplit(load).netloc]


def test_an_anchor_that_is_not_there_fails_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[nowhere](training.md#nowhere)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "training.md#nowhere" in done.stderr


@pytest.mark.parametrize(("hub", "link"), [
    (None, "see `benchmarks/results/quant.json`, [Memory](memory.md#long-contexts) and `README.md`"),
    ("https://hub.example/us/it/", "see [figures](https://hub.example/us/it/blob/main/benchmarks/results/quant.json), "
     "[Memory](memory.md#long-contexts) and [the\nREADME](https://hub.example/us/it/blob/main/README.md#recipes)"),
])  # fmt: skip
def test_files_beside_the_pages_are_on_the_hub_or_named(hub, link):
    spec = importlib.util.spec_from_file_location("repository_links", ROOT / "docs" / "repository_links.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = "see [figures](../benchmarks/results/quant.json), [Memory](memory.md#long-contexts) and [the\nREADME](../README.md#recipes)"
    assert hook.on_page_markdown(text, config=SimpleNamespace(repo_url=hub)) == link
