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
        text: as it is written: NAME, NAME/SHARE, NAME+TAIL or NAME/SHARE+TAIL. NAME is one of NAMES: a selector of
            `sparse_attn.integrations.transformers.configure`, "hierarchical"
            (:class:`sparse_attn.selection.Hierarchical`), or "window" (the last keys, and four sinks); SHARE is "kv" or
            "all"; TAIL is one of TAILS: "tail" gives the mass of the keys left out to the mean of their values,
            "blocks" counts them by means of whole blocks.

    Raises:
        TypeError, ValueError: the text is none of these.
    """

    text: str
    name: str = field(init=False)
    share: str = field(init=False)
    tail: str = field(init=False)  # "": none

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"a selector must be a name, got {checks.describe(self.text)}")
        body, plus, tail = self.text.partition("+")
        name, slash, share = body.partition("/")
        if name not in NAMES or (plus and tail not in TAILS) or (slash and share not in ("kv", "all")):
            raise ValueError(
                f"a selector must be one of {', '.join(NAMES)}, with /kv or /all where heads share it and +tail or "
                f"+blocks where means of what is left out are added, got {self.text!r}"
            )
        if share and name == "indexer":
            raise ValueError(
                f"an indexer's own groups say who shares: /{share} goes without, got {self.text!r}"
            )
        if tail and name in ("blocks", "window"):
            raise ValueError(f"+{tail} goes with selections of tokens by score, got {self.text!r}")
        for attribute, value in (("name", name), ("share", share or "none"), ("tail", tail)):
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
        if self.tail:
            options["residual"] = TAILS[self.tail]
        if self.name == "hierarchical":
            options["selector"] = Hierarchical(BLOCK)
        if self.name == "window":
            options |= {"selector": "exact", "window": keys - SINKS, "sinks": SINKS}
        return options


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
    if rest or value <= 0 or (percent and value > 100):
        raise ValueError(f"a budget must be a number of keys or a share such as 12.5%, got {budget!r}")
    return max(1, round(length * value / 100)) if percent else int(value)
