"""Put a batch to the emulator: start it, and let the driver ask it as it asks a kernel.

usage: python -m tests.conformance.emulated (mount | run) PROFILE (builtin | platform) WORK

As root, in a mount namespace of its own. What it trusts: see machines.MountedEmulator.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.conformance import driver, files, media, seals
from tests.securityfs.emulator import RECORDED_MACHINES, mounted
from tests.vectors import KEYS

MOUNT = "/usr/bin/mount"
TRUST: dict[str, tuple[str | Path, ...]] = {
    "builtin": RECORDED_MACHINES,
    "platform": ("--platform-keys", KEYS / "builtin-trusted.pem"),
}


def main(arguments: list[str]) -> int:
    way, profile, trusts, work = arguments
    subprocess.run([MOUNT, "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt"], check=True)
    for name in ("initramfs", "batch", "securityfs"):
        Path("/mnt", name).mkdir()
    subprocess.run([MOUNT, "--bind", work, "/mnt/batch"], check=True)
    batch, answers = "/mnt/batch/batch.json", "/mnt/batch/answers.json"
    if way == "mount":
        with mounted(Path("/mnt/securityfs"), kernel=profile, trust=TRUST[trusts]) as emulator:
            driver.main([batch, answers, str(emulator.directory), str(emulator.audit_log)])
        return 0
    subprocess.run([MOUNT, "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt/initramfs"], check=True)
    files.fill(Path("/mnt/initramfs"))
    Path(work, "audit").touch()
    given: list[str | Path] = []
    for volume in media.volumes(Path(work)):
        Path("/mnt", volume.name).mkdir()
        given.append(f"--volume={volume.option}")
    if media.seals(Path(work)):
        Path(media.SEALABLE).mkdir()
        subprocess.run([MOUNT, "-t", "tmpfs", "-o", "mode=755", "tmpfs", media.SEALABLE], check=True)
        seals.fill(Path(media.SEALABLE))
        given += ["--sealable", media.SEALABLE, "--fsverity-keys", seals.TRUSTED]
    command = [
        sys.executable, "-m", "ipe_emu", "run", *given,
        "--kernel", profile, *TRUST[trusts], "--boot-verified", "/mnt/initramfs",
        "--cmdline", "ipe.enforce=0", "--audit-log", "/mnt/batch/audit", "--",
        sys.executable, "-m", "tests.conformance.driver", batch, answers, "/sys/kernel/security", "/mnt/batch/audit",
        "executing",
    ]  # fmt: skip
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.environ["PYTHONPATH"],
    }  # fmt: skip
    return subprocess.run(command, check=False, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
