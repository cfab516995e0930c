"""overlayfs: the options of its mounts, and what those tell of the overlays that this machine has.

IPE asks the file of a layer (``d_real_inode()``) for what dm-verity and fs-verity say. No call tells which one that is.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.linux import device_mapper, fsverity, mountinfo, openat2, statx
from ipe_emu.linux.mountinfo import Location

NAME: Final = "overlay"
#: Lookups in a layer: nothing that is mounted in it shows in the overlay.
WITHIN: Final = openat2.RESOLVE_BENEATH | openat2.RESOLVE_NO_SYMLINKS | openat2.RESOLVE_NO_XDEV
#: The module's default for the option of this name.
_METACOPY: Final = Path("/sys/module/overlay/parameters/metacopy")
#: Where overlays put the number of the layer's file system into inode numbers, that has the bits above these
#: (``ovl_map_dev_ino()``); file systems seldom use any of them.
_INO_BITS: Final = 48


@frozen
class Options:
    """The directories that an overlay is made of, as mount(2) was given them: from the top down."""

    upper: bytes | None
    lowers: tuple[bytes, ...]

    @classmethod
    def parse(cls, data: bytes) -> "Options | None":
        """Read the options of mount(2); None if there is no lower directory, or one that holds data alone."""
        return cls.of(_split(data, b","))

    @classmethod
    def of(cls, options: Iterable[bytes]) -> "Options | None":
        """Return the same of options that are apart already, as in `mountinfo.MountEntry`."""
        upper, lowers = None, None
        for option in options:
            name, _, value = option.partition(b"=")
            if name == b"upperdir":
                upper = _unescaped(value)
            elif name == b"lowerdir":
                lowers = tuple(map(_unescaped, _split(value, b":")))
            elif name in (b"lowerdir+", b"datadir+"):
                return None
        if not lowers or not all(lowers):
            return None
        return cls(upper, lowers)


def _split(text: bytes, separator: bytes) -> Iterator[bytes]:
    """Split at separators that no backslash stands before (``ovl_next_opt()``)."""
    begin = position = 0
    while position < len(text):
        if text[position : position + 1] == b"\\":
            position += 1
        elif text[position : position + 1] == separator:
            yield text[begin:position]
            begin = position + 1
        position += 1
    yield text[begin:]


def _unescaped(text: bytes) -> bytes:
    found = bytearray()
    escaped = False
    for byte in text:
        if byte == 0x5C and not escaped:
            escaped = True
        else:
            found.append(byte)
            escaped = False
    return bytes(found)


@frozen
class LayerFile:
    """The file of a layer behind one on an overlay; ``fd`` is an O_PATH descriptor of it."""

    fd: int
    location: Location
    status: os.stat_result

    def open(self) -> int:
        """Open it for reading."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


@frozen
class MachineOverlay:
    """An overlay that this machine has, by the options that mountinfo shows (``ovl_show_options()``).

    ``device`` is its st_dev. ``layers`` are None where they are not told in a way that is understood, ``has_upper``
    whether it can be written to. With ``separate_data`` the content of a file may come from another one than its
    status (metacopy, and layers of data alone). ``some_verity`` is whether anything may lie on dm-verity here,
    ``some_seals`` whether any file may be sealed by fs-verity.
    """

    device: int
    layers: Options | None
    has_upper: bool
    separate_data: bool
    some_verity: bool
    some_seals: bool

    @classmethod
    def of(cls, device: str, options: tuple[bytes, ...]) -> "MachineOverlay":
        """Read the options that mountinfo shows of an overlay with the number ``device`` (``major:minor``)."""
        major, _, minor = device.partition(":")
        return cls(
            os.makedev(int(major), int(minor)),
            Options.of(options),
            has_upper=any(option.startswith(b"upperdir=") for option in options),
            separate_data=_separate_data(options),
            some_verity=device_mapper.may_have_verity(),
            some_seals=fsverity.may_have_seals(),
        )

    def may_lie_on_verity(self, st: os.stat_result) -> bool:
        """Whether the layer's file behind one with this status may lie on a dm-verity device.

        It does not if it lies on the file system of the upper directory: that one was mounted for writing, and a
        dm-verity device can only be read (``verity_ctr()``). If it does lie there, and if all layers do, stat(2) gives
        the overlay's own device number (``ovl_map_dev_ino()``).
        """
        if not self.some_verity:
            return False
        on_upper = self.has_upper and st.st_dev == self.device and not st.st_ino >> _INO_BITS
        return not on_upper or self.separate_data

    @contextlib.contextmanager
    def layer_file(self, path: bytes, st: os.stat_result) -> Iterator[LayerFile | None]:
        """Find the layer's file behind the one at ``path`` with status ``st``; None if that cannot be told.

        The paths of the layers were those of whoever mounted the overlay. They may lead elsewhere for this process, or
        nowhere: so the file must have the same status, times and inode number included.
        """
        fd = None if self.separate_data else self._find(path, st)
        if fd is None:
            yield None
            return
        try:
            where = os.readlink(b"/proc/self/fd/%d" % fd)  # noqa: PTH115 - bytes: names need not be UTF-8
            location = mountinfo.OF_THIS_MACHINE.location(os.getpid(), statx.mount_id(fd), where)
            yield None if location is None else LayerFile(fd, location, os.fstat(fd))
        finally:
            os.close(fd)

    def _find(self, path: bytes, st: os.stat_result) -> int | None:
        """Return a descriptor of what the topmost layer with the path has there (see exec_hook.overlays)."""
        if self.layers is None:
            return None
        layers = [*([] if self.layers.upper is None else [self.layers.upper]), *self.layers.lowers]
        found: list[int] = []
        try:
            for layer in layers:
                fd = _look_up(layer, path)
                if fd is not None:
                    found.append(fd)
        except OSError:
            _close(found)
            return None
        inodes = [os.fstat(fd).st_ino for fd in found]
        # The number is that of the file, or of the one in a layer below that it was copied from; perhaps with bits
        # above for the layer.
        is_known = st.st_ino in inodes or st.st_ino & (1 << _INO_BITS) - 1 in inodes
        if not is_known or shown(os.fstat(found[0])) != shown(st):
            _close(found)
            return None
        _close(found[1:])
        return found[0]


def shown(st: os.stat_result) -> tuple[int, ...]:
    """Return what an overlay shows of the status of a layer's file: all but its numbers."""
    return (
        stat.S_IFMT(st.st_mode), st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_uid, st.st_gid,
        stat.S_IMODE(st.st_mode),
    )  # fmt: skip


def _look_up(layer: bytes, path: bytes) -> int | None:
    """Return what a layer has at ``path``, None if nothing. OSError if the layer cannot be looked at."""
    if not layer.startswith(b"/"):
        raise FileNotFoundError  # from the working directory of whoever mounted it
    directory = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return openat2.open_path(directory, path.lstrip(b"/"), WITHIN)
    except (FileNotFoundError, NotADirectoryError):
        return None
    finally:
        os.close(directory)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _separate_data(options: tuple[bytes, ...]) -> bool:
    for option in options:
        name, _, value = option.partition(b"=")
        # Layers that hold data alone are behind a double colon.
        if name == b"datadir+" or (name == b"verity" and value != b"off") or (name == b"lowerdir" and b"::" in value):
            return True
    told = [option.partition(b"=")[2] for option in options if option.startswith(b"metacopy=")]
    if not told:  # it is as the module has it
        try:
            told = [_METACOPY.read_bytes().strip()]
        except OSError:
            return True
    return told[-1] not in (b"off", b"N")
