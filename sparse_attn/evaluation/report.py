"""Tables and a picture of what a store holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparse_attn.evaluation.arms import DENSE, ORACLE, TAILS
from sparse_attn.evaluation.intervals import Interval, interval
from sparse_attn.evaluation.store import Row, Store

ORACLES = (ORACLE, *(f"{ORACLE}+{tail}" for tail in TAILS))


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]


class Compared(NamedTuple):
    """A selection beside dense attention, over the documents that both have; intervals over documents."""

    arm: str
    keys: int
    over: Interval  # nats over dense
    kl: Interval
    same: Interval  # how often the likeliest token is dense attention's


def compared(store: Store, length: int) -> list[Compared]:
    """Each selection and budget at a length, in the order of the store."""
    dense = {r["document"]: r["nats"] for r in store.find(task="text", arm=DENSE, length=length)}
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in store.find(task="text", length=length):
        if row["arm"] != DENSE and row["document"] in dense:
            groups[row["arm"], row["keys"]].append(row)
    return [
        Compared(
            arm,
            keys,
            interval([r["nats"] - dense[r["document"]] for r in rows]),
            interval([r["kl"] for r in rows]),
            interval([r["same"] for r in rows]),
        )
        for (arm, keys), rows in groups.items()
    ]


def tables(store: Store) -> list[Table]:
    """Those of all tasks and lengths that the store has rows of."""
    found = []
    for length in sorted({row["length"] for row in store.rows}):
        for make in (_text, _recall, _needles):
            table = make(store, length)
            if table is not None:
                found.append(table)
    return found


def _name(arm: str) -> str:
    return f"{arm} (oracle)" if arm in ORACLES else arm


def _share(keys: int, length: int) -> str:
    return f"{keys} ({keys / length:.1%})"


def _half(value: Interval, scale: float, digits: int, unit: str = "") -> str:
    mean = f"{scale * value.mean:.{digits}f}{unit}"
    return mean if value.half is None else f"{mean} ± {scale * value.half:.{digits}f}"


def _text(store: Store, length: int) -> Table | None:
    dense = store.find(task="text", arm=DENSE, length=length)
    if not dense:
        return None
    ceiling = interval([r["nats"] for r in dense])
    rows = [[DENSE, "all", _half(ceiling, 1, 4), "", "", str(ceiling.count)]]
    for c in sorted(compared(store, length), key=lambda c: c.keys):
        nats = str(c.over)
        cells = [nats, _half(c.kl, 1, 4), _half(c.same, 100, 1, " %"), str(c.over.count)]
        rows.append([_name(c.arm), _share(c.keys, length), *cells])
    last = dense[0].get("last", length // 2)
    title = f"Text, the last {last:,} of {length:,} tokens (95 % intervals over documents)"
    columns = ["selection", "keys", "nats, over dense", "KL to dense", "same token", "documents"]
    return Table(title, columns, rows)


def _recall(store: Store, length: int) -> Table | None:
    rows = sorted(store.find(task="recall", length=length), key=lambda r: r["keys"])
    if not rows:
        return None
    cells = [
        [
            _name(r["arm"]),
            _share(r["keys"], length),
            *(f"{r[n]:.1%}" for n in ("recall", "mass", "least_mass")),
        ]
        for r in rows
    ]
    title = f"Which of each head's best keys are found, {length:,} tokens (the last queries of one document)"
    return Table(title, ["selection", "keys", "recall", "attention mass", "of the worst layer"], cells)


def _answers(store: Store, length: int, arm: str, keys: int | None) -> dict[int, float]:
    """Nats of an answer, the mean of each text with needles; files of earlier versions have none."""
    rows = store.find(task="needles", arm=arm, keys=keys, length=length)
    return {r["case"]: sum(r["nats"]) / len(r["nats"]) for r in rows if r.get("nats")}


def _of_answers(store: Store, length: int, arm: str, keys: int | None) -> str:
    """Of dense attention as they are, of selections over dense attention's in the same texts."""
    if arm == DENSE:
        dense = _answers(store, length, DENSE, None)
        return f"{interval(list(dense.values())).mean:.2f} in all" if dense else ""
    over = _over_dense(store, length, arm, keys)
    return str(interval(over)) if over else ""


