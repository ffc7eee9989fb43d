"""The input of the text tower: random captions, encoded with only the tokens that occur in them."""

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
    """Put an article before a name: "an apple" for "apple"."""
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def fill(template: str, name: str, category: str) -> str:
    """Fill in a template; an empty category is dropped together with its comma."""
    return template.format(a=with_article(name), name=name, category=category).strip(", ")


class Vocabulary:
    """The tokens of all possible captions, renumbered without gaps in the same order, so the end token stays last.

    Args:
        words: all names and categories.
    """

    def __init__(self, words: list[str]) -> None:
        self._tokenizer = SimpleTokenizer(context_length=CONTEXT)
        texts = [*words, *(re.sub(r"\{\w+\}", " ", one) for one in (*TEMPLATES, *GLYPH_TEMPLATES)), "a an , 0 1"]
        used = sorted({0} | {token for row in self._tokenizer(texts).tolist() for token in row})
        self.token_ids = torch.tensor(used)  # (used,): the old number of each new one
        self._new = {old: new for new, old in enumerate(used)}

    @functools.lru_cache(maxsize=200_000)  # noqa: B019 - one vocabulary per process
    def row(self, caption: str) -> tuple[int, ...]:
        """Return the new token numbers of a caption, with start and end tokens and without padding."""
        old = self._tokenizer([caption])[0].tolist()
        length = old.index(max(old)) + 1
        return tuple(self._new[token] for token in old[:length])

    def batch(self, captions: list[str]) -> torch.Tensor:
        """Return the new token numbers, padded with zeros: int64, (captions, length of the longest caption)."""
        rows = [self.row(caption) for caption in captions]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        return tokens


def draw_caption(
    names: tuple[str, ...], categories: tuple[str, ...], glyph: bool, bare_rate: float, rng: random.Random
) -> tuple[str, str]:
    """Draw a random caption for a picture, and return it with the name or category that it describes.

    Args:
        names: most exact name first; `names` and `categories` must not both be empty.
        glyph: whether the picture is a character.
        bare_rate: probability that the caption is the name or category alone.
    """
    by_name = names and (not categories or rng.random() < (0.85 if glyph else 0.65))
    about = rng.choice(names if by_name else categories)
    if rng.random() < bare_rate:
        return about, about
    template = rng.choice(GLYPH_TEMPLATES if glyph else TEMPLATES)
    category = rng.choice(categories) if by_name and categories else ""
    return fill(template, about, category), about
