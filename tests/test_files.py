"""Files that users name: nothing in them is run, sizes are looked at first, what does not fit is one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy
import pytest
import torch

from sparse_attn import WidthPlan, files
from sparse_attn.bench import inputs
from sparse_attn.cli.console import UsageError
from sparse_attn.cli.plan import read_counts
from sparse_attn.planner import count_tokens

PLAN = WidthPlan(12, (12, 5, 2), [2, 0, 1, 2, 2])


class Hostile:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def hostile(tmp_path):
    """What to pickle; afterwards nothing may have run."""
    yield Hostile(tmp_path / "ran")
    assert not (tmp_path / "ran").exists()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def one_sentence(path, call, words=""):
    """The call's ValueError, in one line that names the file."""
    with pytest.raises((ValueError, UsageError)) as caught:
        call(path)
    text = str(caught.value)
    assert str(path) in text
    assert words in text
    assert "\n" not in text
    assert len(text) < 600
    return text


# ---- plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_plan_in_weights_only(protocol):
    file = io.BytesIO()
    torch.save({"plan": PLAN, "weight": torch.ones(2)}, file, pickle_protocol=protocol)
    file.seek(0)
    if protocol == 2:  # torch's own; its restricted unpickler does not know all of later ones
        assert torch.load(file, weights_only=True)["plan"] == PLAN
    assert pickle.loads(pickle.dumps(PLAN, protocol)) == PLAN


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token_band": torch.tensor([0, 3])}, "lie in"),
        ({"token_band": torch.tensor([0.0])}, "integers"),
        ({"token_band": "no"}, "integers"),
        ({"widths": [0]}, "at least 1"),
        ({"widths": (1 << 40,)}, "at most"),
        ({"embedding_dim": 1 << 40}, "at most"),
        ({"token_band": torch.zeros(1, dtype=torch.int32).expand(1 << 40)}, "claims 4,398,046,511,104 bytes"),
    ],
)  # fmt: skip
def test_a_pickled_plan_checks_itself(tmp_path, monkeypatch, changed, words):
    """As somebody would write it who wants another plan to be read."""
    state = {"embedding_dim": 12, "widths": (12, 5, 2), "token_band": PLAN.token_band} | changed
    with monkeypatch.context() as patch:
        patch.setattr(WidthPlan, "__getstate__", lambda plan: state)
        data, file = pickle.dumps(PLAN), io.BytesIO()
        torch.save(PLAN, file)
    with pytest.raises((TypeError, ValueError), match=words):
        pickle.loads(data)
    path = write(tmp_path / "plan.pt", file.getvalue())
    one_sentence(path, lambda path: files.read_tensors(path, "plan"), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        (PLAN.to_json()[:-20], "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[1, 2]", "a plan is a JSON object"),
        (PLAN.to_json().replace("[2, 0, 1, 2, 2]", "[2, 0, 1, 2]"), "num_embeddings must be 4"),
        (PLAN.to_json().replace("[2, 0, 1, 2, 2]", "[2, 0, 1, 2, 1]"), "band_sizes must be [1, 2, 2]"),
        (PLAN.to_json().replace("[2, 0, 1, 2, 2]", "[2, 0, 1, 2, 0.5]"), "must hold integers"),
        (PLAN.to_json().replace("[2, 0, 1, 2, 2]", "[2, 0, 1, 2, 1e999]"), "must hold integers"),
        (PLAN.to_json().replace("[2, 0, 1, 2, 2]", str([2, 0, 1, 2, 10**30])), "integers"),
        (PLAN.to_json().replace('"embedding_dim": 12', '"embedding_dim": 4294967296'), "at most 2147483647"),
        (PLAN.to_json().replace('"widths"', '"width"'), "lacks widths"),
    ],
)
def test_files_that_are_no_plans(tmp_path, content, words):
    one_sentence(write(tmp_path / "plan.json", content), WidthPlan.from_json, words)