def _over_dense(store: Store, length: int, arm: str, keys: int | None) -> list[float]:
    """Nats of an answer over dense attention's in the same texts."""
    dense = _answers(store, length, DENSE, None)
    return [n - dense[case] for case, n in _answers(store, length, arm, keys).items() if case in dense]


def _needles(store: Store, length: int) -> Table | None:
    groups: dict[tuple[str, int | None], list[Row]] = defaultdict(list)
    for row in store.find(task="needles", length=length):
        groups[row["arm"], row["keys"]].append(row)
    if not groups:
        return None
    depths = sorted({d for rows in groups.values() for r in rows if r["needles"] == 1 for d in r["depths"]})
    table = []
    for (arm, keys), rows in sorted(groups.items(), key=lambda g: g[0][1] or 0):
        single = {
            d: [r["right"][0] for r in rows if r["needles"] == 1 and r["depths"] == [d]] for d in depths
        }
        several = [sum(r["right"]) / r["needles"] for r in rows if r["needles"] > 1]
        cells = [_of(single[d]) for d in depths]
        of_several = _half(interval(several), 100, 0, " %") if several else ""
        budget = "all" if keys is None else _share(keys, length)
        nats = _of_answers(store, length, arm, keys)
        table.append([_name(arm), budget, *cells, of_several, nats])
    title = f"Needles found, {length:,} tokens: one at a depth, and several in one text (95 % intervals over texts)"
    columns = [
        "selection",
        "keys",
        *(f"at {d:.0%}" for d in depths),
        "several",
        "nats of an answer, over dense",
    ]
    return Table(title, columns, table)


def _of(found: Sequence[bool]) -> str:
    return f"{sum(found)} of {len(found)}" if found else ""


def draw(store: Store, file: Any, title: str) -> None:
    """Nats over dense attention by keys, with intervals: of text and of needles, by length. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(store)
    columns = max(1, len(panels))
    figure, axes = plt.subplots(1, columns, figsize=(8 * columns, 6), squeeze=False, layout="constrained")
    for axis, (what, length, arms) in zip(axes[0], panels, strict=False):
        for i, (arm, points) in enumerate(arms.items()):
            points.sort(key=lambda point: point[0])
            halves = [over.half or 0.0 for _, over in points]
            x, y = [keys for keys, _ in points], [over.mean for _, over in points]
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": "o", "capsize": 3}
            axis.errorbar(x, y, halves, label=_name(arm), **style)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(xscale="log", xlabel="keys per query", title=f"{what} of {length:,} tokens")
        axis.set_ylabel("nats over dense attention (0: none)")
        ticks = sorted({keys for points in arms.values() for keys, _ in points})
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


_Points = dict[str, list[tuple[int, Interval]]]  # (keys, nats over dense attention) of each selection


def _panels(store: Store) -> list[tuple[str, int, _Points]]:
    """(what, length, selections) of all that can be drawn."""
    panels: list[tuple[str, int, _Points]] = []
    for length in sorted({row["length"] for row in store.rows}):
        text: _Points = defaultdict(list)
        for c in compared(store, length):
            text[c.arm].append((c.keys, c.over))
        needles: _Points = defaultdict(list)
        for arm, keys in {(r["arm"], r["keys"]): 0 for r in store.find(task="needles", length=length)}:
            over = _over_dense(store, length, arm, keys)
            if arm != DENSE and over:
                needles[arm].append((keys, interval(over)))
        panels += [("documents", length, text)] * bool(text)
        panels += [("an answer at the end", length, needles)] * bool(needles)
    return panels
