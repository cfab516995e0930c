"""System calls by name: one table of numbers, and one function through which every failure becomes an ``OSError``."""

import ctypes
import functools
import os
import platform
from typing import Any, Final

Argument = int | bytes | None | ctypes.Array[Any]

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_RECURSIVE: Final = 0x8000

# name: (x86_64, aarch64). aarch64 uses the generic table (include/uapi/asm-generic/unistd.h), which lacks the
# calls that have an *at successor. From number 424 on, both architectures share their numbers.
_TABLE: Final[dict[str, tuple[int | None, int | None]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "ioctl": (16, 29),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "access": (21, None),
    "getpid": (39, 172),
    "sendfile": (40, 71),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "exit": (60, 93),
    "kill": (62, 129),
    "uname": (63, 160),
    "ftruncate": (77, 46),
    "truncate": (76, 45),
    "rename": (82, None),
    "creat": (85, None),
    "unlink": (87, None),
    "chown": (92, None),
    "lchown": (94, None),
    "ptrace": (101, 117),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "setgroups": (116, 159),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setfsuid": (122, 151),
    "capget": (125, 90),
    "capset": (126, 91),
    "mknod": (133, None),
    "uselib": (134, None),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "sync": (162, 81),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "gettid": (186, 178),
    "remap_file_pages": (216, 234),
    "exit_group": (231, 94),
    "epoll_ctl": (233, 21),
    "tgkill": (234, 131),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_add_watch": (254, 27),
    "openat": (257, 56),
    "mknodat": (259, 33),
    "fchownat": (260, 54),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "faccessat": (269, 48),
    "unshare": (272, 97),
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
    "signalfd4": (289, 74),
    "inotify_init1": (294, 26),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "finit_module": (313, 273),
    "renameat2": (316, 276),
    "seccomp": (317, 277),
    "memfd_create": (319, 279),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "execveat": (322, 281),
    "copy_file_range": (326, 285),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "pkey_mprotect": (329, 288),
    "statx": (332, 291),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_open": (434, 434),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "openat2": (437, 437),
    "pidfd_getfd": (438, 438),
    "faccessat2": (439, 439),
    "mount_setattr": (442, 442),
    "map_shadow_stack": (453, 453),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "open_tree_attr": (467, 467),
}

KNOWN: Final = _TABLE.keys()
NUMBERS_X86_64: Final[dict[str, int]] = {name: pair[0] for name, pair in _TABLE.items() if pair[0] is not None}
NUMBERS_AARCH64: Final[dict[str, int]] = {name: pair[1] for name, pair in _TABLE.items() if pair[1] is not None}

MACHINE: Final = platform.machine()

# An architecture without a table gets an empty one: `call` then says so, instead of calling something else.
NUMBERS: Final[dict[str, int]] = {"x86_64": NUMBERS_X86_64, "aarch64": NUMBERS_AARCH64}.get(MACHINE, {})
NAMES: Final[dict[int, str]] = {number: name for name, number in NUMBERS.items()}

# use_errno: ctypes keeps a copy of errno per thread, taken right after the call, before the interpreter can spoil it.
_libc = ctypes.CDLL(None, use_errno=True)
_MOST_ARGUMENTS: Final = 6


def _syscall_taking(count: int) -> Any:  # noqa: ANN401 - ctypes has no public type for its functions
    """Return syscall(2) for so many arguments. ``c_void_p`` takes all that `Argument` is, and converts it in C."""
    function = _libc["syscall"]  # an object of its own each time
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, *[ctypes.c_void_p] * count)
    return function


_SYSCALL: Final = tuple(_syscall_taking(count) for count in range(_MOST_ARGUMENTS + 1))


def call(name: str, *arguments: Argument) -> int:
    """Do one system call; return its result, or raise ``OSError`` with its errno and its name.

    Raises ``NotImplementedError`` where this architecture has no such call, or no table here.

    ``bytes`` are passed as a pointer to their content, NUL-terminated, that the kernel may read, not write; a ctypes
    array as a pointer the kernel may write to; ``None`` as a null pointer. The interpreter lock is released.
    EINTR is not retried: only the caller knows whether the call may be repeated.
    """
    number = NUMBERS.get(name)
    if number is None:
        raise NotImplementedError(f"no number is known here for the system call {name} on {MACHINE}")
    result: int = _SYSCALL[len(arguments)](number, *arguments)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result


def writable(size: int) -> ctypes.Array[ctypes.c_char]:
    """Return a zeroed buffer of ``size`` bytes for the kernel to fill; ``.raw`` is its content."""
    return _array_type(size)()


@functools.lru_cache
def _array_type(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * size


def address(buffer: ctypes.Array[Any]) -> int:
    """Return a buffer's address, for structures that hold pointers. The caller keeps the buffer alive."""
    return ctypes.addressof(buffer)


def signed_int(value: int) -> int:
    """Return the low 32 bits of a register as the C ``int`` they stand for (descriptors such as ``AT_FDCWD``)."""
    return ctypes.c_int(value & 0xFFFFFFFF).value
