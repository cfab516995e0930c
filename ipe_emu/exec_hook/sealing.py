"""fs-verity for the rehearsed tree: sealing files, reading their seals back, and refusing to write to them.

Some directories stand for file systems with fs-verity; the real ones below them need not have it. A seal is kept here
and nothing is written: a rehearsal must not make a user's files unwritable for good, and this machine's kernel would
verify signatures by its own keys. Elsewhere the file system's own answer stands, where that is certain.
"""

import errno
import mmap
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from attrs import define, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import Caller, path_of
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.plan import Fail, Perform, Plan, Refuse
from ipe_emu.exec_hook.traps import Handler, Trap
from ipe_emu.exec_hook.write_access import deny_write_access
from ipe_emu.integrity import fsverity as digests
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.fsverity import HASH_ALGORITHMS, MAX_SALT_SIZE, MAX_SIGNATURE_SIZE, Parameters
from ipe_emu.integrity.seals import Seal, Seals
from ipe_emu.integrity.sources import Place
from ipe_emu.linux import fsverity, openat2
from ipe_emu.linux.seccomp import AnyBit, Masked
from ipe_emu.linux.syscalls import AT_FDCWD, signed_int

if TYPE_CHECKING:
    from ipe_emu.volumes.ext4_seals import ImageSeals, SealedFiles

# struct fsverity_enable_arg: version, hash_algorithm, block_size, salt_size, salt_ptr, sig_size, __reserved1, sig_ptr,
# __reserved2[11].
_ENABLE_ARG: Final = struct.Struct("=IIIIQIIQ88s")
_MIN_BLOCK_SIZE: Final = 1024
# Of a tree whose blocks are no pages; the kernel keeps a bit in memory for each.
_MOST_SMALL_BLOCKS: Final = 1 << 23
# struct open_how: flags, mode, resolve.
_OPEN_HOW: Final = struct.Struct("=QQQ")
_ACCESS_BITS: Final = os.O_WRONLY | os.O_RDWR
#: Bytes of metadata given by one ioctl; who wants more asks again, as after a short read.
_MOST_METADATA: Final = 1 << 20
_HINT: Final = "--sealable DIR lets a directory stand for a file system with fs-verity"


