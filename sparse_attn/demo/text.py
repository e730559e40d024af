"""A text to learn: characters as tokens, the last tenth held out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy
import torch
from torch import Tensor

HELD_OUT = 0.1
WINDOWS = 64  # of the held-out text, on which validation loss is always measured


@dataclass(frozen=True)
class Corpus:
    """A text as token ids: token i is the character `alphabet[i]`."""

    name: str
    alphabet: str
    train: Tensor  # int64 [N]
    held_out: Tensor  # int64 [M]

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(character) for character in text]

    def decode(self, ids: list[int] | Tensor) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def train_starts(self, steps: int, batch: int, context: int, seed: int) -> Tensor:
        """Where each window of each step starts, int64 [steps, batch]: the data order, fixed by the seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.train) - context, (steps, batch), generator=generator)

    def held_out_starts(self, context: int) -> Tensor:
        """Starts of the fixed validation windows, spread evenly."""
        last = len(self.held_out) - context - 1
        return torch.linspace(0, last, min(WINDOWS, last + 1)).long()


def windows(ids: Tensor, starts: Tensor, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(inputs, targets), each int64 [len(starts), context]; a target is the next character."""
    chosen = ids[starts[:, None] + torch.arange(context + 1)].to(device)
    return chosen[:, :-1], chosen[:, 1:]


def load(path: str | None, context: int) -> Corpus:
    """The text of `path`, or the State of the Union addresses that come with the package.

    Raises:
        ValueError: it cannot be read, or is too short for windows of `context` characters.
    """
    if path is None:
        name = "State of the Union, 1790–1990"
        text = (resources.files("sparse_attn") / "data" / "state_of_the_union.txt").read_text("utf-8")
    else:
        name, text = Path(path).name, read(path)
    needed = int((context + 1) / HELD_OUT) + 1
    if len(text) < needed:
        raise ValueError(
            f"{path or 'the text'} has {len(text):,} characters, and a context of {context} needs at least "
            f"{needed:,} (a tenth is held out)"
        )
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    alphabet, ids = numpy.unique(codes, return_inverse=True)
    ids = torch.from_numpy(ids.astype(numpy.int64))
    split = len(ids) - int(len(ids) * HELD_OUT)
    return Corpus(name, "".join(map(chr, alphabet)), ids[:split], ids[split:])


def opening(corpus: Corpus, longest: int) -> str:
    """The first words of the held-out text, whole ones if there are any: a prompt."""
    text = corpus.decode(corpus.held_out[: longest + 1])
    line = text.lstrip().split("\n")[0]
    return line[:longest].rpartition(" ")[0] or text[:longest]


def read(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: there is none; the message begins with the path.
    """
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} is not)") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
