"""A page as a test reads it."""

import html.parser

VOID = {"meta", "br", "line", "path", "polyline"}


class Reader(html.parser.HTMLParser):
    """Tags, texts by tag, and that every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text, self.texts = [], [], "", {}
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)
