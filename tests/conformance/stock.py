"""Debian's own kernel as it is shipped, in QEMU with UEFI: no boot policy, and the keys in the firmware's db.

The machine sees the host's files read-only by virtio-fs, as a kernel in user mode does by hostfs.
"""

import contextlib
import functools
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.conformance.machines import Machine, initramfs

#: Debian 12 ships it with QEMU; later releases ship its successor, which has a package and options of its own.
VIRTIOFSD_OF_QEMU = Path("/usr/lib/qemu/virtiofsd")
VIRTIOFSD = Path("/usr/libexec/virtiofsd")
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_SECONDS = 10.0


@functools.cache
def accelerator() -> str:
    """How QEMU runs the processor here: ``kvm`` where the firmware comes up with it, else ``tcg``, which is slower.

    A /dev/kvm in a virtual machine may be there and stop with "KVM internal error" at the firmware's first steps.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    command = [
        "timeout", f"{_SECONDS:.0f}", "qemu-system-x86_64", "-M", "q35,smm=off,accel=kvm", "-cpu", "max", "-nodefaults",
        "-display", "none", "-serial", "stdio", "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        said = next((line for line in process.stdout if b"BdsDxe" in line or b"KVM internal error" in line), b"")
        process.terminate()
    return "kvm" if b"BdsDxe" in said else "tcg"


def qemu(variables: Path) -> list[Any]:
    """The command for a machine with UEFI firmware and a console on standard output; it writes to ``variables``."""
    return [
        "qemu-system-x86_64", "-M", f"q35,smm=off,accel={accelerator()},memory-backend=memory", "-cpu", "max",
        "-m", "1G", "-object", "memory-backend-memfd,id=memory,size=1G,share=on",
        "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}",
        "-drive", f"if=pflash,unit=1,format=raw,file={variables}",
    ]  # fmt: skip


@frozen
class StockKernel(Machine):
    """The kernel with its modules (in the order to load them), and the firmware's variables that hold the keys."""

    kernel: Path
    modules: tuple[Path, ...]
    variables: Path
    name: str

    def start(self, work: Path) -> str:
        image = work / "initramfs"
        image.write_bytes(initramfs(work, host="-t virtiofs host", batch="-t virtiofs batch", modules=self.modules))
        variables = work / "variables"
        variables.write_bytes(self.variables.read_bytes())
        with _shared("host", Path("/"), work) as host, _shared("batch", work, work) as shared:
            command = [
                *qemu(variables), "-kernel", self.kernel, "-initrd", image,
                "-append", "console=ttyS0 quiet ipe.enforce=0 ipe.success_audit=0 panic=-1", *host, *shared,
            ]  # fmt: skip
            return self.run(command, cwd=work)


@contextlib.contextmanager
def _shared(tag: str, directory: Path, work: Path) -> Iterator[list[str]]:
    """Serve a directory to one machine; yields QEMU's options for it."""
    path = str(work / f"{tag}.socket")
    # It listens from the start: nobody need wait until the server is ready.
    with (work / f"{tag}.log").open("wb") as log, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1)
        # The server's other sandbox, with pivot_root(2), cannot share / where that is no mount that can be moved, as in
        # containers.
        command: list[str | Path]
        if VIRTIOFSD_OF_QEMU.exists():
            command = [VIRTIOFSD_OF_QEMU, "-o", f"source={directory},cache=auto,sandbox=chroot"]
        else:
            command = [VIRTIOFSD, f"--shared-dir={directory}", "--cache=auto", "--sandbox=chroot"]
        command.append(f"--fd={listening.fileno()}")
        with subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[listening.fileno()]) as process:
            try:
                yield [
                    "-chardev", f"socket,id={tag},path={path}", "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}",
                ]  # fmt: skip
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS)
                process.kill()
