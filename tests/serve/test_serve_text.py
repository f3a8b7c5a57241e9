"""Text while it grows: pieces add up to the whole whatever a token cuts in two, and stop strings end it at one place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from intaglio.serve.text import Detokenizer, StopStrings

TEXTS = [
    "plain text",
    "Grüße, 你好, こんにちは",
    "👩‍👩‍👧 family 🇩🇪",
    "a\u0301 é \u200d end",
    "� itself �",
    " lead and trail ",
    "",
]


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def sentence_pieces():
    """Llama 2's kind: words begin with ▁, unknown characters are bytes, the first space of a text is not shown."""
    words = ["▁", "▁the", "▁a", "the", "a", "e", "n", "d", "▁plain", "▁text"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


BYTES, PIECES = byte_level(), sentence_pieces()


def as_bytes(text):
    """Each byte of a text a token, as in a tokenizer that knows no words."""
    return [PIECES.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]


def streamed(tokenizer, tokens, sizes, context=()):
    detokenizer, pieces, rest = Detokenizer(tokenizer, context), [], list(tokens)
    for size in sizes:
        pieces.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    pieces.append(detokenizer.push(rest))
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("text", [*TEXTS, "".join(TEXTS) * 20])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_pieces_are_the_whole_text(text, size):
    tokens = BYTES.encode(text)
    assert "".join(streamed(BYTES, tokens, [size] * len(tokens))) == text
    tokens = as_bytes(text)
    assert "".join(streamed(PIECES, tokens, [size] * len(tokens))) == PIECES.decode(tokens)


def test_nothing_half_is_shown():
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push([token]) for token in BYTES.encode("a👩b")] == ["a", "", "", "", "👩", "b"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=300), st.lists(st.integers(0, 9), max_size=40))
def test_any_bytes_at_all(tokens, sizes):
    """A model may say bytes that are no text; all of them are shown, in the end, as decoding at once shows them."""
    assert "".join(streamed(BYTES, tokens, sizes)) == BYTES.decode(tokens, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["▁", "▁the", "a", "e", "▁text", "</s>"]), max_size=60), st.lists(st.integers(0, 4), max_size=20))
def test_spaces_between_words(words, sizes):
    tokens = PIECES.convert_tokens_to_ids(words)
    found = "".join(streamed(PIECES, tokens, sizes))
    assert found == PIECES.decode(tokens, skip_special_tokens=True)


def test_a_completion_keeps_the_space_before_its_first_word():
    prompt, tokens = (PIECES.convert_tokens_to_ids(words) for words in (["▁plain"], ["▁text", "▁a"]))
    assert "".join(streamed(PIECES, tokens, [1, 1], prompt)) == " text a"
    assert "".join(streamed(PIECES, tokens, [1, 1])) == "text a"


def test_bytes_that_never_end_cost_no_more_each():
    class Counting:
        longest = 0

        def decode(self, tokens, skip_special_tokens):
            self.longest = max(self.longest, len(tokens))
            return BYTES.decode(tokens, skip_special_tokens=skip_special_tokens)

    counting, broken = Counting(), BYTES.encode("é")[:1] * 1000
    assert "".join(streamed(counting, broken, [1] * 1000)) == "�" * 1000
    assert counting.longest < 200


def reference(text, stops):
    """Where the first stop string ends, character by character."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 5)))
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, sizes):
    watch, out, rest = StopStrings(stops), "", text
    for size in [*sizes, len(text)]:
        if not watch.hit:
            out += watch.push(rest[:size])
            rest = rest[size:]
    out += "" if watch.hit else watch.flush()
    assert (out, watch.hit) == reference(text, stops)


def test_what_cannot_begin_a_stop_string_is_not_held_back():
    watch = StopStrings(["\n\nUser:"])
    assert [watch.push(piece) for piece in ["Hello", "\n", "there", "\n\nUs", "er", ": x"]] == [
        "Hello",
        "",
        "\nthere",
        "",
        "",
        "",
    ]
    assert watch.hit
