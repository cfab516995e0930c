"""Trees of files that commands look at: directories and images, and the options that say what is known of them."""

import argparse
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from ipe_emu.cli.hash_tree_options import add_tree_options
from ipe_emu.cli.options import add_integrity_options, declared_of, keyrings_of
from ipe_emu.cli.output import escape, say
from ipe_emu.errors import UserError
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.profiles import Profile

if TYPE_CHECKING:
    from ipe_emu.integrity.dm_verity import Parameters
    from ipe_emu.keyring import Keyrings
    from ipe_emu.simulate.known import Known
    from ipe_emu.simulate.tree import Tree
    from ipe_emu.volumes.ext4_seals import SealedFiles

_ROOT_HASH: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}:(?:[0-9a-f]{2}){1,64}", re.ASCII)
_OF_IMAGES: Final = (
    "hash_image", "hash_offset", "root_hash_signature", "hash", "format", "data_block_size", "hash_block_size",
    "data_blocks", "salt",
)  # fmt: skip


def add_tree_argument(parser: argparse.ArgumentParser) -> None:
    """Add the tree, and the options of images."""
    parser.add_argument("tree", metavar="DIR|IMAGE", help="its root directory, or a squashfs, ext4 or erofs image")
    group = parser.add_argument_group("for an image, whose root hash is computed")
    group.add_argument("--roothash", metavar="[ALG:]HEX", help="it must be this one")
    group.add_argument("--hash-image", metavar="HASH", help="take salt and all else from its superblock")
    group.add_argument(
        "--hash-offset", type=int, metavar="BYTES", help="where the superblock is; without HASH, in IMAGE itself"
    )
    add_tree_options(parser, salt="none")


def add_facts_options(parser: argparse.ArgumentParser) -> None:
    """Add what is known of the files of a tree."""
    add_integrity_options(parser)
    group = parser.add_argument_group("what the tree is taken for")
    group.add_argument("--signed", action="store_true", help="the root hash has a trusted signature")
    group.add_argument("--root-hash-signature", metavar="FILE", help="it has this one, which must be good (an image)")
    group.add_argument(
        "--fsverity", choices=("sha256", "sha512"), help="every file is sealed by fs-verity with this algorithm"
    )
    group.add_argument("--fsverity-signed", action="store_true", help="with a trusted signature, each of them")


@contextmanager
def opened_tree(args: argparse.Namespace) -> "Iterator[tuple[Tree, Digest | None, SealedFiles | None]]":
    """Open the tree, and give the root hash of its volume, if it is on one, and what is sealed in it, if that is ext4.

    UserError for options that contradict each other, and for a tree that is none.
    """
    from ipe_emu.simulate.tree import open_tree

    with ExitStack() as stack:
        if os.path.isdir(args.tree):  # noqa: PTH112 - as the user wrote it
            for name in _OF_IMAGES:
                if getattr(args, name, None) is not None:
                    raise UserError(f"--{name.replace('_', '-')}: is for an image, and {escape(args.tree)} is none")
            directory, root_hash = args.tree, None if args.roothash is None else _given(args.roothash)
            seals = None
        else:
            directory, root_hash, seals = stack.enter_context(_opened_image(args))
        tree = stack.enter_context(open_tree(directory))
        if seals is not None:
            seals.check_numbers(os.fstat(tree.fd).st_ino)
        if tree.mounts:
            where = ", ".join(map(escape, tree.mounts))
            say(f"other file systems are mounted in {escape(args.tree)}, and not looked at: {where}")
        yield tree, root_hash, seals


@contextmanager
def known_tree(args: argparse.Namespace, profile: Profile, *, measured: bool) -> "Iterator[Known]":
    """Open the tree with what the options say of its files; see `opened_tree`.

    ``measured`` is whether digests are wanted of files that count as sealed.
    """
    from ipe_emu.cli.verity.images import JOBS
    from ipe_emu.integrity.kernel_state import KernelState
    from ipe_emu.integrity.sources import Combined
    from ipe_emu.linux.verity_state import VerityState
    from ipe_emu.simulate.known import Known, Seals
    from ipe_emu.volumes.ext4_seals import ImageSeals

    is_image = not os.path.isdir(args.tree)  # noqa: PTH112 - as the user wrote it
    if args.signed and args.roothash is None and not is_image:
        raise UserError("--signed: says that a root hash is signed, and there is none (--roothash)")
    if args.fsverity_signed and args.fsverity is None:
        raise UserError("--fsverity-signed: says that files are sealed with a signature, and they are not (--fsverity)")
    if is_image and (args.integrity or args.boot_verified):
        raise UserError("--integrity and --boot-verified name files of this machine, and none that is in an image")
    with opened_tree(args) as (tree, root_hash, in_image):
        if measured and args.fsverity is None and not args.integrity and not (in_image and in_image.by_inode):
            say("the policy names fs-verity digests, and no file counts as sealed (--fsverity sha256 says so)")
        signed = args.signed
        if root_hash is not None and args.root_hash_signature is not None:
            from ipe_emu.cli.verity.dm_verify import verify_signature

            verify_signature(args, root_hash.value, profile)
            signed = True
        facts = Facts(dmverity_roothash=root_hash, dmverity_signature=signed)
        volumes = [] if root_hash is None else [(tree.path, facts)]
        seals = None if args.fsverity is None else Seals(args.fsverity, args.fsverity_signed, measured)
        verify = _verifier(args, profile)
        of_image = ImageSeals(verify)
        if in_image is not None:
            of_image.by_device[tree.location.device] = in_image
        # As for `run`: what this machine's kernel vouches for, where nothing else is said.
        source = KernelState(Combined([of_image, declared_of(args, volumes)]), VerityState(), verify)
        yield Known(tree, source, seals, jobs=JOBS)


