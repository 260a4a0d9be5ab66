"""What tests of the report share: a page taken apart, and scores made from cells."""

import dataclasses
from functools import cache
from html.parser import HTMLParser

import numpy as np
from small_screen import evaluate, hold_out, screen


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that are not closed."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.words = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split()).replace("\N{NO-BREAK SPACE}", " ")


def changed(evaluation, **changes):
    if dataclasses.is_dataclass(evaluation):
        return dataclasses.replace(evaluation, **changes)
    return type(evaluation)(**{**vars(evaluation), **changes})


@cache
def evaluate_screen():
    """Scores of a model that knows half of every effect, from cells."""
    cells = screen(seed=2, lines=3, drugs=6, own=0.5)
    train, observed = hold_out(
        cells, [(f"L{c}", f"d{(2 * c + p) % 6}") for c in range(3) for p in (0, 1)]
    )
    predicted = observed.copy()
    mixed = screen(seed=3, lines=3, drugs=6, own=0.5)[: observed.n_obs].X
    predicted.X = (0.5 * observed.X + 0.5 * mixed).tocsr().astype(np.float32)
    is_control = (observed.obs["drug"] == "DMSO").to_numpy()
    rows = np.where(is_control[:, None], observed.X.toarray(), predicted.X.toarray())
    predicted.X = type(observed.X)(rows)
    return evaluate(predicted, observed, train, baselines=True, ceiling=True)
