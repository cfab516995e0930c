"""What is done to files on a file system with fs-verity, one step after another, each in a directory of its own.

Runs as a program of its own, on a real kernel to record its answers and in a rehearsal to compare them:
``fsverity_steps.py DIRECTORY SIGNATURES [STEP...]``, as root. Prints a line of JSON for each step. SIGNATURES is a
JSON file of builtin signatures of `SIGNED`, base64 by name.
"""

import base64
import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENABLE, MEASURE, READ_METADATA, GETFLAGS = 0x40806685, 0xC0046686, 0xC0286687, 0x80086601
MS_RDONLY, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 4, 32, 4096
NOBODY = 1000
#: What the signatures are over, with the default parameters.
SIGNED = b"signed content\n" * 400
BAD_POINTER = 1

_libc = ctypes.CDLL(None, use_errno=True)
Step = Callable[[Path], Any]
STEPS: dict[str, Step] = {}
SIGNATURES: dict[str, bytes] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


def cases(name: str, **each: Step) -> None:
    for case, function in each.items():
        STEPS[f"{name}_{case}"] = function


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def ioctl(fd: int, command: int, argument: Any) -> int:
    return checked(_libc.ioctl(fd, ctypes.c_ulong(command), argument))


def outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return {"ok": function(*arguments, **options)}
    except OSError as error:
        return {"error": errno.errorcode.get(error.errno or 0, str(error.errno))}


def made(place: Path, content: bytes = b"content\n", mode: int = 0o644, owner: int = 0) -> Path:
    path = place / "file"
    path.write_bytes(content)
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


def enable(
    fd: int, *, version: int = 1, algorithm: int = 1, block: int = 4096, salt: bytes = b"", signature: bytes = b"",
    salt_size: int | None = None, salt_at: int | None = None, signature_size: int | None = None,
    signature_at: int | None = None, reserved: int = 0, more: bytes = bytes(88), address: int | None = None,
) -> int:  # fmt: skip
    salted, signed = ctypes.create_string_buffer(salt, 64), ctypes.create_string_buffer(signature, 1 << 15)
    argument = struct.pack(
        "=IIIIQIIQ88s", version, algorithm, block, len(salt) if salt_size is None else salt_size,
        ctypes.addressof(salted) if salt_at is None else salt_at,
        len(signature) if signature_size is None else signature_size, reserved,
        ctypes.addressof(signed) if signature_at is None else signature_at, more,
    )  # fmt: skip
    return ioctl(fd, ENABLE, argument if address is None else ctypes.c_void_p(address))


def measured(fd: int, room: int = 64) -> list[Any]:
    buffer = ctypes.create_string_buffer(struct.pack("=HH", 0, room), 4 + 64)
    ioctl(fd, MEASURE, buffer)
    algorithm, size = struct.unpack_from("=HH", buffer.raw)
    return [algorithm, buffer.raw[4 : 4 + size].hex()]


def metadata(
    fd: int, kind: int, offset: int = 0, length: int = 1 << 16, reserved: int = 0, at: int | None = None
) -> Any:
    data = ctypes.create_string_buffer(1 << 16)
    argument = struct.pack("=QQQQQ", kind, offset, length, ctypes.addressof(data) if at is None else at, reserved)
    size = ioctl(fd, READ_METADATA, argument)
    return [size, hashlib.sha256(data.raw[:size]).hexdigest()]


