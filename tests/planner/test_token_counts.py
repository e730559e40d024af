"""count_tokens: native and numpy, both dtypes, bad ids and bad files."""

import numpy
import pytest
import torch

from sparse_attn.planner import count_tokens, token_counts
from sparse_attn.wings import extension


@pytest.fixture(params=["native", "numpy"])
def way(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(token_counts, "_native", lambda: None)
    elif extension.module is None:
        pytest.skip(extension.load_error)
    return request.param


@pytest.fixture
def write(tmp_path):
    def write(ids, dtype="uint16"):
        path = tmp_path / "train.bin"
        numpy.asarray(ids, dtype=dtype).tofile(path)
        return path

    return write


def random_ids(count: int, top: int) -> numpy.ndarray:
    return numpy.minimum(numpy.random.default_rng(0).zipf(1.3, count), top).astype(numpy.int64)


dtypes = pytest.mark.parametrize("dtype", ["uint16", "uint32"])


@dtypes
@pytest.mark.parametrize("count", [1, 2, 3, 5, 1000, 1_300_001])
def test_counts(way, write, dtype, count):
    ids = random_ids(count, 50_000)
    path = write(ids, dtype)
    counts = count_tokens(path, 50_257, dtype)
    assert counts.dtype == torch.int64
    assert counts.tolist() == numpy.bincount(ids, minlength=50_257).tolist()
    assert count_tokens(str(path), dtype=dtype).tolist() == numpy.bincount(ids).tolist()


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(way, write, dtype, threads):
    ids = random_ids(1_000_000, 600)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert count_tokens(write(ids, dtype), dtype=dtype).tolist() == numpy.bincount(ids).tolist()
    finally:
        torch.set_num_threads(before)


@dtypes
def test_chunks(way, write, dtype, monkeypatch):
    monkeypatch.setattr(token_counts, "CHUNK", 7)
    ids = random_ids(100, 30)
    assert count_tokens(write(ids, dtype), dtype=dtype).tolist() == numpy.bincount(ids).tolist()
    ids[[61, 62, 99]] = 40, 50, 31
    path = write(ids, dtype)
    with pytest.raises(IndexError, match="id 40 at position 61 is not below vocab_size=31"):
        count_tokens(path, 31, dtype)


@dtypes
def test_an_id_out_of_range_is_named_with_its_position(way, write, dtype):
    ids = random_ids(700_000, 90)
    ids[[650_000, 650_002]] = 100, 300
    with pytest.raises(IndexError, match="id 100 at position 650000 is not below vocab_size=100"):
        count_tokens(write(ids, dtype), 100, dtype)


def test_the_largest_ids(way, write):
    assert count_tokens(write([65535, 0, 65535])).tolist() == [1] + [0] * 65534 + [2]
    assert count_tokens(write([65536, 7], "uint32"), dtype="uint32").shape == (65537,)
    with pytest.raises(IndexError, match="id 4294967295 at position 1"):
        count_tokens(write([0, 2**32 - 1], "uint32"), 10, "uint32")
    with pytest.raises(ValueError, match="ids up to 4,294,967,295, more than any vocabulary"):
        count_tokens(write([0, 2**32 - 1], "uint32"), dtype="uint32")


@pytest.mark.parametrize("dtype", [numpy.uint32, numpy.dtype("uint32")])
def test_dtype_may_be_numpys(way, write, dtype):
    assert count_tokens(write([1], "uint32"), dtype=dtype).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", ["int16", "float32", "u2", "nonsense", None, 16, torch.uint16])
def test_refuses_dtypes(write, dtype):
    with pytest.raises(ValueError, match="dtype must be 'uint16' or 'uint32'"):
        count_tokens(write([1]), dtype=dtype)


def test_refuses_files(tmp_path):
    path = tmp_path / "train.bin"
    for content, size in ((b"", 0), (b"abc", 3)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"whole ids of 2 bytes .* got {size} bytes"):
            count_tokens(path)
    with pytest.raises(FileNotFoundError):
        count_tokens(tmp_path / "none.bin")


@pytest.mark.parametrize("vocab_size", [0, -1, 2**40])
def test_refuses_vocabularies(write, vocab_size):
    with pytest.raises(ValueError, match="vocab_size must be at"):
        count_tokens(write([1]), vocab_size)


def test_a_bar_on_a_terminal(way, write, monkeypatch, capsys):
    monkeypatch.setattr(token_counts, "CHUNK", 1000)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    count_tokens(write(random_ids(5000, 9)))
    captured = capsys.readouterr()
    assert "counting train.bin" in captured.err
    assert captured.out == ""
    count_tokens(write(random_ids(5000, 9)), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(extension.module is None, reason="needs the compiled extension")
def test_the_extension_refuses_what_it_cannot_read():
    count, counts = extension.module.count_tokens, numpy.zeros(4, dtype=numpy.int64)
    ids = numpy.zeros(8, dtype=numpy.uint16)
    for tokens, into, error in (
        (ids.astype(numpy.int64), counts, TypeError),
        (ids[::2], counts, ValueError),
        (ids.reshape(2, 4), counts, ValueError),
        (ids, counts.astype(numpy.int32), ValueError),
        (ids, numpy.zeros(8, dtype=numpy.int64)[::2], ValueError),
        (ids, numpy.zeros(0, dtype=numpy.int64), ValueError),
    ):
        with pytest.raises(error):
            count(tokens, into)
    assert count(ids[:0], counts) == -1
    assert extension.module.largest_token(ids[:0]) == -1
    assert counts.sum() == 0
