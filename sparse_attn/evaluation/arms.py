"""What is compared: selections by name, and budgets of keys by number or by share of the length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_attn import checks
from sparse_attn.integrations.selectors import BLOCK, SELECTORS
from sparse_attn.selection import Hierarchical

SINKS = 4  # that a window keeps beside it
NAMES = (*SELECTORS, "hierarchical", "window")
ORACLE = "exact"  # each head's own best keys: what the others stand in for
DENSE = "dense"
TAILS: dict[str, bool | str] = {"tail": True, "blocks": "blocks"}  # the `residual` of `configure`
_BLOCKS = ("blocks", "refined_blocks", "hierarchical")  # choose whole blocks, at least on the way


@dataclass(frozen=True)
class Arm:
    """One way of choosing keys.

    Args:
        text: as it is written: NAME, then, where they are wanted, /SHARE, /reuseN and +TAIL. NAME is one of NAMES: a
            selector of `sparse_attn.integrations.transformers.configure`, "hierarchical"
            (:class:`sparse_attn.selection.Hierarchical`), or "window" (the last keys, and four sinks); SHARE is "kv" or
            "all"; of /reuseN every N-th layer selects, N at least 2, and those behind it attend to the same keys; TAIL
            is one of TAILS: "tail" gives the mass of the keys left out to the mean of their values, "blocks" counts
            them by means of whole blocks.

    Raises:
        TypeError, ValueError: the text is none of these.
    """

    text: str
    name: str = field(init=False)
    share: str = field(init=False)
    reuse: int = field(init=False)  # layers with one selection
    tail: str = field(init=False)  # "": none

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"a selector must be a name, got {checks.describe(self.text)}")
        body, plus, tail = self.text.partition("+")
        name, *marks = body.split("/")
        shares = [m for m in marks if m in ("kv", "all")]
        share, reuse = "".join(shares), _reuse_of([m for m in marks if m not in shares])
        if name not in NAMES or (plus and tail not in TAILS) or len(shares) > 1 or reuse is None:
            raise ValueError(
                f"a selector must be one of {', '.join(NAMES)}, with /kv or /all where heads share it, /reuse2 where "
                "two layers do, and +tail or +blocks where means of what is left out are added, "
                f"got {self.text!r}"
            )
        if share and name == "indexer":
            raise ValueError(
                f"an indexer's own groups say who shares: /{share} goes without, got {self.text!r}"
            )
        if tail and name in ("blocks", "window"):
            raise ValueError(f"+{tail} goes with selections of tokens by score, got {self.text!r}")
        for attribute, value in (
            ("name", name),
            ("share", share or "none"),
            ("reuse", reuse),
            ("tail", tail),
        ):
            object.__setattr__(self, attribute, value)

    @property
    def plain(self) -> str:
        """Without the tail."""
        return self.text.partition("+")[0]

    @property
    def oracle(self) -> str:
        """The exact selection that this one is beside."""
        return ORACLE + (f"+{self.tail}" if self.tail else "")

    def keys(self, budget: str, length: int) -> int | None:
        """How many keys a budget is at a length; None where this selection cannot have it."""
        keys = keys_of(budget, length)
        if self.name in _BLOCKS:
            keys = max(1, round(keys / BLOCK)) * BLOCK
            keys = keys if keys >= 3 * BLOCK else 0
        if self.name == "window" and keys <= SINKS:
            keys = 0
        return keys if 0 < keys < length else None

    def options(self, keys: int) -> dict[str, Any]:
        """Arguments of `configure`."""
        options: dict[str, Any] = {"top_k": keys, "share": self.share, "selector": self.name}
        if self.reuse > 1:
            options["reuse"] = self.reuse
        if self.tail:
            options["residual"] = TAILS[self.tail]
        if self.name == "hierarchical":
            options["selector"] = Hierarchical(BLOCK)
        if self.name == "window":
            options |= {"selector": "exact", "window": keys - SINKS, "sinks": SINKS}
        return options


def _reuse_of(marks: list[str]) -> int | None:
    """N of "reuseN"; 1 without a mark, None where there is another one."""
    if not marks:
        return 1
    number = marks[0].removeprefix("reuse")
    known = len(marks) == 1 and number != marks[0] and number.isdecimal() and int(number) > 1
    return int(number) if known else None


def keys_of(budget: str, length: int) -> int:
    """A budget, a number of keys ("256") or a share of the length ("12.5%"), in keys.

    Raises:
        ValueError: it is neither.

    Example:
        >>> from sparse_attn.evaluation.arms import keys_of
        >>> keys_of("12.5%", 2048), keys_of("64", 2048)
        (256, 64)
    """
    number, percent, rest = str(budget).strip().partition("%")
    try:
        value = float(number) if percent else int(number)
    except ValueError:
        value = -1
    if rest or not value > 0 or (percent and value > 100):
        raise ValueError(f"a budget must be a number of keys or a share such as 12.5%, got {budget!r}")
    return max(1, round(length * value / 100)) if percent else int(value)
