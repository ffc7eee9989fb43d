import gzip
import hashlib
import sys
import unicodedata

import numpy as np
import open_clip.tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, basic_clean

from clipweld.client._tokenizer import default_tokenizer

CONTEXT = 24
_OPEN_CLIP = SimpleTokenizer()

# Characters in Python's Unicode tables only: how newer ones are split depends on the installed `regex`.
assigned = st.characters(exclude_categories=("Cn", "Cs"))
vocabulary = st.sampled_from(sorted(_OPEN_CLIP.encoder))
specials = ("<start_of_text>", "<END_of_text>", "!<start_of_text>", "<&#xfb06;art_of_text>", "<\u017ftart_of_text>")
contractions = ("'s", "'\u017f", "we'LL", "it're")
characters = (
    "&amp;lt;",
    "a\u0345b",
    "\u0345",
    "\u0130",
    "\u212a",
    "e\u0301",
    "\xa0",
    "\x1c",
    "\x85",
    "\uff11\xbd",
    " ",
)
odd = st.sampled_from(specials + contractions + characters)
text = st.one_of(
    st.text(assigned), st.lists(st.one_of(vocabulary, odd, st.text(assigned, max_size=3))).map("".join)
).filter(lambda value: "Cn" not in map(unicodedata.category, basic_clean(value)))  # after ftfy


def as_open_clip(texts: list[str], context_length: int) -> np.ndarray:
    return _OPEN_CLIP(texts, context_length=context_length).numpy()


def widened(tokens: np.ndarray, context_length: int) -> np.ndarray:
    return np.pad(tokens, ((0, 0), (0, context_length - tokens.shape[1])))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(text)
def test_tokens_equal_open_clip(value):
    assert default_tokenizer().encode(value) == _OPEN_CLIP.encode(value)


@settings(max_examples=100, deadline=None)
@given(st.lists(text, min_size=1, max_size=4))
def test_batches_are_cut_and_padded_as_by_open_clip(values):
    tokens = default_tokenizer()(values, CONTEXT)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(widened(tokens, CONTEXT), as_open_clip(values, CONTEXT))


def test_a_batch_is_as_wide_as_its_longest_text():
    tokens = default_tokenizer()(["a cat", "a photo of a cat"], CONTEXT)
    assert tokens.shape == (2, 7)
    np.testing.assert_array_equal(tokens[0], [49406, 320, 2368, 49407, 0, 0, 0])


def test_text_longer_than_the_context_ends_in_end_of_text():
    tokens = default_tokenizer()(["cat " * 100], CONTEXT)
    assert tokens.shape == (1, CONTEXT)
    assert tokens[0, -1] == 49407


def test_no_texts_give_no_rows():
    assert default_tokenizer()([], CONTEXT).shape == (0, 0)


def test_the_vocabulary_is_open_clip_s():
    with gzip.open(open_clip.tokenizer.default_bpe()) as file:
        assert default_tokenizer().sha256 == hashlib.sha256(file.read()).hexdigest()


@pytest.mark.slow
def test_every_assigned_character_is_split_as_in_open_clip():
    chars = [chr(code) for code in range(sys.maxunicode + 1)]
    chars = [char for char in chars if unicodedata.category(char) not in ("Cn", "Co", "Cs")]
    for start in range(0, len(chars), 16):
        words = [f"a{char}1!{char}{char}'{char} {char}" for char in chars[start : start + 16]]
        value = " | ".join(words)
        assert default_tokenizer().encode(value) == _OPEN_CLIP.encode(value), hex(ord(chars[start]))
