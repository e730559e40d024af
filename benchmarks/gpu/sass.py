"""What machine code says of a kernel without a GPU: its loops, what each issues, registers, spills, shared memory.

A loop is found by an edge back to a block that dominates it. Its instructions are those of its blocks that no inner
loop has: the ones that every turn issues, and those behind a branch.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda" / "kernels"
FLAGS = ["-cubin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]


@dataclass
class Loop:
    header: int  # address of its first block
    inner: list[Loop] = field(default_factory=list)
    always: Counter = field(default_factory=Counter)  # opcode → how many every turn issues, inner loops apart
    branches: list[Counter] = field(default_factory=list)  # the same of each block that a turn may pass by

    def __iter__(self):
        """This loop and all in it."""
        yield self
        for loop in self.inner:
            yield from loop

    @property
    def sometimes(self) -> Counter:
        return sum(self.branches, Counter())

    def count(self, name: str) -> int:
        """Of a turn, inner loops apart: instructions whose opcode begins with the name."""
        return count(self.always + self.sometimes, name)


def count(opcodes: Counter, name: str) -> int:
    return sum(n for op, n in opcodes.items() if op.startswith(name))


@dataclass
class Kernel:
    name: str  # demangled, without its parameters
    registers: int
    stack: int  # bytes of local memory of a thread: spills, and arrays that are not in registers
    shared: int  # bytes, the static ones
    loops: list[Loop]  # the outermost
    length: int  # instructions in all

    def all_loops(self) -> list[Loop]:
        return [inner for loop in self.loops for inner in loop]


def tool(name: str) -> str | None:
    """Beside Triton, or on the PATH."""
    import importlib.util

    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    return shutil.which(name)


def compiled(source: Path, arch: str = "90a") -> bytes:
    """The cubin of one .cu for one GPU: the extension's own where that is built for it, else nvcc's, kept under build/
    until a source changes."""
    inputs = [source, *KERNELS.glob("**/*.*h"), *(ROOT / "csrc" / "common").glob("*.h")]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(inputs))).hexdigest()[:16]
    target = ROOT / "build" / "cubin" / f"{source.stem}-{arch}-{digest}.cubin"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{source.stem}-{arch}-*.cubin"):
            old.unlink()
        youngest = max(p.stat().st_mtime for p in inputs)
        objects = (ROOT / "build").glob(f"native-*/cuda/{source.stem}.cu.o")
        built = [taken_from(o, arch) for o in objects if o.stat().st_mtime > youngest]
        fresh = target.with_suffix(".new")
        fresh.write_bytes(next(filter(None, built), b"") or by_nvcc(source, arch))
        fresh.replace(target)
    return target.read_bytes()


def taken_from(built: Path, arch: str) -> bytes | None:
    """The cubin of an object file that the extension was linked of, or None where it has none for that GPU."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cuobjdump, "-xelf", f"sm_{arch}", built], cwd=folder, capture_output=True)
        found = list(Path(folder).iterdir())
        return found[0].read_bytes() if len(found) == 1 else None


def by_nvcc(source: Path, arch: str) -> bytes:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        target_of = f"arch=compute_{arch},code=sm_{arch}"
        subprocess.run([nvcc, *FLAGS, "-gencode", target_of, str(source), "-o", file.name], check=True)
        return Path(file.name).read_bytes()


def kernels_of(cubin: bytes) -> list[Kernel]:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise FileNotFoundError("cuobjdump is neither beside Triton nor on the PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([cuobjdump, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-sass", "-res-usage")
        ]
    usage = {
        mangled: tuple(map(int, numbers))
        for mangled, *numbers in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", texts[1]
        )
    }
    found = []
    for part in texts[0].split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        registers, stack, shared, local = usage[mangled]
        code = [
            (int(address, 16), text.strip())
            for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        ]
        found.append(Kernel(demangled(mangled), registers, stack + local, shared, loops(code), len(code)))
    return found


