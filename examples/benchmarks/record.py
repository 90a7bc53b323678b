"""Where and with what a measurement was made, for the stored JSON; and progress on standard error."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """The hardware and operating system, without names of hosts or users."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = f"{platform.system()} {platform.release()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "cpu": f"{model} ({platform.machine()})",
        "cores": cores,
        "os": system,
        "backend": device.platform,
        "device": device.device_kind,
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "numpyro", "optax", "numpyro_rad"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def circumstances() -> dict[str, Any]:
    """When, where and with what, as every stored report begins."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}


def write(report: dict[str, Any], path: Path) -> None:
    """Store a report as JSON, the whole file or nothing, each list of numbers on one line."""
    text = json.dumps(report, indent=2, allow_nan=False)
    text = re.sub(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]", lambda found: f"[{re.sub(chr(10) + ' *', ' ', found[1])}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    os.replace(part, path)


def log(message: str) -> None:
    """Progress goes to standard error."""
    print(message, file=sys.stderr, flush=True)
