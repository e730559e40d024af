"""`sparse-attn doctor`: what runs on this machine, what does not and why, and whether it computes right."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import sparse_attn
from sparse_attn.cli import report as bug_report
from sparse_attn.cli.console import available_devices, table
from sparse_attn.cli.selfcheck import self_check
from sparse_attn.wings import base, extension

HELP = "what runs on this machine, what does not and why, with a self-check of each backend"

DESCRIPTION = """\
Prints the versions that matter, what the processor offers, and for each backend ("wing") of sparse_attn on each
device of this machine whether it is there, or why it is not. Each wing that is there computes one small attention,
forward and backward, and is held against a float64 computation and against scaled_dot_product_attention.
"""

EPILOG = """\
exit code: 0 if every wing that is there computes right, 1 if one does not.

examples:
  sparse-attn doctor
  sparse-attn doctor --report > report.md     a bug report to fill in, with all that one needs
  sparse-attn doctor --json > doctor.json     for a script
"""

# What the CPU kernels may use, as /proc/cpuinfo spells it.
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of tables")
    form.add_argument(
        "--report",
        action="store_true",
        help="print a bug report in Markdown: this, packages, settings of threads",
    )


def run(arguments: argparse.Namespace) -> int:
    report = examine()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(bug_report.render(render(report)) if arguments.report else render(report))
    return 0 if report["ok"] else 1


def examine() -> dict:
    """Everything that the doctor reports, as plain data."""
    wings = [_wing(wing, device) for device in available_devices() for wing in base.wings()]
    return {
        "versions": _versions(),
        "extension": _extension(),
        "cpu": _cpu(),
        "devices": [_device(name) for name in available_devices()],
        "wings": wings,
        "ok": all(wing["check"]["passed"] for wing in wings if wing["check"]),
    }


def _versions() -> dict[str, str | None]:
    return {
        "sparse_attn": sparse_attn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch was built for": f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU",
        "CUDA driver": _cuda_driver(),
        "triton": _installed("triton"),
        "rich": _installed("rich"),
        "matplotlib": _installed("matplotlib"),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda_driver() -> str | None:
    """The kernel driver's version, which is there (or not) whatever torch was built for."""
    try:
        first_line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", first_line)
    return found.group() if found else first_line


def _extension() -> dict:
    if extension.module is None:
        return {"loaded": False, "why_not": extension.load_error}
    return {"loaded": True, **extension.module.build_info()}


def _cpu() -> dict:
    features, model = set(), platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features = set(value.split())
            elif name.strip() == "model name":
                model = value.strip()
    except OSError:
        pass  # not Linux: only what `platform` knows
    isa = getattr(extension.module, "cpu_isa", None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "architecture": platform.machine(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "features": [name for name in FEATURES if name in features],
        "simd_level": isa() if isa else None,
    }


def _device(name: str) -> dict:
    if name in ("cuda", "xpu"):
        module = getattr(torch, name)
        names = [module.get_device_name(i) for i in range(module.device_count())]
        return {"type": name, "names": names}
    return {"type": name, "names": []}


def _wing(wing: base.Wing, device: str) -> dict:
    reason = wing.why_not("topk_attention", torch.device(device), torch.float32)
    check = self_check(wing.name, device) if reason is None else None
    return {
        "wing": wing.name,
        "device": device,
        "available": reason is None,
        "why_not": reason,
        "check": check,
    }


def render(report: dict) -> str:
    """The report for the eye."""
    cpu, extension = report["cpu"], report["extension"]
    parts = [_pairs("versions", {k: v or "not there" for k, v in report["versions"].items()})]
    parts.append(
        _pairs(
            "processor",
            {
                "model": f"{cpu['model']} ({cpu['architecture']})",
                "cores": f"{cpu['usable_cores']} usable, torch runs {cpu['torch_threads']} threads",
                "features": " ".join(cpu["features"]) or "unknown",
                "CPU kernels use": cpu["simd_level"] or "no compiled kernels",
            },
        )
    )
    if extension["loaded"]:
        facts = {
            "compiler": extension.get("compiler"),
            "torch": f"built with {extension.get('torch_headers')}, runs with ≥ {extension.get('torch_target')}",
            "SIMD levels": " ".join(extension.get("isas", ())),
            "CUDA": extension.get("cuda") or f"no ({extension.get('no_cuda') or 'built without'})",
        }
        if extension.get("cuda"):
            facts["CUDA targets"] = " ".join(extension["cuda_archs"])
        parts.append(_pairs("compiled extension", facts))
    else:
        parts.append(_pairs("compiled extension", {"not loaded": extension["why_not"]}))
    devices = {d["type"]: ", ".join(d["names"]) or "there" for d in report["devices"]}
    parts.append(_pairs("devices", devices))
    rows = [
        [
            wing["wing"],
            wing["device"],
            "yes" if wing["available"] else f"no: {wing['why_not']}",
            _verdict(wing["check"]),
        ]
        for wing in report["wings"]
    ]
    parts.append(
        table("wings (float32), the most preferred first", ["wing", "device", "there", "self-check"], rows)
    )
    parts.append(
        "Every wing that is there computes right."
        if report["ok"]
        else "A SELF-CHECK FAILED: do not trust that wing's results; please report this with the output of "
        "`sparse-attn doctor --report`."
    )
    return "\n\n".join(parts)


def _pairs(title: str, facts: dict[str, object]) -> str:
    width = max(map(len, facts))
    return "\n".join([title, *(f"  {name.ljust(width)}  {fact}" for name, fact in facts.items())])


def _verdict(check: dict | None) -> str:
    if check is None:
        return "–"
    if check["error"]:
        return f"FAILED: {check['error']}"
    return f"{'passed' if check['passed'] else 'FAILED'} (largest relative error {max(check['errors'].values()):.0e})"