def _verifier(args: argparse.Namespace, profile: Profile) -> "Callable[[Digest, bytes], None]":
    """Return what checks builtin signatures of sealed files; keys are read when there is the first one."""

    @functools.cache
    def keyrings() -> "Keyrings":
        return keyrings_of(args, profile)

    def verify(digest: Digest, signature: bytes) -> None:
        from ipe_emu.integrity.fsverity_signature import verify_signature

        verify_signature(digest, signature, keyrings(), unavailable_hashes=profile.unavailable_hashes)

    return verify


def _given(text: str) -> Digest:
    if not _ROOT_HASH.fullmatch(text):
        raise UserError(f"--roothash is {text!r}; it is ALGORITHM:HEX, in lower case")
    algorithm, _, value = text.partition(":")
    return Digest(algorithm, bytes.fromhex(value))


@contextmanager
def _opened_image(args: argparse.Namespace) -> "Iterator[tuple[str, Digest, SealedFiles | None]]":
    from ipe_emu.cli.verity.images import naming, opened
    from ipe_emu.simulate.image import mounted
    from ipe_emu.volumes.ext4_seals import SealedFiles
    from ipe_emu.volumes.recognise import Kind, check_mountable, recognise

    with opened(args.tree) as fd:
        parameters, root_hash = _root_hash(args, fd)

        def read(offset: int, length: int) -> bytes:
            return os.pread(fd, max(0, min(length, parameters.data_size - offset)), offset)

        with naming(args.tree):
            kind = recognise(read, parameters.data_size)
            check_mountable(kind, read, parameters.data_size, parameters.data_block_size)
            say(f"{escape(args.tree)}: {kind.value}, root hash {root_hash}")
            seals = SealedFiles.find(read, parameters.data_size) if kind is Kind.EXT4 else None
        with ExitStack() as stack:
            with naming(args.tree):
                directory = stack.enter_context(mounted(kind, fd, parameters.data_size))
            yield str(directory), root_hash, seals


def _root_hash(args: argparse.Namespace, fd: int) -> "tuple[Parameters, Digest]":
    """Compute the root hash of an image, and compare it with the one that was given. UserError names both."""
    from ipe_emu.cli.verity.dm_options import parameters_of, read_superblock
    from ipe_emu.cli.verity.images import JOBS, naming, opened
    from ipe_emu.cli.verity.progress import progress_bar
    from ipe_emu.integrity.dm_verity import DmVerity, compute_root_hash, parse_root_hash
    from ipe_emu.integrity.dm_verity.tree import check_data_size

    with ExitStack() as stack:
        has_tree = args.hash_image is not None or args.hash_offset is not None
        if has_tree:
            hash_image = args.tree if args.hash_image is None else args.hash_image
            args.hash_offset = args.hash_offset or 0
            hash_fd = stack.enter_context(opened(hash_image))
            with naming(hash_image):
                parameters = read_superblock(args, hash_fd).parameters
        else:
            with naming(args.tree):
                parameters = parameters_of(args, fd)
        with naming(args.tree):
            check_data_size(fd, parameters)
            wanted = None if args.roothash is None else parse_root_hash(args.roothash, parameters.algorithm)
            with progress_bar("hashing", parameters.data_size) as progress:
                found = compute_root_hash(fd, parameters, jobs=JOBS, progress=progress)
            if wanted not in {None, found}:
                salted = "" if has_tree else " (it depends on the salt: --hash-image or --salt says it)"
                what = f"{parameters.algorithm}:{found.hex()}"
                raise UserError(f"its root hash is {what}, and not {args.roothash}{salted}")
            if has_tree:
                offset = parameters.tree_offset(args.hash_offset, superblock=True)
                DmVerity(parameters, found, fd, hash_fd, offset).verify(jobs=JOBS)
    return parameters, Digest(parameters.algorithm, found)
