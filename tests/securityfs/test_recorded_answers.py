"""A real mount gives the answers that were recorded on real kernels."""

import subprocess
import sys

import pytest

from tests.securityfs.emulator import environment
from tests.vectors import KERNELS

WALKS = [f"walk-{number}" for number in range(1, 7)]
NAMES = [*WALKS, "securityfs-operations", "policy-texts", "pkcs7-blobs"]

#: How many answers a file must at least have had compared: a replay that compares nothing passes nothing.
AT_LEAST = {"securityfs-operations": 350, "policy-texts": 1200, "pkcs7-blobs": 290}


@pytest.mark.needs("fuse", "root")
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("kernel", "name"),
    [(kernel, name) for kernel in KERNELS for name in NAMES] + [("op-policy", name) for name in WALKS],
)
def test_the_mount_answers_as_the_kernel_did(kernel: str, name: str) -> None:
    replay = [sys.executable, "-m", "tests.securityfs.replaying", kernel, name]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *replay],
        capture_output=True, text=True, env=environment(), cwd="/", timeout=170, check=False,
    )  # fmt: skip
    *differences, summary = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"{len(differences)} differences\n" + "\n".join(differences[:20]) + done.stderr
    assert int(summary.split()[0]) >= AT_LEAST.get(name, 300)
