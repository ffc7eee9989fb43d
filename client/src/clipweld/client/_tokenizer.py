"""CLIP's byte-pair tokenizer, token for token equal to open_clip's ``SimpleTokenizer``.

The vocabulary and the cleaning rules are OpenAI's, under the MIT licence (see LICENSES.md in this folder).
Characters newer than Unicode 14 may be split into words differently: open_clip itself splits them by the Unicode
tables of whichever ``regex`` package is installed.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
from collections.abc import Sequence
from importlib import resources

import numpy as np

# A word is a special token, a contraction, letters, one digit, or anything else that is not space. open_clip matches
# lower-cased text while ignoring case, which matters for two characters: the long s (U+017F) is equal to an s; U+0345
# is equal to a letter (iota) without being one, so nothing matches it and it is dropped.
_WORD = r"<[s\x{17F}]tart_of_text>|<end_of_text>|'[s\x{17F}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_NUM_MERGES = 49152 - 256 - 2
_WORD_CACHE_SIZE = 65536


class Tokenizer:
    """Converts text to CLIP's token ids. Loading takes a few tenths of a second; use `default_tokenizer`.

    Attributes:
        sha256: hex digest of the decompressed vocabulary file; the served model must have been made with the same one.
    """

    def __init__(self, vocabulary: bytes) -> None:
        from tokenizers import Regex, models, pre_tokenizers

        self.sha256 = hashlib.sha256(vocabulary).hexdigest()
        lines = vocabulary.decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]
        merges = [(left, right) for left, right in map(str.split, lines)]
        alphabet = _byte_alphabet()
        tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), *map("".join, merges), *_SPECIAL_TOKENS]
        vocab = {token: index for index, token in enumerate(tokens)}
        self._start, self._end = (vocab[token] for token in _SPECIAL_TOKENS)
        self._bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")
        self._split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._word_ids = functools.lru_cache(maxsize=_WORD_CACHE_SIZE)(self._encode_word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _SPECIAL_TOKENS:
            return (self._start if word == _SPECIAL_TOKENS[0] else self._end,)
        return tuple(token.id for token in self._bpe.tokenize(word))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, without start and end of text, and not cut to the context."""
        words = self._split.pre_tokenize_str(_clean(text))
        return [index for word, _ in words for index in self._word_ids(word)]

    def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Return the token ids of a batch of texts, as wide as the longest text.

        A text longer than the context is cut, and its last token becomes end of text.

        Returns:
            int32 (batch, seq_len), seq_len <= context_length, zero-padded after end of text.
        """
        rows = [[self._start, *self.encode(text), self._end][:context_length] for text in texts]
        tokens = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
            row[len(ids) - 1] = self._end
        return tokens


@functools.cache
def default_tokenizer() -> Tokenizer:
    """Return the tokenizer of the vocabulary that ships with this package; it is loaded once."""
    packed = resources.files("clipweld.client").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    return Tokenizer(gzip.decompress(packed))


def _clean(text: str) -> str:
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _byte_alphabet() -> list[str]:
    """Return the 256 characters that represent bytes, in vocabulary order: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + num_others)]]
