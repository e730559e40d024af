"""Random calls of all ops against float64 oracles, and what came of them.

cd tests && python -m fuzz --seconds 60                 # as CI does
cd tests && python -m fuzz --cases 100000 --jobs 2      # before a release
cd tests && python -m fuzz --seed 1 --case 4711         # one case again, and a smaller one that fails likewise
cd tests && python -m fuzz soak --seconds 3600          # mixed calls from four threads: equal results, flat memory
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from fuzz.case import LARGE, draw_case, load

BATCH = 200  # cases between two words with a worker
HANGS = 1200.0  # seconds without an answer, after which a worker is taken for dead; a busy machine takes many
NOBODY = 2**64 - 1


class Worker:
    """A process capped to one instruction set, which runs batches of cases."""

    def __init__(self, isa: str, what: list[str], folder: Path) -> None:
        self.isa, self.what = isa, what  # seed, share of large cases, ops
        self.marker = folder / isa
        self.marker.write_bytes(NOBODY.to_bytes(8, "little"))
        self.log = (folder / f"{isa}.log").open("w+")
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        # MALLOC_PERTURB_ fills what the C library hands out: scratch memory of a kernel is not torch's to poison.
        environment = os.environ | {"SPARSE_ATTN_CPU_ISA": self.isa, "MALLOC_PERTURB_": "165"}
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", *self.what, self.marker],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def run(self, start: int, stop: int, step: int, deadline: float) -> dict:
        """What came of the cases; a case that ends the process is a failure, and the rest of the batch is run anew."""
        total: dict = {"failures": [], "counts": Counter(), "done": 0}
        while start < stop and time.time() < deadline:
            if self.process is None or self.process.poll() is not None:
                self.start()
            assert self.process is not None
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            hang = threading.Timer(HANGS, self.process.kill)
            hang.start()
            try:
                self.process.stdin.write(json.dumps([start, stop, step, deadline]) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            hang.cancel()
            if answer:
                found = json.loads(answer)
                total["failures"] += found["failures"]
                total["counts"].update(found["counts"])
                total["done"] += found["done"]
                return total
            code = self.process.wait()
            number = int.from_bytes(self.marker.read_bytes(), "little")
            self.log.seek(0)
            last = last_words(self.log.read())
            if number == NOBODY:
                raise RuntimeError(f"a worker for {self.isa} does not start (exit {code}): {last}")
            what = "hung, or died of signal 9" if code == -9 else f"died with {code}"
            total["failures"].append((number, f"the process {what}: {last}"))
            total["done"] += 1
            start = number + step
        return total

    def end(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()


def last_words(log: str) -> str:
    """What a process that died says of it: the sanitizer's lines or Python's, and where it was."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [
        n for n, line in enumerate(lines) if "Sanitizer" in line or "runtime error" in line or "Fatal" in line
    ]
    start = told[0] if told else max(0, len(lines) - 3)
    return " | ".join(line[:160] for line in lines[start : start + 8])


def instruction_sets() -> list[str]:
    """Those that were built and that this machine has."""
    from sparse_attn.wings import extension

    if extension.module is None:
        return ["none"]
    built = list(extension.module.build_info()["isas"])
    return built[: built.index(extension.module.cpu_isa()) + 1]


