"""What can be done in a directory of device nodes (`subtrees.NodeDirectory`): links, removals, other names."""

import errno
import stat
import time
from typing import Final

from ipe_emu.errors import KernelError
from ipe_securityfs.subtrees import NodeDirectory
from ipe_securityfs.tree import Attributes, Node, Owner, SymbolicLink, Tree

_RENAME_NOREPLACE: Final = 1


def symlink(tree: Tree, parent: NodeDirectory, name: bytes, target: bytes, owner: Owner) -> SymbolicLink:
    """Make a symbolic link; KernelError EEXIST."""
    now = time.time_ns()
    attributes = Attributes(stat.S_IFLNK | 0o777, owner.uid, owner.gid, len(target), now, now, now)
    link = SymbolicLink(tree.new_ino(), attributes, parent, name, target)
    try:
        tree.add(link)
    except FileExistsError:
        raise KernelError(errno.EEXIST, "the name is taken", "filename_create") from None
    return link


def unlink(tree: Tree, parent: NodeDirectory, name: bytes) -> None:
    """Remove a name; KernelError ENOENT."""
    tree.remove(_child(parent, name))


def rename(tree: Tree, parent: NodeDirectory, name: bytes, new_name: bytes, flags: int) -> None:
    """Change a name, in place of another if there is one; KernelError ENOENT, EEXIST, EINVAL."""
    node = _child(parent, name)
    if flags & ~_RENAME_NOREPLACE:
        raise KernelError(errno.EINVAL, "such a renaming is not known here", "fuse_rename2")
    if flags and parent.lookup(new_name) is not None:
        raise KernelError(errno.EEXIST, "the name is taken", "do_renameat2")
    tree.rename(node, new_name)


def _child(parent: NodeDirectory, name: bytes) -> Node:
    node = parent.lookup(name)
    if node is None:
        raise KernelError(errno.ENOENT, "there is no such name", "do_unlinkat")
    return node
