"""The demo's text: how it is split, and what is refused."""

import pytest

from sparse_attn.demo.text import load, read


def test_held_out_text_is_the_last_tenth():
    corpus = load(None, 256)
    total = len(corpus.train) + len(corpus.held_out)
    assert len(corpus.held_out) == total // 10
    assert total > 900_000
    assert "Thomas Jefferson, 1801" in corpus.decode(corpus.train[-5000:])
    assert corpus.encode("Union") == [corpus.alphabet.index(c) for c in "Union"]


def test_what_cannot_be_read_is_a_value_error_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt cannot be read: No such file"):
        read(tmp_path / "nowhere.txt")
    (tmp_path / "short.txt").write_text("too short", "utf-8")
    with pytest.raises(ValueError, match=r"short.txt has 9 characters, and a context of 48 needs at least"):
        load(str(tmp_path / "short.txt"), 48)
