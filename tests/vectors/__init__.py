"""Answers recorded on real kernels; README.md beside this file tells where they come from."""

import json
import lzma
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEYS = HERE / "keys"
BOOT_POLICY = HERE / "boot-policy.pol"
KERNELS = ("linux-6.12", "linux-7.3")


def load(kernel: str, name: str) -> list[dict[str, Any]]:
    """Return the lines of one recorded file, for example ``load("linux-7.3", "walk-1")``."""
    with lzma.open(HERE / kernel / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