class Run:
    """Workers that share out numbers of cases, and the sum of what they say."""

    def __init__(self, arguments: argparse.Namespace, ops: list[str], isas: list[str]) -> None:
        self.arguments, self.ops, self.isas = arguments, ops, isas
        self.counts: Counter = Counter()
        self.per_isa: Counter = Counter()
        self.failures: list[tuple[str, int, str]] = []
        self.done, self.next = 0, [0] * len(isas)
        self.broken: list[str] = []
        self.lock, self.started = threading.Lock(), time.time()
        self.deadline = self.started + (arguments.seconds or 10 * 365 * 86400)

    def take(self, idle: list[Worker]) -> tuple[Worker, int] | None:
        """The worker that has run least, and the first case of its next batch: each has every len(isas)-th case."""
        with self.lock:
            worker = min(idle, key=lambda w: self.next[self.isas.index(w.isa)])
            isa = self.isas.index(worker.isa)
            start = self.next[isa] * BATCH * len(self.isas) + isa
            over = time.time() >= self.deadline or (self.arguments.cases and start >= self.arguments.cases)
            if over or len(self.failures) >= self.arguments.failures:
                return None
            self.next[isa] += 1
            idle.remove(worker)
            return worker, start

    def work(self, idle: list[Worker]) -> None:
        step = len(self.isas)
        while (taken := self.take(idle)) is not None:
            worker, start = taken
            stop = start + BATCH * step
            try:
                found = worker.run(start, min(stop, self.arguments.cases or stop), step, self.deadline)
            except RuntimeError as error:
                self.broken.append(str(error))
                return
            with self.lock:
                idle.append(worker)
                self.counts.update(found["counts"])
                self.per_isa[worker.isa] += found["done"]
                self.done += found["done"]
                self.failures += [(worker.isa, number, problem) for number, problem in found["failures"]]

    def bar(self, last: bool = False) -> None:
        passed = time.time() - self.started
        share = [self.done / self.arguments.cases] if self.arguments.cases else []
        share += [passed / self.arguments.seconds] if self.arguments.seconds else []
        filled = int(30 * min(1.0, max(share)))
        text = f"[{'#' * filled}{'.' * (30 - filled)}] {self.done} cases, {self.done / passed:.0f} a second, "
        text += f"{len(self.failures)} failures, {passed:.0f} s"
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or int(passed) % 30 == 0:
            print(text, file=sys.stderr, flush=True)

    def __call__(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            what = [str(self.arguments.seed), str(self.arguments.large), ",".join(self.ops)]
            workers = [Worker(isa, what, Path(folder)) for isa in self.isas]
            idle, jobs = list(workers), min(self.arguments.jobs, len(workers))
            threads = [threading.Thread(target=self.work, args=(idle,), daemon=True) for _ in range(jobs)]
            for thread in threads:
                thread.start()
            while any(t.is_alive() for t in threads):
                for thread in threads:
                    thread.join(1.0 / len(threads))
                self.bar()
            for worker in workers:
                worker.end()
        self.bar(last=True)
        self.report()
        if not self.done:
            self.broken.append("not one case was done in that time: nothing is shown")
            print(f"FAILED {self.broken[-1]}")
        return 1 if self.failures or self.broken else 0

    def report(self) -> None:
        passed = time.time() - self.started
        wings = sorted({key.split()[1] for key in self.counts})
        columns = sorted(
            {tuple(key.split()[1:]) for key in self.counts}, key=lambda c: (wings.index(c[0]), c[1])
        )
        print(f"{'cases':30s}" + "".join(f"{w[:3]} {d:9s}" for w, d in columns))
        for op in self.ops:
            row = "".join(f"{self.counts[f'{op} {w} {d}'] or '-':>9}    " for w, d in columns)
            print(f"{op:30s}{row}")
        print("instruction sets: " + ", ".join(f"{isa} {n}" for isa, n in self.per_isa.items()))
        print(
            f"{self.done} cases in {passed:.0f} s, {self.done / passed:.0f} a second; {len(self.failures)} failures"
        )
        for problem in self.broken:
            print(f"FAILED {problem}")
        for isa, number, problem in sorted(self.failures, key=lambda f: f[1])[: self.arguments.failures]:
            print(f"FAILED {problem[:400]}\n    {again(self.arguments, isa, number)}")


def again(arguments: argparse.Namespace, isa: str, number: int) -> str:
    """The command that runs a case again."""
    chosen = f" --ops {','.join(arguments.ops)}" if arguments.ops else ""
    chosen += f" --large {arguments.large:g}" if arguments.large != LARGE else ""
    return f"cd tests && SPARSE_ATTN_CPU_ISA={isa} python -m fuzz --seed {arguments.seed}{chosen} --case {number}"


def replay(case: dict) -> int:
    """Runs the case here, and makes it small where it fails."""
    from fuzz.shrink import shrink
    from fuzz.worker import prepare

    prepare()
    print(json.dumps(case), flush=True)  # first: the case may end the process
    small, problem = shrink(case)
    if problem is None:
        print("passes")
        return 0
    print(
        f"FAILED {problem}\na smaller case that fails in the same way:\n    python -m fuzz --text '{json.dumps(small)}'"
    )
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("ops", "soak"), default="ops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument(
        "--ops", type=lambda s: [n for n in s.split(",") if n], default=[], help="these alone, by name"
    )
    parser.add_argument(
        "--isas", type=lambda s: s.split(","), help="these instruction sets alone (all that run here)"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="processes at once")
    parser.add_argument(
        "--large", type=float, default=LARGE, help="the share of calls large enough for threads"
    )
    parser.add_argument("--failures", type=int, default=20, help="stop after so many")
    parser.add_argument(
        "--ignore-memory", action="store_true", help="of the soak: a sanitizer's own memory grows"
    )
    parser.add_argument("--case", type=int, help="run this one again")
    parser.add_argument("--text", type=json.loads, help="run the case that the text says")
    arguments = parser.parse_args()
    if arguments.what == "soak":
        from fuzz import soak

        return soak.main(arguments.seed, arguments.seconds or 3600.0, not arguments.ignore_memory)
    known = load()
    ops = arguments.ops or list(known)
    if unknown := set(ops) - set(known):
        parser.error(f"--ops knows {', '.join(known)}; got {', '.join(sorted(unknown))}")
    if arguments.text is not None:
        return replay(arguments.text)
    if arguments.case is not None:
        return replay(draw_case(arguments.seed, arguments.case, ops, arguments.large))
    if arguments.cases is None and arguments.seconds is None:
        arguments.seconds = 60.0
    return Run(arguments, ops, arguments.isas or instruction_sets())()


if __name__ == "__main__":
    sys.exit(main())
