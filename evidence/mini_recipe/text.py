"""What the text tower sees: captions drawn at random, in the tokens that occur at all."""

import functools
import random
import re

import torch
from open_clip.tokenizer import SimpleTokenizer

CONTEXT = 24  # tokens
TEMPLATES = (
    "a picture of {a}",
    "an icon of {a}",
    "clip art of {a}",
    "a photo of {a}",
    "a drawing of {a}",
    "the {name}",
    "{a}",
    "{name}, {category}",
    "{category}, {name}",
)
GLYPH_TEMPLATES = (
    "the {name}",
    "the {name}",
    "a picture of the {name}",
    "{a}",
    "a handwritten {name}",
    "a photo of the {name}",
)


def with_article(name: str) -> str:
    """ "apple" to "an apple"."""
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def fill(template: str, name: str, category: str) -> str:
    """A caption from a template; a category that is missing takes its comma along."""
    return template.format(a=with_article(name), name=name, category=category).strip(", ")


class Vocabulary:
    """The tokens of all possible captions, renumbered without gaps in their old order (so the end token stays last).

    Args:
        words: all names and categories.
    """

    def __init__(self, words: list[str]) -> None:
        self._tokenizer = SimpleTokenizer(context_length=CONTEXT)
        texts = [*words, *(re.sub(r"\{\w+\}", " ", one) for one in (*TEMPLATES, *GLYPH_TEMPLATES)), "a an , 0 1"]
        used = sorted({0} | {token for row in self._tokenizer(texts).tolist() for token in row})
        self.token_ids = torch.tensor(used)  # (used,): old number of each new number
        self._new = {old: new for new, old in enumerate(used)}

    @functools.lru_cache(maxsize=200_000)  # noqa: B019 - one vocabulary per process
    def row(self, caption: str) -> tuple[int, ...]:
        """New token numbers of a caption, start and end included, without padding."""
        old = self._tokenizer([caption])[0].tolist()
        length = old.index(max(old)) + 1
        return tuple(self._new[token] for token in old[:length])

    def batch(self, captions: list[str]) -> torch.Tensor:
        """New token numbers, int64, (captions, longest caption), padded with zeros."""
        rows = [self.row(caption) for caption in captions]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        return tokens


def draw_caption(
    names: tuple[str, ...], categories: tuple[str, ...], glyph: bool, bare_rate: float, rng: random.Random
) -> tuple[str, str]:
    """A caption for a picture, and the name or category that it is about.

    Args:
        names: most exact first; together with `categories` not empty.
        glyph: a character.
        bare_rate: how often the caption is the bare name or category.
    """
    by_name = names and (not categories or rng.random() < (0.85 if glyph else 0.65))
    about = rng.choice(names if by_name else categories)
    if rng.random() < bare_rate:
        return about, about
    template = rng.choice(GLYPH_TEMPLATES if glyph else TEMPLATES)
    category = rng.choice(categories) if by_name and categories else ""
    return fill(template, about, category), about
