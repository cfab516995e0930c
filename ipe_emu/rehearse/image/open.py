"""Finding out what an image is: a directory, a unified kernel image, or an initramfs of whatever kind."""

import enum
import functools
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

from ipe_emu.errors import UserError
from ipe_emu.profiles import Profile
from ipe_emu.rehearse.image.buffer import Buffer, whole_files
from ipe_emu.rehearse.image.uki import Uki, is_pe, read_uki

if TYPE_CHECKING:
    from ipe_emu.rehearse.image.archive import Archive
    from ipe_emu.rehearse.image.compression import Limits

_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class Kind(enum.Enum):
    """What an image is."""

    INITRAMFS = "initramfs"
    UKI = "UKI"
    DIRECTORY = "directory"


@frozen
class Image:
    """An open image. ``cmdline`` and ``uname`` are what a UKI says, None where it says nothing.

    ``buffer`` is the initramfs, ``strict_headers`` and ``limits`` are how it is read (`Archive`).
    """

    kind: Kind
    buffer: Buffer = field(repr=False)
    strict_headers: bool
    limits: "Limits | None" = None
    cmdline: str | None = None
    uname: str | None = None

    @functools.cached_property
    def members(self) -> "Archive":
        """Its members, which can be iterated once."""
        # Imported by who unpacks alone.
        from ipe_emu.rehearse.image.archive import Archive  # noqa: PLC0415 - only where it is needed: slow
        from ipe_emu.rehearse.image.compression import Limits  # noqa: PLC0415 - as above

        return Archive(self.buffer, self.strict_headers, self.limits or Limits())


@contextmanager
def open_image(
    paths: Sequence[str | os.PathLike[str]],
    profile: Profile,
    *,
    limits: "Limits | None" = None,
    uki_profile: int | None = None,
) -> Iterator[Image]:
    """Open an image: a directory, a UKI, or one or more initramfs images, which a boot loader puts behind each other.

    UserError if a path cannot be read, or is nothing of the kind; what is wrong within an initramfs is found when its
    members are read.
    """
    strict = profile.strict_cpio_headers
    with ExitStack() as stack:
        fds = [_open(path, stack) for path in paths]
        modes = [os.fstat(fd).st_mode for fd in fds]
        alone = len(fds) == 1
        if alone and stat.S_ISDIR(modes[0]):
            from ipe_emu.rehearse.image.directory import pack_directory  # noqa: PLC0415 - most images are files

            packed = stack.enter_context(tempfile.TemporaryFile())
            pack_directory(fds[0], packed)
            yield Image(Kind.DIRECTORY, whole_files([packed.fileno()]), strict, limits)
            return
        for path, fd, mode in zip(paths, fds, modes, strict=True):
            if not stat.S_ISREG(mode):
                raise UserError(
                    f"{os.fspath(path)}: {'' if alone else 'one of several images, and '}not a regular file"
                )
            if not os.fstat(fd).st_size:
                raise UserError(f"{os.fspath(path)}: empty, so there is no initramfs in it")
            if is_pe(os.pread(fd, 2, 0)) and not alone:
                raise UserError(f"{os.fspath(path)}: a PE file, which is booted alone and not as one of several images")
        if is_pe(os.pread(fds[0], 2, 0)):
            uki = _uki(paths[0], fds[0], uki_profile)
            yield Image(Kind.UKI, Buffer(uki.initrds), strict, limits, uki.cmdline, uki.uname)
            return
        if uki_profile is not None:
            raise UserError(f"{os.fspath(paths[0])}: no UKI, so it has no profile @{uki_profile}")
        yield Image(Kind.INITRAMFS, whole_files(fds), strict, limits)


def _open(path: str | os.PathLike[str], stack: ExitStack) -> int:
    try:
        fd = os.open(path, _OPEN)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror}") from error
    stack.callback(os.close, fd)
    return fd


def _uki(path: str | os.PathLike[str], fd: int, profile: int | None) -> Uki:
    try:
        uki = read_uki(fd, profile)
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from error
    if not uki.initrds:
        raise UserError(f"{os.fspath(path)}: a PE file without a section .initrd, so no UKI with an initramfs")
    return uki