def as_nobody(function: Callable[..., Any], *arguments: Any) -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writer, json.dumps(outcome(function, *arguments)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return json.loads(said)


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    return os.open(path, flags)


def may_open(path: Path, flags: int) -> bool:
    return opened(path, flags) > 0


def truncated(path: bytes, length: int) -> int:
    return checked(_libc.truncate(path, ctypes.c_long(length)))


def sealed(place: Path, content: bytes = b"content\n", mode: int = 0o644, **how: Any) -> Path:
    path = made(place, content, mode)
    fd = opened(path)
    enable(fd, **how)
    os.close(fd)
    return path


# -- enabling ---------------------------------------------------------------------------------------------------------


@step
def enable_and_measure(place: Path) -> Any:
    fd = opened(made(place))
    return [outcome(lambda: measured(fd)), enable(fd), measured(fd), outcome(lambda: enable(fd))]


def enabling(content: bytes = b"content\n", **how: Any) -> Step:
    def attempt(place: Path) -> Any:
        fd = opened(made(place, content))
        done = outcome(lambda: enable(fd, **how))
        return [done, outcome(lambda: measured(fd))]

    return attempt


def with_flags(flags: int, **how: Any) -> Step:
    return lambda place: outcome(lambda: enable(opened(made(place), flags), **how))


cases("version", **{f"is_{n}": enabling(version=n) for n in (0, 2, 1 << 31)})
cases(
    "reserved",
    first=enabling(reserved=1),
    behind=enabling(more=b"\1" + bytes(87)),
    last=enabling(more=bytes(87) + b"\1"),
)
cases("block", **{f"of_{n}": enabling(block=n) for n in (0, 1, 512, 1000, 1024, 2048, 4096, 8192, 65536, 1 << 31)})
cases("algorithm", **{f"number_{n}": enabling(algorithm=n) for n in (0, 1, 2, 3, 255, 1 << 31)})
cases(
    "salt",
    **{f"of_{n}": enabling(salt=bytes(range(n))) for n in (1, 16, 32, 33)},
    lost=enabling(salt_size=8, salt_at=BAD_POINTER),
)
cases(
    "size",
    **{
        f"of_{n}": enabling(b"x" * n, block=1024)
        for n in (0, 1, 1023, 1024, 1025, 32768, 32769, 1 << 20, (1 << 20) + 1)
    },
)
cases("size512", **{f"of_{n}": enabling(b"x" * n, algorithm=2) for n in (0, 4096, 4097, 1 << 20)})
cases(
    "argument",
    null=enabling(address=0),
    bad=enabling(address=BAD_POINTER),
    too_much_of_all=enabling(version=2, salt_size=33, signature_size=1 << 20),
    salt_before_signature=enabling(salt_size=33, signature_size=1 << 20),
)  # fmt: skip
cases(
    "descriptor",
    read_write=with_flags(os.O_RDWR),
    write_only=with_flags(os.O_WRONLY),
    for_ioctl=with_flags(3),
    path=with_flags(os.O_PATH),
    closed=lambda place: outcome(lambda: enable(1000)),
    version_first=with_flags(os.O_WRONLY, version=2),
    block_last=with_flags(os.O_WRONLY, algorithm=7),
    algorithm_after_busy=with_flags(os.O_RDWR, algorithm=7),
)  # fmt: skip


@step
def enable_a_directory(place: Path) -> Any:
    fd = opened(place, os.O_RDONLY | os.O_DIRECTORY)
    return [outcome(enable, fd, version=v) for v in (1, 2)] + [
        outcome(lambda: measured(fd)), outcome(lambda: metadata(fd, 2))
    ]  # fmt: skip


@step
def enable_a_fifo(place: Path) -> Any:
    os.mkfifo(place / "fifo")
    return outcome(lambda: enable(opened(place / "fifo", os.O_RDONLY | os.O_NONBLOCK)))


@step
def enable_with_another_writer(place: Path) -> Any:
    path = made(place)
    writer = opened(path, os.O_RDWR)
    fd = opened(path)
    first = outcome(lambda: enable(fd))
    mapping = mmap.mmap(writer, 0, mmap.MAP_SHARED)
    os.close(writer)
    second = outcome(lambda: enable(fd))
    mapping.close()
    return [first, second, outcome(lambda: enable(fd))]


@step
def enable_with_a_writer_of_no_write_permission(place: Path) -> Any:
    path = made(place, mode=0o444)
    writer = opened(path, os.O_RDWR)
    return [writer > 0, outcome(lambda: enable(opened(path)))]


def by_nobody(owner: int, mode: int, flags: int = os.O_RDONLY) -> Step:
    def attempt(place: Path) -> Any:
        path = made(place, mode=mode, owner=owner)
        place.chmod(0o777)
        return as_nobody(lambda: enable(opened(path, flags)))

    return attempt


cases(
    "by_nobody",
    own=by_nobody(NOBODY, 0o644),
    own_read_only=by_nobody(NOBODY, 0o444),
    not_own=by_nobody(0, 0o644),
    writable_for_all=by_nobody(0, 0o666),
    own_for_writing=by_nobody(NOBODY, 0o644, os.O_RDWR),
)  # fmt: skip


@step
def enable_on_a_read_only_mount(place: Path) -> Any:
    made(place)
    (there := place.parent / "bound").mkdir(exist_ok=True)
    checked(_libc.mount(bytes(place), bytes(there), None, MS_BIND, None))
    checked(_libc.mount(None, bytes(there), None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NODEV, None))
    try:
        fd = opened(there / "file")
        tried = [outcome(lambda: enable(fd)), outcome(lambda: enable(fd, version=9))]
        os.close(fd)
        return [*tried, outcome(lambda: enable(opened(place / "file")))]
    finally:
        checked(_libc.umount2(bytes(there), 2))


def prepared(name: str) -> Step:
    """A file that was made before, with a flag that takes CAP_LINUX_IMMUTABLE."""
    return lambda place: outcome(lambda: enable(opened(place.parent / name)))


cases("flag", append_only=prepared("append-only"), immutable=prepared("immutable"))


# -- signatures -------------------------------------------------------------------------------------------------------


def signed(name: str, content: bytes = SIGNED, **how: Any) -> Step:
    def attempt(place: Path) -> Any:
        fd = opened(made(place, content))
        done = outcome(lambda: enable(fd, signature=SIGNATURES[name], **how))
        return [done, outcome(lambda: measured(fd)), outcome(lambda: metadata(fd, 3))]

    return attempt


cases("signature", **{name: signed(name) for name in ("trusted", "untrusted", "garbage", "text", "cut", "longest")})
cases(
    "signature",
    of_other_content=signed("trusted", b"other"),
    of_other_parameters=signed("trusted", block=1024),
    too_long=signed("trusted", signature_size=16129),
    lost=signed("trusted", signature_at=BAD_POINTER),
    of_no_size=signed("trusted", signature_size=0),
)  # fmt: skip


# -- reading back -----------------------------------------------------------------------------------------------------


@step
def measure(place: Path) -> Any:
    fd = opened(sealed(place))
    return [
        outcome(lambda: measured(fd, 0)), outcome(lambda: measured(fd, 31)), measured(fd, 32),
        outcome(ioctl, fd, MEASURE, ctypes.c_void_p(0)), outcome(ioctl, fd, MEASURE, ctypes.c_void_p(BAD_POINTER)),
        outcome(lambda: measured(opened(place / "file", os.O_PATH))),
    ]  # fmt: skip


@step
def read_metadata(place: Path) -> Any:
    fd = opened(sealed(place, bytes(range(256)) * 1100, salt=b"salt", block=1024))
    kinds = [outcome(metadata, fd, kind) for kind in range(5)]
    pieces = [
        metadata(fd, kind, offset, 700) for kind in (1, 2) for offset in (0, 1, 255, 256, 1000, 1024, 9000, 1 << 40)
    ]
    odd = [
        outcome(lambda: metadata(fd, 2, reserved=1)),
        outcome(lambda: metadata(fd, 2, offset=1 << 63, length=1 << 63)),
        outcome(lambda: metadata(fd, 2, offset=(1 << 64) - 1, length=0)),
        outcome(lambda: metadata(fd, 2, length=0)),
        outcome(lambda: metadata(fd, 2, at=BAD_POINTER)),
        outcome(lambda: metadata(fd, 2, offset=256, at=BAD_POINTER)),
        outcome(lambda: ioctl(fd, READ_METADATA, ctypes.c_void_p(0))),
        outcome(lambda: metadata(fd, 1 << 32)),
    ]
    return [kinds, pieces, odd]


@step
def metadata_of_small_files(place: Path) -> Any:
    results = []
    for size in (0, 1, 4096, 4097):
        (here := place / str(size)).mkdir()
        fd = opened(sealed(here, b"y" * size))
        results.append([outcome(metadata, fd, kind) for kind in (1, 2)])
    return results


@step
def metadata_of_an_unsealed_file(place: Path) -> Any:
    fd = opened(made(place))
    return [outcome(metadata, fd, kind) for kind in (1, 2, 3, 9)]


@step
def flags(place: Path) -> Any:
    path = made(place)

    def verity() -> bool:
        fd = opened(path)
        buffer = bytearray(8)
        fcntl.ioctl(fd, GETFLAGS, buffer)
        os.close(fd)
        return bool(struct.unpack_from("=i", buffer)[0] & 0x100000)

    before = verity()
    enable(opened(path))
    return [before, verity()]


# -- writing ----------------------------------------------------------------------------------------------------------


def opening(flags: int, name: str = "file") -> Step:
    def attempt(place: Path) -> Any:
        sealed(place)
        os.link(place / "file", place / "link")
        (place / "symlink").symlink_to("file")
        (place / "dangling").symlink_to("nowhere")
        path = bytes(place / name)
        directory = os.open(place, os.O_PATH)
        how = struct.pack("=QQQ", flags, 0o600 if flags & os.O_CREAT else 0, 0)
        ways = [
            lambda: checked(_libc.syscall(2, path, flags, 0o600)) > 0,
            lambda: checked(_libc.syscall(257, directory, name.encode(), flags, 0o600)) > 0,
            lambda: checked(_libc.syscall(437, -100, path, how, len(how))) > 0,
        ]
        said = [outcome(way) for way in ways]
        return [*said, (place / "file").read_bytes().decode()]

    return attempt


cases(
    "open",
    read_only=opening(os.O_RDONLY),
    write_only=opening(os.O_WRONLY),
    read_write=opening(os.O_RDWR),
    appending=opening(os.O_WRONLY | os.O_APPEND),
    truncating=opening(os.O_WRONLY | os.O_TRUNC),
    truncating_read_only=opening(os.O_RDONLY | os.O_TRUNC),
    creating=opening(os.O_RDWR | os.O_CREAT),
    creating_exclusively=opening(os.O_RDWR | os.O_CREAT | os.O_EXCL),
    creating_another=opening(os.O_RDWR | os.O_CREAT, "another"),
    creating_through_a_dangling_link=opening(os.O_RDWR | os.O_CREAT, "dangling"),
    for_ioctl=opening(3),
    path=opening(os.O_PATH | os.O_RDWR),
    directory=opening(os.O_DIRECTORY | os.O_RDWR),
    hard_link=opening(os.O_RDWR, "link"),
    symbolic_link=opening(os.O_RDWR, "symlink"),
    symbolic_link_not_followed=opening(os.O_RDWR | os.O_NOFOLLOW, "symlink"),
    slash=opening(os.O_RDWR, "file/"),
    missing=opening(os.O_RDWR, "missing"),
    temporary=opening(os.O_RDWR | os.O_TMPFILE, "."),
)  # fmt: skip


@step
def open_again_by_descriptor(place: Path) -> Any:
    fd = opened(sealed(place))
    return [outcome(may_open, Path(f"/proc/self/fd/{fd}"), flags) for flags in (0, 1, 2, os.O_TRUNC)]


@step
def open_by_nobody(place: Path) -> Any:
    path = sealed(place, mode=0o644)
    place.chmod(0o755)
    return [as_nobody(may_open, path, flags) for flags in (0, 1, 2, os.O_TRUNC)] + [
        as_nobody(lambda: os.truncate(path, 0))
    ]


@step
def open_by_nobody_who_may_write(place: Path) -> Any:
    path = sealed(place, mode=0o666)
    place.chmod(0o755)
    return [as_nobody(may_open, path, flags) for flags in (0, 1, 2)]


@step
def truncate(place: Path) -> Any:
    path = bytes(sealed(place))
    lengths = [outcome(truncated, path, n) for n in (0, 8, 100, -1)]
    return [*lengths, outcome(lambda: checked(_libc.syscall(85, path, 0o600)))]


@step
def open_with_bad_arguments(place: Path) -> Any:
    sealed(place)
    path = bytes(place / "file")
    return [
        outcome(lambda: checked(_libc.syscall(2, ctypes.c_void_p(BAD_POINTER), os.O_RDWR, 0))),
        outcome(lambda: checked(_libc.syscall(2, b"", os.O_RDWR, 0))),
        outcome(lambda: checked(_libc.syscall(2, b"x" * 5000, os.O_RDWR, 0))),
        outcome(lambda: checked(_libc.syscall(257, 1000, b"file", os.O_RDWR, 0))),
        outcome(lambda: checked(_libc.syscall(437, -100, path, struct.pack("=QQQ", os.O_RDWR, 0, 0), 23))),
        outcome(lambda: checked(_libc.syscall(437, -100, path, struct.pack("=QQQ", os.O_RDWR, 0o600, 0), 24))),
        outcome(lambda: checked(_libc.syscall(437, -100, path, ctypes.c_void_p(BAD_POINTER), 24))),
    ]  # fmt: skip


# -- what a seal outlives ---------------------------------------------------------------------------------------------


def still(change: Callable[[Path], Any], name: str = "file") -> Step:
    def attempt(place: Path) -> Any:
        sealed(place)
        done = outcome(lambda: change(place) and None)
        return [done, outcome(lambda: measured(opened(place / name)))]

    return attempt


def copied_over(place: Path) -> None:
    content = (place / "file").read_bytes()
    (place / "file").unlink()
    (place / "file").write_bytes(content)


def replaced(place: Path) -> None:
    (place / "new").write_bytes((place / "file").read_bytes())
    (place / "new").rename(place / "file")


def linked_and_unlinked(place: Path) -> None:
    os.link(place / "file", place / "other")
    (place / "file").unlink()


cases(
    "after",
    chmod=still(lambda place: (place / "file").chmod(0o755)),
    chown=still(lambda place: os.chown(place / "file", NOBODY, NOBODY)),
    utime=still(lambda place: os.utime(place / "file", (1, 1))),
    rename=still(lambda place: (place / "file").rename(place / "moved"), "moved"),
    link=still(linked_and_unlinked, "other"),
    copy=still(copied_over),
    replacement=still(replaced),
    xattr=still(lambda place: os.setxattr(place / "file", "user.a", b"b")),
)  # fmt: skip


@step
def fallocate_and_ftruncate_by_an_old_descriptor(place: Path) -> Any:
    fd = opened(sealed(place))
    return [
        outcome(lambda: os.ftruncate(fd, 0)),
        outcome(lambda: os.posix_fallocate(fd, 0, 10)),
        outcome(lambda: os.write(fd, b"x")),
    ]


def main() -> None:
    root, signatures, *names = sys.argv[1:]
    SIGNATURES.update({name: base64.b64decode(text) for name, text in json.loads(Path(signatures).read_text()).items()})
    os.umask(0o022)
    for name in names or STEPS:
        place = Path(root, name)
        place.mkdir()
        try:
            result = outcome(STEPS[name], place)
        except Exception:
            result = {"failed": traceback.format_exc()}
        print(json.dumps({"step": name, "result": result}), flush=True)


if __name__ == "__main__":
    main()
