"""Runs the tasks over a model, its documents, selections and budgets; what is in the store already is not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_attn import checks
from sparse_attn.distillation.progress import Progress, reporting
from sparse_attn.distillation.teacher import evaluating
from sparse_attn.evaluation import needles
from sparse_attn.evaluation.arms import DENSE, Arm, keys_of
from sparse_attn.evaluation.likelihood import Document, Predictions, predictions, use
from sparse_attn.evaluation.recall import recalls
from sparse_attn.evaluation.store import Store
from sparse_attn.integrations.indexers import require_indexers
from sparse_attn.integrations.low_rank import require_low_rank
from sparse_attn.integrations.options import NAME, configs_of

TASKS = ("text", "recall", "needles")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
SEVERAL = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8)  # depths of the needles of one text


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Args:
        selectors: names of selections, as :class:`sparse_attn.evaluation.Arm` reads them. The exact selection for each
            head is always added: with the tail beside selections with it, without it beside those without.
        budgets: keys per query, "256", or shares of the length, "12.5%".
        lengths: tokens per document.
        tasks: of TASKS. "text" compares cross-entropy and predictions over the last half of each document, "recall"
            says which of the best keys are found, "needles" asks for numbers that were told.
        documents: how many texts at most, per length.
        cases: texts with several needles per length, and as many with one at each of DEPTHS.
        dense: the attention of the dense rows, by transformers' name for it; None is what the model came with.
            "sparse_attn" is this package's dense attention, the same to rounding: no mask of all pairs is made of
            sliding windows, and they cost no more than they show.
        last: tokens at the end of a document that "text" looks at; None is half of them. What goes before is their
            context.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
    """

    selectors: Sequence[str] = ("exact", "exact+tail")
    budgets: Sequence[str] = ("5%", "12.5%")
    lengths: Sequence[int] = (2048,)
    tasks: Sequence[str] = TASKS
    documents: int = 10
    cases: int = 4
    dense: str | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "cases"):
            checks.integer(name, getattr(self, name), 1)
        if self.last is not None:
            checks.integer("last", self.last, 1)
        for length in self.lengths:
            checks.integer("each of lengths", length, 16)
            if self.last is not None and self.last > length:
                raise ValueError(f"last must be at most each of lengths, got {self.last} of {length} tokens")
            for budget in self.budgets:
                keys_of(budget, length)
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {task!r}")
        if self.dense is not None and not isinstance(self.dense, str):
            raise TypeError(
                f"dense must be the name of an attention of transformers, got {checks.describe(self.dense)}"
            )
        for name in ("selectors", "budgets", "lengths", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one, got none")
        self.arms()

    def arms(self) -> list[Arm]:
        """The selections, each exact one before those that it is the oracle of."""
        found: dict[str, Arm] = {}
        for text in self.selectors:
            arm = Arm(text)
            for name in (arm.oracle, arm.text):
                found.setdefault(name, Arm(name))
        return list(found.values())

    def pairs(self, length: int) -> list[tuple[Arm, int]]:
        """(selection, keys) at a length, each once."""
        found = {
            (arm.text, keys): (arm, keys)
            for budget in self.budgets
            for arm in self.arms()
            if (keys := arm.keys(budget, length)) is not None
        }
        return list(found.values())

    def without(self, length: int) -> list[str]:
        """What is asked for and cannot be had at a length, "SELECTION at BUDGET" each."""
        return [
            f"{arm.text} at {budget}"
            for budget in self.budgets
            for arm in self.arms()
            if arm.keys(budget, length) is None
        ]


def notes(model: torch.nn.Module, documents: Sequence[Document], plan: Plan) -> list[str]:
    """Sentences on what `evaluate_model` would leave out, and on lengths that the model was not made for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    said = []
    for length in plan.lengths:
        short = [d.name for d in documents if d.length < length]
        if short:
            said.append(f"not long enough for {length:,} tokens and left out there: {', '.join(short)}")
        without = plan.without(length)
        if without:
            said.append(
                f"left out at {length:,} tokens, where a budget must be below the length, of blocks at least 192 keys "
                f"(three of 64): {', '.join(without)}"
            )
        if isinstance(most, int) and length > most:
            said.append(
                f"{length:,} tokens are more than the {most:,} positions that this model was made for"
            )
    return said


def evaluate_model(
    model: torch.nn.Module,
    documents: Sequence[Document],
    plan: Plan,
    store: Store,
    *,
    encode: Callable[[str], list[int]] | None = None,
    progress: Progress | bool | None = None,
) -> None:
    """Runs `plan` over a causal model of transformers and puts a row for each document or case into `store`.

    Args:
        model: with what its selections need: indexers, fitted low-rank scorers. It is left with the attention it had.
        documents: texts as token ids, in the order in which they are taken; a length takes those that are longer.
        plan: what is run.
        store: rows that are there already are kept, and not made again.
        encode: text → token ids; "needles" needs it.
        progress: True for a progress bar, or a function called with (name, done, total, note).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message; no document is long enough for one of the
            lengths, or two have one name; no selection can have any of the budgets there.
    """
    names = {arm.name for arm in plan.arms()}
    if "indexer" in names:
        require_indexers(model, None)
    if "low_rank" in names:
        require_low_rank(model, None)
    if "needles" in plan.tasks and encode is None:
        raise ValueError("encode must turn text into token ids for the task 'needles', got None")
    check_documents(documents, plan)
    if encode is not None and "needles" in plan.tasks:  # whether there is room for them
        for length in plan.lengths:
            filler = next(d for d in documents if d.length >= length)
            needles.case(encode, filler.tokens.tolist(), length, SEVERAL, seed=0)
    others = {row.get("last") for row in store.find(task="text")} - {plan.last}
    if "text" in plan.tasks and others:
        raise ValueError(
            f"{store.file} has results of the last {_tokens(others.pop())} of each document, and these would be of "
            f"the last {_tokens(plan.last)}: choose another file"
        )
    before = [(config, _attention_of(config)) for config in configs_of(model)]
    run = _Run(model, plan, store, encode)
    try:
        with evaluating(model):
            for length in plan.lengths:
                steps = list(run.steps(documents, length))
                with reporting(f"T={length}", len(steps), progress) as advance:
                    for step in steps:
                        advance(step())
    finally:
        for config, fields in before:
            for field in _attention_of(config):
                del config.__dict__[field]
            config.__dict__.update(fields)


def _tokens(last: int | None) -> str:
    return "half" if last is None else f"{last} tokens"


def check_documents(documents: Sequence[Document], plan: Plan) -> None:
    """What would end a run when hours of it are over, or be taken for done."""
    names = [document.name for document in documents]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"documents must have different names, by which results are kept, got {name} twice"
            )
    for length in plan.lengths:
        if all(document.length < length for document in documents):
            longest = max(documents, key=lambda d: d.length, default=None)
            has = (
                "there is none"
                if longest is None
                else f"the longest, {longest.name}, has {longest.length + 1}"
            )
            raise ValueError(f"no document has more than {length} tokens, which lengths asks for: {has}")
        if not plan.pairs(length):
            raise ValueError(
                f"no selection can have a budget of {' or '.join(plan.budgets)} at {length} tokens: a budget must be "
                "below the length, of blocks at least 192 keys"
            )


def _attention_of(config: Any) -> dict[str, Any]:
    """The fields of a config that say which attention its model uses, and with what options."""
    internal = "_attn_implementation_internal"
    return {k: v for k, v in config.__dict__.items() if k.startswith(f"{NAME}_") or k == internal}


class _Run:
    def __init__(self, model, plan: Plan, store: Store, encode) -> None:
        self.model, self.plan, self.store, self.encode = model, plan, store, encode
        own = model.config._attn_implementation
        self.dense_attention = plan.dense or ("sdpa" if own == NAME else own)
        self.dense: tuple[Document, Predictions] | None = None  # of the document that is being looked at

    def steps(self, documents: Sequence[Document], length: int) -> Iterable[Callable[[], str]]:
        """What is still to be done at a length; each step returns a note."""
        long = [d for d in documents if d.length >= length]
        chosen = [Document(d.name, d.tokens[: length + 1]) for d in long[: self.plan.documents]]
        pairs = self.plan.pairs(length)
        for document in chosen if "text" in self.plan.tasks else ():
            for arm, keys in [(None, None), *pairs]:
                if not self.has("text", arm, keys, length, document=document.name):
                    yield lambda d=document, a=arm, k=keys: self.text(d, a, k)
        if "recall" in self.plan.tasks and pairs:
            document = chosen[0]
            # The tail is no part of a selection.
            plain = {(arm.plain, keys): (Arm(arm.plain), keys) for arm, keys in pairs}
            missing = [p for p in plain.values() if not self.has("recall", *p, length)]
            if missing:
                yield lambda: self.recall(document, missing)
        if "needles" in self.plan.tasks:
            for number, depths in enumerate(self.cases()):
                for arm, keys in [(None, None), *pairs]:
                    if not self.has("needles", arm, keys, length, case=number):
                        filler = long[number % len(long)]
                        yield lambda n=number, d=depths, f=filler, a=arm, k=keys: self.needle(
                            n, d, f, length, a, k
                        )

    def use(self, arm: Arm | None, keys: int | None) -> None:
        use(self.model, arm, keys, self.dense_attention)

    def cases(self) -> list[tuple[float, ...]]:
        """The depths of each text's needles: one needle, at each depth, then several; all of it again for more cases,
        so that more of them leave the numbers of the others as they were."""
        return [*((depth,) for depth in DEPTHS), SEVERAL] * self.plan.cases

    def has(self, task: str, arm: Arm | None, keys: int | None, length: int, **more) -> bool:
        name = DENSE if arm is None else arm.text
        return bool(self.store.find(task=task, arm=name, keys=keys, length=length, **more))

    def add(self, task: str, arm: Arm | None, keys: int | None, length: int, **more) -> None:
        name = DENSE if arm is None else arm.text
        self.store.add({"task": task, "length": length, "arm": name, "keys": keys, **more})

    def text(self, document: Document, arm: Arm | None, keys: int | None) -> str:
        last = self.plan.last or document.length // 2
        if self.dense is None or self.dense[0] is not document:
            self.dense = None  # two at once may be more than there is memory for
            self.use(None, None)
            self.dense = document, predictions(self.model, document.tokens, last)
        said = self.dense[1]
        if arm is not None:
            self.use(arm, keys)
            said = predictions(self.model, document.tokens, last)
        beside = None if arm is None else self.dense[1]
        nats, divergence, same = said.beside(beside)
        row = {"document": document.name, "nats": nats}
        if arm is not None:
            row |= {"kl": divergence, "same": same}
        if self.plan.last is not None:
            row["last"] = self.plan.last
        self.add("text", arm, keys, document.length, **row)
        return f"{document.name}, {DENSE if arm is None else arm.text}: {row['nats']:.4f} nats"

    def recall(self, document: Document, pairs: list[tuple[Arm, int]]) -> str:
        self.use(None, None)
        for found in recalls(self.model, document.tokens[:-1], pairs):
            if self.store.find(task="recall", length=document.length, arm=found.arm, keys=found.keys):
                continue  # the layer before is looked at whatever else is
            values = {"recall": found.recall, "mass": found.mass, "least_mass": found.least_mass}
            row = {"task": "recall", "length": document.length, "arm": found.arm, "keys": found.keys}
            self.store.add({**row, "document": document.name, **values})
        return "recall"

    def needle(self, number, depths, filler: Document, length, arm, keys) -> str:
        self.use(arm, keys)
        case = needles.case(self.encode, filler.tokens.tolist(), length, depths, seed=number)
        right, nats = map(list, zip(*needles.answered(self.model, case), strict=True))
        told = {"case": number, "needles": case.needles, "depths": case.depths}
        self.add("needles", arm, keys, length, **told, right=right, nats=nats)
        return f"needles, {DENSE if arm is None else arm.text}: {sum(right)} of {len(right)}"