def test_a_file_is_not_read_past_what_a_plan_can_have(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.to_json(path)
    with pytest.raises(ValueError, match="holds no plan: it has more than 100 bytes"):
        files.read_text(path, "plan", most=100)
    assert files.read_text(path, "plan") == PLAN.to_json()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.to_json(path)

    def interrupt(self, text, encoding):
        self.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            WidthPlan(4, [4], [0]).to_json(path)
    assert WidthPlan.from_json(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


# ---- counts --------------------------------------------------------------------------------------------


def npy(shape, data=b"", descr="<i8"):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (63 - (10 + len(header)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def test_counts_that_are_counts(tmp_path):
    wanted = [3, 0, 5]
    for name, content in (
        ("c.npy", npy((3,), numpy.array(wanted).tobytes())),
        ("c.txt", "3\n0\n5\n"),
        ("c.json", "[3, 0, 5]"),
        ("d.json", '{"2": 5, "0": 3}'),
    ):
        counts = read_counts(write(tmp_path / name, content))
        assert counts.tolist() == wanted
        assert counts.dtype == (numpy.float64 if name == "c.txt" else numpy.int64)
        assert type(counts) is numpy.ndarray


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.npy", npy((1 << 60,))),  # the header claims an exabyte
        ("c.npy", npy((3,), b"\0" * 23)),  # truncated
        ("c.npy", npy((-3,), b"\0" * 24)),
        ("c.npy", npy((1 << 40, 1 << 40))),
        ("c.npy", npy((3,), b"\0" * 24, descr="|O")),
        ("c.npy", b"\x93NUMPY\x01\x00"),
        ("c.npy", b""),
        ("c.json", "[" * 100_000),
        ("c.json", '{"1": [1]}'),
        ("c.json", '{"0": 1e400, "1": "x"}'),
        ("c.json", '{"134217729": 1}'),
        ("c.json", b"\xff"),
        ("c.txt", b"\xff"),
    ],
)
def test_files_that_are_no_counts(tmp_path, name, content):
    one_sentence(write(tmp_path / name, content), read_counts)


def test_pickles_are_no_counts(tmp_path, hostile):
    for content in (pickle.dumps(hostile), npy((1,), pickle.dumps(hostile), descr="|O")):
        one_sentence(write(tmp_path / "c.npy", content), read_counts)
    numpy.savez(tmp_path / "c.npz", a=numpy.ones(3))
    one_sentence(write(tmp_path / "c.npy", (tmp_path / "c.npz").read_bytes()), read_counts)


def test_a_truncated_file_of_ids(tmp_path):
    one_sentence(write(tmp_path / "train.bin", b"\0" * 7), count_tokens, "whole ids of 2 bytes")
    one_sentence(
        write(tmp_path / "train.bin", b"\xff" * 8),
        lambda path: count_tokens(path, dtype="uint32"),
        "vocabulary",
    )


# ---- tensors -------------------------------------------------------------------------------------------


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def bomb():
    """A zip file of torch.save's form whose entry is a thousand times what the file has."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    return file.getvalue()


BROKEN = {
    "empty": b"",
    "truncated": saved({"a": torch.ones(100)})[:-300],
    "text": b"hello",
    "the old format": saved({"a": torch.ones(3)}, _use_new_zipfile_serialization=False),
    "a bomb": bomb(),
    "another zip": saved({"a": torch.ones(3)}).replace(b"data.pkl", b"data.pk_"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_hold_no_tensors(tmp_path, name):
    path = write(tmp_path / "state.pt", BROKEN[name])
    one_sentence(path, lambda path: files.read_tensors(path, "tensors"), "holds no tensors: ")


def test_tensors_are_read_and_nothing_is_run(tmp_path, hostile):
    path = write(tmp_path / "state.pt", saved({"a": torch.arange(3), "plan": PLAN, "n": [1.5]}))
    found = files.read_tensors(path, "tensors")
    assert found["plan"] == PLAN
    assert found["a"].tolist() == [0, 1, 2]
    one_sentence(write(path, saved(hostile)), lambda path: files.read_tensors(path, "tensors"))
    one_sentence(write(path, pickle.dumps(hostile)), lambda path: files.read_tensors(path, "tensors"))
    with pytest.raises(FileNotFoundError):
        files.read_tensors(tmp_path / "none.pt", "tensors")


def test_inputs_of_the_benchmarks(tmp_path):
    good = {name: torch.ones(2, 5, 4) for name in ("query", "key", "value")}
    assert inputs._load(str(write(tmp_path / "a.pt", saved(good))))["query"].shape == (2, 5, 4)
    for number, bad in enumerate(({}, [1], {**good, "key": torch.ones(2, 4)}, {**good, "value": "x"})):
        one_sentence(write(tmp_path / f"{number}.pt", saved(bad)), lambda path: inputs._load(str(path)))


def test_results_of_a_study(tmp_path):
    from benchmarks.studies.results import Results

    path = write(tmp_path / "study.json", json.dumps({"rows": [{"a": 1}]}))
    assert Results(path, "a command", 1).rows == [{"a": 1}]
    for content in ('{"rows": [', '{"rows": 3}', "[]", "[" * 100_000):
        one_sentence(write(path, content), lambda path: Results(path, "a command", 1))