@define(eq=False)
class Sealing:
    """``places`` are the directories that stand for file systems with fs-verity.

    ``verify`` raises KernelError unless the emulated machine's keyring ``.fs-verity`` of the moment verifies the
    builtin signature of a digest. ``images`` knows the files that are sealed in ext4 images, if some can be mounted:
    read-only, so that nothing is sealed there.
    """

    seals: Seals
    places: Sequence[Place]
    verify: Callable[[Digest, bytes], None]
    images: "ImageSeals | None" = None

    @property
    def traps(self) -> tuple[Trap, ...]:
        """The calls that must be seen. Without ``places`` and ``images`` that is sealing, which is at most reported."""
        enable = _ioctl(fsverity.FS_IOC_ENABLE_VERITY, self._plan_enable)
        asking = (
            _ioctl(fsverity.FS_IOC_MEASURE_VERITY, self._plan_measure),
            _ioctl(fsverity.FS_IOC_READ_VERITY_METADATA, self._plan_read_metadata),
        )
        if not self.places:
            return (enable,) if self.images is None else (enable, *asking)
        return (
            enable,
            *asking,
            _ioctl(fsverity.FS_IOC_GETFLAGS, self._plan_getflags),
            Trap("open", self._plan_open, AnyBit(1, _ACCESS_BITS | os.O_TRUNC)),
            Trap("openat", self._plan_openat, AnyBit(2, _ACCESS_BITS | os.O_TRUNC)),
            Trap("openat2", self._plan_openat2),
            Trap("creat", self._plan_creat),
            Trap("truncate", self._plan_truncate),
            Trap("open_by_handle_at", self._plan_open_by_handle, AnyBit(2, _ACCESS_BITS | os.O_TRUNC)),
            Trap("io_uring_setup", _plan_io_uring),
        )

    # -- FS_IOC_ENABLE_VERITY -------------------------------------------------------------------------------------

    def _plan_enable(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan ioctl(fd, FS_IOC_ENABLE_VERITY, arg); errors in the order of ``fsverity_ioctl_enable()``."""
        number, fd = _descriptor(caller, args)
        if not _has_own_ioctls(os.fstat(fd)):
            return None
        image = self._image_of(caller, fd)
        if image is not None:
            return Plan(Perform(lambda: self._enable_in_image(caller, fd, image, args[2])))
        if not self._covers(caller, fd):
            return self._elsewhere(caller, fd, args[2])
        return Plan(Perform(lambda: self._enable(caller, number, fd, args[2])))

    def _elsewhere(self, caller: Caller, fd: int, address: int) -> Plan | None:
        """Plan it for a file that only its own file system can seal, if it can."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        try:
            fsverity.measure_verity(caller.readable(fd))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not fsverity.is_supported():
                # ext4 and its like answer so if the kernel was built without it: another kernel could seal.
                return Plan(Refuse(f"sealing {_name(fd)}: this machine's kernel has no fs-verity; {_HINT}"))
            if error.errno != errno.ENODATA:
                return None  # no kernel can seal it there, or it is sealed
        if _ENABLE_ARG.unpack(caller.copy_in(address, _ENABLE_ARG.size))[5]:
            return Plan(Refuse(f"sealing {_name(fd)} with a signature, which this machine would verify; {_HINT}"))
        return None

    def _enable(self, caller: Caller, number: int, fd: int, address: int) -> int:
        argument = _Argument.read(caller, address)
        st = os.fstat(fd)
        _may_write(caller, st, fd)
        if not caller.may_read(number):
            raise _error(errno.EBADF, f"descriptor {number} is not open for reading")
        if fsverity.flags_of(fd_for_ioctl := caller.readable(fd)) & fsverity.FS_APPEND_FL:
            raise _error(errno.EPERM, "the file can only be appended to")
        if stat.S_ISDIR(st.st_mode):
            raise _error(errno.EISDIR, "a directory")
        if _is_read_only(fd):
            raise KernelError(errno.EROFS, "a read-only mount", "mnt_want_write_file")
        deny_write_access(fd_for_ioctl, certain=True)
        salt = caller.copy_in(argument.salt_at, argument.salt_size)
        signature = caller.copy_in(argument.signature_at, argument.signature_size)
        parameters = _parameters(argument.algorithm, argument.block_size, salt, st)
        if self.seals.of(st) is not None or caller.file(fd).facts.fsverity_digest is not None:
            raise KernelError(errno.EEXIST, "the file is sealed already", "enable_verity")
        self._seal(fd_for_ioctl, parameters, signature)
        return 0

    def _seal(self, fd: int, parameters: Parameters, signature: bytes) -> None:
        before = os.fstat(fd)
        seal = Seal(parameters, digests.descriptor(fd, parameters), signature)
        if signature:
            self.verify(seal.digest, signature)
        # Whoever opened it meanwhile would have been kept waiting for nothing by a kernel: there he gets the error.
        deny_write_access(fd, certain=True)
        after = os.fstat(fd)
        if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
            after.st_size, after.st_mtime_ns, after.st_ctime_ns,
        ):  # fmt: skip
            raise KernelError(errno.ETXTBSY, "the file was changed while it was sealed", "deny_write_access")
        try:
            self.seals.add(fd, after, seal)
        except OSError as error:
            raise NotJudgedError(f"{_name(fd)} cannot be watched (inotify(7)): {error.strerror}") from None

    def _enable_in_image(self, caller: Caller, fd: int, image: "SealedFiles", address: int) -> NoReturn:
        """Answer FS_IOC_ENABLE_VERITY for a file of an ext4 image: all of them are read-only here."""
        assert self.images is not None  # noqa: S101 - the file lies on one
        _check_feature(image)
        _Argument.read(caller, address)
        if self.images.is_for_writing(caller.place(fd)):
            raise NotJudgedError(f"sealing {_name(fd)}: what is mounted for writing is read-only here")
        raise KernelError(errno.EROFS, "a read-only file system", "sb_permission")

    # -- reading seals back ---------------------------------------------------------------------------------------

    def _plan_measure(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan ioctl(fd, FS_IOC_MEASURE_VERITY, arg) (``fsverity_ioctl_measure()``)."""
        _, fd = _descriptor(caller, args)
        seal = self._seal_or_enodata(caller, fd)
        if seal is None:
            return None
        return Plan(Perform(lambda: _measure(caller, args[2], seal.digest)))

    def _plan_read_metadata(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan ioctl(fd, FS_IOC_READ_VERITY_METADATA, arg) (``fsverity_ioctl_read_metadata()``)."""
        _, fd = _descriptor(caller, args)
        seal = self._seal_or_enodata(caller, fd)
        if seal is None:
            return None
        return Plan(Perform(lambda: _read_metadata(caller, args[2], caller.readable(fd), seal)))

    def _plan_getflags(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan ioctl(fd, FS_IOC_GETFLAGS, arg): lsattr(1) shows V for a sealed file."""
        _, fd = _descriptor(caller, args)
        if self.seals.of(os.fstat(fd)) is None:
            return None

        def act() -> int:
            flags = fsverity.flags_of(caller.readable(fd)) | fsverity.FS_VERITY_FL
            caller.copy_out(args[2], struct.pack("=i", flags))
            return 0

        return Plan(Perform(act))

    def _seal_or_enodata(self, caller: Caller, fd: int) -> Seal | None:
        """Return a file's seal; None for one whose file system is to answer itself."""
        st = os.fstat(fd)
        seal = self.seals.of(st)
        if seal is not None or not _has_own_ioctls(st):
            return seal
        image = self._image_of(caller, fd)
        if image is not None:
            _check_feature(image)
            seal = image.of(st)
            if seal is None:
                raise KernelError(errno.ENODATA, "the file is not sealed", "fsverity_ioctl_measure")
            return seal
        if not self._covers(caller, fd):
            return None
        if digests.sealed_digest(caller.readable(fd), fsverity.measure_verity) is None:
            raise KernelError(errno.ENODATA, "the file is not sealed", "fsverity_ioctl_measure")
        return None

    # -- writing ----------------------------------------------------------------------------------------------------

    def _plan_open(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan open(path, flags, mode)."""
        return self._plan_opening(caller, AT_FDCWD, args[0], args[1])

    def _plan_openat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan openat(directory, path, flags, mode)."""
        return self._plan_opening(caller, signed_int(args[0]), args[1], args[2])

    def _plan_creat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan creat(path, mode)."""
        return self._plan_opening(caller, AT_FDCWD, args[0], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def _plan_openat2(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan openat2(directory, path, how, size)."""
        if not self.seals or args[3] < _OPEN_HOW.size:
            return None
        flags, mode, resolve = _OPEN_HOW.unpack(caller.copy_in(args[2], _OPEN_HOW.size))
        if mode and not flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY):
            return None  # EINVAL (build_open_flags())
        if resolve & openat2.RESOLVE_IN_ROOT and _writes(flags):
            return Plan(Refuse("openat2(2) for writing with RESOLVE_IN_ROOT: the file may be sealed"))
        directory = signed_int(args[0])
        if _writes(flags) and _is_restricted(caller, directory, read_path(caller.tracee, args[1]), resolve):
            return None  # ELOOP or EXDEV
        return self._plan_opening(caller, directory, args[1], flags)

    def _plan_opening(self, caller: Caller, directory: int, address: int, flags: int) -> Plan | None:
        """Plan an open: EPERM for writing to a sealed file (``__fsverity_file_open()``), or for truncating it."""
        if not self.seals or not _writes(flags):
            return None
        path = read_path(caller.tracee, address)
        return self._refuse_writing(caller, directory, path, follow=not flags & os.O_NOFOLLOW)

    def _plan_truncate(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan truncate(path, length): EPERM for a sealed file (``fsverity_prepare_setattr()``)."""
        if not self.seals or args[1] >= 1 << 63:  # a negative length: EINVAL
            return None
        return self._refuse_writing(caller, AT_FDCWD, read_path(caller.tracee, args[0]), follow=True)

    def _plan_open_by_handle(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:  # noqa: ARG002 - a handler's arguments
        """Plan open_by_handle_at(mount, handle, flags): which file that is, is not looked at."""
        return Plan(Refuse("a file opened for writing by its handle: it may be sealed")) if self.seals else None

    def _refuse_writing(self, caller: Caller, directory: int, path: bytes, *, follow: bool) -> Plan | None:
        try:
            fd = caller.look_up(directory, path, follow=follow)
        except KernelError:
            return None  # the kernel finds the same, or makes the file
        st = os.fstat(fd)
        if self.seals.of(st) is None or _is_read_only(fd):
            return None
        if caller.access.permits_writing(st, fd) is False:
            raise KernelError(errno.EACCES, f"{_name(fd)}: its mode forbids to write to it", "may_open")
        # A program that runs would be ETXTBSY on a kernel; it cannot be written either way.
        raise KernelError(errno.EPERM, f"{_name(fd)} is sealed by fs-verity", "fsverity_file_open")

    def _image_of(self, caller: Caller, fd: int) -> "SealedFiles | None":
        return None if self.images is None else self.images.image_of(caller.place(fd))

    def _covers(self, caller: Caller, fd: int) -> bool:
        place = caller.place(fd) if self.places else None
        return place is not None and any(_is_below(directory, place) for directory in self.places)


@frozen
class _Argument:
    """struct fsverity_enable_arg, as far as it says something."""

    algorithm: int
    block_size: int
    salt_size: int
    salt_at: int
    signature_size: int
    signature_at: int

    @classmethod
    def read(cls, caller: Caller, address: int) -> "_Argument":
        """Read it; KernelError as ``fsverity_ioctl_enable()`` before it looks at the file."""
        version, algorithm, block_size, salt_size, salt_at, signature_size, reserved, signature_at, more = (
            _ENABLE_ARG.unpack(caller.copy_in(address, _ENABLE_ARG.size))
        )
        if version != 1 or reserved or any(more) or block_size.bit_count() != 1:
            raise _error(errno.EINVAL, "the argument is malformed, or of another version")
        if salt_size > MAX_SALT_SIZE or signature_size > MAX_SIGNATURE_SIZE:
            raise _error(errno.EMSGSIZE, "the salt or the signature is too long")
        return cls(algorithm, block_size, salt_size, salt_at, signature_size, signature_at)


def _check_feature(image: "SealedFiles") -> None:
    if not image.file_system.has_verity:
        raise KernelError(errno.EOPNOTSUPP, "the file system was made without the feature verity", "ext4_ioctl")


def _plan_io_uring(caller: Caller, args: tuple[int, ...]) -> Plan:  # noqa: ARG001 - a handler's arguments
    """Plan io_uring_setup(2): ENOSYS, for what is opened through a ring is seen by no filter."""
    return Plan(Fail(KernelError(errno.ENOSYS, "no rings where opens must be seen", "io_uring_setup")))


def _ioctl(command: int, handler: Handler) -> Trap:
    """Trap one command of ioctl(2); a handler sees those of the other traps as well."""

    def plan(caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return handler(caller, args) if args[1] & 0xFFFFFFFF == command else None

    return Trap("ioctl", plan, Masked(1, 0xFFFFFFFF, command))


def _writes(flags: int) -> bool:
    """Whether an open with these flags would write to a file that exists, or cut it."""
    if flags & (os.O_PATH | os.O_DIRECTORY) or (flags & os.O_CREAT and flags & os.O_EXCL):
        return False
    return flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR) or bool(flags & os.O_TRUNC)


def _is_restricted(caller: Caller, directory: int, path: bytes, resolve: int) -> bool:
    """Whether openat2(2) fails because it is to stay beneath a directory, or to meet no symbolic link."""
    resolve &= openat2.RESOLVE_BENEATH | openat2.RESOLVE_NO_SYMLINKS
    if not resolve:
        return False
    if path.startswith(b"/"):
        if resolve & openat2.RESOLVE_BENEATH:
            return True
        start, path = caller.root(), path.lstrip(b"/")
    else:
        found = caller.cwd() if directory == AT_FDCWD else caller.descriptor(directory)
        if found is None:
            return False
        start = found
    try:
        os.close(openat2.open_path(start, path, resolve))
    except OSError as error:
        return error.errno in (errno.ELOOP, errno.EXDEV)
    return False


def _descriptor(caller: Caller, args: tuple[int, ...]) -> tuple[int, int]:
    number = signed_int(args[0])
    fd = caller.descriptor(number)
    if fd is None or not caller.may_use(number):
        raise KernelError(errno.EBADF, f"descriptor {number} is not open on a file", "fdget")
    return number, fd


def _has_own_ioctls(st: os.stat_result) -> bool:
    """Whether a file's ioctls go to its file system, which those of fifos, sockets and devices do not."""
    return stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)


def _is_below(directory: Place, place: Place) -> bool:
    if directory.device != place.device:
        return False
    return place.path == directory.path or place.path.startswith(directory.path.rstrip(b"/") + b"/")


def _may_write(caller: Caller, st: os.stat_result, fd: int) -> None:
    """Raise KernelError unless the caller may write to the file (``file_permission()``); NotJudgedError if unclear."""
    if fsverity.flags_of(caller.readable(fd)) & fsverity.FS_IMMUTABLE_FL:
        raise KernelError(errno.EPERM, "the file is immutable", "inode_permission")
    permitted = caller.access.permits_writing(st, fd)
    if permitted is None:
        raise NotJudgedError(f"{_name(fd)}: whether the caller may write to it cannot be told (an ACL, or foreign ids)")
    # Asked with our own ids as well: where we may not, neither may a caller that has our power over fewer ids.
    if not permitted or not (_is_read_only(fd) or _we_may_write(fd)):
        raise KernelError(errno.EACCES, "sealing takes the permission to write", "inode_permission")


def _we_may_write(fd: int) -> bool:
    return os.access(b"/proc/self/fd/%d" % fd, os.W_OK, effective_ids=True)


def _is_read_only(fd: int) -> bool:
    return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def _parameters(algorithm: int, block_size: int, salt: bytes, st: os.stat_result) -> Parameters:
    """Check what ``fsverity_init_merkle_tree_params()`` does."""
    names = [name for name, number in HASH_ALGORITHMS.items() if number == algorithm]
    if not names:
        raise KernelError(errno.EINVAL, f"hash algorithm number {algorithm}", "fsverity_get_hash_alg")
    if not _MIN_BLOCK_SIZE <= block_size <= min(mmap.PAGESIZE, st.st_blksize):
        reason = f"blocks of {block_size} bytes, where the file system's have {st.st_blksize}"
        raise KernelError(errno.EINVAL, reason, "fsverity_init_merkle_tree_params")
    parameters = Parameters(names[0], block_size, salt)
    blocks = sum(digests.tree_levels(st.st_size, parameters))
    if block_size != mmap.PAGESIZE and blocks > _MOST_SMALL_BLOCKS:
        raise KernelError(errno.EFBIG, "too many blocks in the Merkle tree", "fsverity_init_merkle_tree_params")
    return parameters


def _measure(caller: Caller, address: int, digest: Digest) -> int:
    header = fsverity.DIGEST_HEADER
    _, room = header.unpack(caller.copy_in(address, header.size))
    if room < len(digest.value):
        raise KernelError(errno.EOVERFLOW, "the digest does not fit", "fsverity_ioctl_measure")
    caller.copy_out(address, header.pack(HASH_ALGORITHMS[digest.algorithm], len(digest.value)) + digest.value)
    return 0


def _read_metadata(caller: Caller, address: int, file: int, seal: Seal) -> int:
    size = fsverity.READ_METADATA_ARG.size
    kind, offset, length, buffer, reserved = fsverity.READ_METADATA_ARG.unpack(caller.copy_in(address, size))
    if reserved or offset + length >= 1 << 64:
        raise KernelError(errno.EINVAL, "the argument is malformed", "fsverity_ioctl_read_metadata")
    length = min(length, _MOST_METADATA)
    if kind == fsverity.METADATA_MERKLE_TREE:
        data = digests.read_tree(file, seal.parameters, offset, length)
    elif kind == fsverity.METADATA_DESCRIPTOR:
        data = seal.descriptor[offset : offset + length]
    elif kind == fsverity.METADATA_SIGNATURE:
        if not seal.signature:
            raise KernelError(errno.ENODATA, "the file has no builtin signature", "fsverity_read_signature")
        data = seal.signature[offset : offset + length]
    else:
        raise KernelError(errno.EINVAL, f"no metadata has the number {kind}", "fsverity_ioctl_read_metadata")
    if data:
        caller.copy_out(buffer, data)
    return len(data)


def _error(number: int, reason: str) -> KernelError:
    return KernelError(number, reason, "fsverity_ioctl_enable")


def _name(fd: int) -> str:
    return os.fsdecode(path_of(fd))