@cache
def demangled(mangled: str) -> str:
    """`select_kernel<BFloat, 128>` of the mangled name; without c++filt the mangled one."""
    demangler = shutil.which("c++filt")
    if demangler is None or not mangled.startswith("_Z"):
        return mangled
    name = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"sparse_attn::(cuda::)?|\(anonymous namespace\)::|^void |\(int\)|\(bool\)", "", name)
    return name.split("(")[0]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def loops(code: list[tuple[int, str]]) -> list[Loop]:
    """The outermost loops of a kernel's instructions (address, text)."""
    blocks, successors = blocks_of(code)
    dominators = dominators_of(blocks, successors)
    predecessors: dict[int, set[int]] = {b: set() for b in blocks}
    for block, following in successors.items():
        for other in following:
            predecessors[other].add(block)
    members: dict[int, set[int]] = {}  # header → blocks of the loop
    latches: dict[int, set[int]] = {}
    for block, following in successors.items():
        for header in following & dominators.get(block, set()):
            inside, waiting = members.setdefault(header, {header}), [block]
            latches.setdefault(header, set()).add(block)
            while waiting:
                at = waiting.pop()
                if at not in inside:
                    inside.add(at)
                    waiting += [p for p in predecessors[at] if p in dominators]
    made = {header: Loop(header) for header in members}
    outermost = []
    for header, inside in members.items():
        around = [h for h in members if h != header and header in members[h]]
        parent = min(around, key=lambda h: len(members[h]), default=None)
        (outermost if parent is None else made[parent].inner).append(made[header])
        for block in inside:
            owner = min((h for h in members if block in members[h]), key=lambda h: len(members[h]))
            if owner == header:
                own = Counter(op for op in map(opcode, blocks[block]) if op != "NOP")
                if all(block in dominators[latch] for latch in latches[header]):
                    made[header].always += own
                else:
                    made[header].branches.append(own)
    return outermost


def blocks_of(code: list[tuple[int, str]]) -> tuple[dict[int, list[str]], dict[int, set[int]]]:
    """Address → instructions of each basic block, and address → those that may follow."""
    jumps = {}  # address → where to
    for address, text in code:
        op = opcode(text)
        # A divergence that the compiler provides for and convergent code never has, is no way.
        if op.split(".")[0] == "BRA" and not op.startswith("BRA.DIV"):
            jumps[address] = int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)
    starts = {code[0][0], *jumps.values()} if code else set()
    blocks: dict[int, list[str]] = {}
    successors: dict[int, set[int]] = {}
    current = None
    for n, (address, text) in enumerate(code):
        if current is None or address in starts:
            if current is not None:
                successors[current].add(address)
            current = address
            blocks[current], successors[current] = [], set()
        blocks[current].append(text)
        ends = address in jumps or opcode(text).split(".")[0] in ("EXIT", "RET", "BRX", "KILL")
        if ends:
            conditional = text.startswith("@") or re.search(r"\bBRA(\.\w+)*\s+!?U?P", text)
            if address in jumps:
                successors[current].add(jumps[address])
            if conditional and n + 1 < len(code):
                successors[current].add(code[n + 1][0])
            current = None
    return blocks, {b: {s for s in following if s in blocks} for b, following in successors.items()}


def dominators_of(blocks: dict[int, list[str]], successors: dict[int, set[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached: the blocks that every way to it passes."""
    if not blocks:
        return {}
    first = next(iter(blocks))
    order, seen, waiting = [], set(), [(first, iter(successors[first]))]
    seen.add(first)
    while waiting:
        block, following = waiting[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                waiting.append((other, iter(successors[other])))
                break
        else:
            order.append(block)
            waiting.pop()
    order.reverse()
    predecessors: dict[int, list[int]] = {b: [] for b in order}
    for block in order:
        for other in successors[block]:
            predecessors[other].append(block)
    found = {b: set(order) for b in order}
    found[first] = {first}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(found[p] for p in predecessors[block])) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


def main() -> None:
    """Every loop of the kernels of a .cu: `python -m benchmarks.gpu.sass topk_select [arch [kernel]]`."""
    import sys

    source = KERNELS / f"{sys.argv[1]}.cu"
    for kernel in kernels_of(compiled(source, *sys.argv[2:3])):
        if len(sys.argv) > 3 and sys.argv[3] not in kernel.name:
            continue
        print(
            f"{kernel.name}: {kernel.registers} registers, {kernel.stack} B stack, {kernel.length} instructions"
        )

        def show(loop: Loop, depth: int) -> None:
            common = (loop.always + loop.sometimes).most_common(8)
            issued = f"always {loop.always.total()} sometimes {loop.sometimes.total()}"
            print(
                f"  {'  ' * depth}{loop.header:#06x} {issued}: {', '.join(f'{n} {op}' for op, n in common)}"
            )
            for inner in sorted(loop.inner, key=lambda x: x.header):
                show(inner, depth + 1)

        for loop in sorted(kernel.loops, key=lambda x: x.header):
            show(loop, 0)


if __name__ == "__main__":
    main()
