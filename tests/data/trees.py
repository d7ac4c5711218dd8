"""HTML as a tree, by the standard library's reading of it."""

import html.parser


class Element:
    """An element of a page."""

    def __init__(self, tag: str, attributes: dict[str, str]):
        self.tag, self.attributes = tag, attributes
        self.inside: list = []  # elements and texts

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.inside)

    def all(self, tag: str = "", kind: str = "") -> list["Element"]:
        """Elements below of that tag and class, in reading order."""
        found = []
        for each in self.inside:
            if isinstance(each, Element):
                if tag in ("", each.tag) and (not kind or kind in each.classes):
                    found.append(each)
                found += each.all(tag, kind)
        return found


class Parser(html.parser.HTMLParser):
    """Builds the tree of a page."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, page: str):
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(page)
        self.close()
        assert len(self.open) == 1, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def parsed(page: str) -> Element:
    return Parser(page).open[0]
