"""Progress: a function, a bar, lines where rich is missing, or nothing; never on the standard output."""

import sys

import pytest

from sparse_attn.distillation import progress
from sparse_attn.distillation.progress import reporting


def go(shown, total=3):
    with reporting("walk", total, shown) as advance:
        for i in range(3):
            advance(f"at {i}")


def test_a_function_hears_every_step():
    calls = []
    go(lambda *step: calls.append(step))
    assert calls == [("walk", i + 1, 3, f"at {i}") for i in range(3)]


@pytest.mark.parametrize("shown", [None, False])
def test_nothing_is_shown(shown, capsys):
    go(shown)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("total", [3, None])
def test_a_bar(total, capsys):
    pytest.importorskip("rich")
    go(True, total)
    out, err = capsys.readouterr()
    assert out == ""
    assert "walk" in err
    assert "at 2" in err


def test_lines_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    go(True)
    assert capsys.readouterr() == ("", "walk: 3/3 at 2\n")
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    go(True, None)
    assert capsys.readouterr().err == "walk: 1 at 0\nwalk: 2 at 1\nwalk: 3 at 2\n"


def test_an_error_inside_passes_through():
    with pytest.raises(ZeroDivisionError), reporting("walk", 3, True):
        raise ZeroDivisionError


def test_wrong_progress():
    with pytest.raises(TypeError, match="progress must be True, False, None or a function, got 'yes'"):
        go("yes")
