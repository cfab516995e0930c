"""kexec_file_load(2) and kexec_load(2): op=KEXEC_IMAGE and op=KEXEC_INITRAMFS. Nothing is ever loaded."""

import errno
import os
from typing import Final

from ipe_emu.errors import KernelError
from ipe_emu.event import Hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.modules import kernel_read_file
from ipe_emu.exec_hook.plan import Event, Fail, Plan, Refuse, Return
from ipe_emu.linux.syscalls import MACHINE, signed_int
from ipe_emu.policy.rule import Operation

_CAP_SYS_BOOT: Final = 22
_FILE_UNLOAD: Final = 1
_FILE_NO_INITRAMFS: Final = 4
# with KEXEC_FILE_ON_CRASH and KEXEC_FILE_DEBUG
_FILE_FLAGS: Final = 0xF
# KEXEC_ON_CRASH, PRESERVE_CONTEXT, UPDATE_ELFCOREHDR, CRASH_HOTPLUG_SUPPORT
_FLAGS: Final = 0xF
_ARCH_MASK: Final = 0xFFFF0000
_MAX_SEGMENTS: Final = 16
# KEXEC_FILE_SIZE_MAX
_LARGEST_FILE: Final = 4 << 30


def plan_kexec_file_load(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan kexec_file_load(kernel, initrd, …, flags): KERNEL_READ of the kernel, then of the initramfs.

    The kernel image is recognised in between (``kimage_file_prepare_segments()``): what is none is ENOEXEC, and its
    initramfs never asked about.
    """
    _may_load(caller)
    kernel, initrd, flags = signed_int(args[0]), signed_int(args[1]), args[4]
    if flags & ~_FILE_FLAGS:
        raise KernelError(errno.EINVAL, "unknown flags", "kexec_file_load")
    if flags & _FILE_UNLOAD:
        return Plan(Return(0, "no kernel was loaded that could be unloaded"))
    content, image = kernel_read_file(caller, kernel, Operation.KEXEC_IMAGE, _LARGEST_FILE)
    if not _is_kernel(os.pread(content, 0x400, 0)):
        return Plan(Fail(KernelError(errno.ENOEXEC, "no kernel image", "arch_kexec_kernel_image_probe")), (image,))
    cannot = Refuse("a kernel image that the policy allows: whether its signature suffices is not known here")
    if flags & _FILE_NO_INITRAMFS:
        return Plan(cannot, (image,))
    try:
        _, initramfs = kernel_read_file(caller, initrd, Operation.KEXEC_INITRAMFS, _LARGEST_FILE)
    except KernelError as error:
        return Plan(Fail(error), (image,))
    return Plan(cannot, (image, initramfs))


def plan_kexec_load(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan kexec_load(entry, count, segments, flags): KERNEL_LOAD without a file (``kexec_load_check()``)."""
    _may_load(caller)
    count, flags = args[1], args[3]
    event = Event(Operation.KEXEC_IMAGE, Hook.KERNEL_LOAD, caller.subject, None)
    if flags & ~_ARCH_MASK & ~_FLAGS or count > _MAX_SEGMENTS:
        return Plan(Fail(KernelError(errno.EINVAL, "impossible arguments", "kexec_load_check")), (event,))
    if not count:
        return Plan(Return(0, "no kernel was loaded that could be unloaded"), (event,))
    return Plan(Refuse("a kernel from memory that the policy allows"), (event,))


def _may_load(caller: Caller) -> None:
    if not caller.capable(_CAP_SYS_BOOT):
        raise KernelError(errno.EPERM, "CAP_SYS_BOOT is missing", "kexec_load_permitted")


def _is_kernel(head: bytes) -> bool:
    """Whether a file begins as a kernel does (x86: ``bzImage64_probe()``, arm64: ``image_probe()``).

    What looks like one and would still be refused counts: the answer is then that it was not judged.
    """
    if MACHINE == "aarch64":
        return head[0x38:0x3C] == b"ARM\x64"
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"
