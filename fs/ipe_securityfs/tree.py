"""The nodes: names, modes and what reading or writing each of them does. Knows nothing of FUSE.

The layout, the modes and the order of creation are those of security/inode.c, security/ipe/fs.c and policy_fs.c.
"""

import errno
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import define, field, frozen

from ipe_emu.ima import LONGEST_WRITE, ImaPolicy
from ipe_emu.lsm import WRITE_LIMIT, Ipe, LoadedPolicy, PolicyAdded, PolicyRemoved, Writer

ROOT_INO = 1
#: The name of the securityfs's root in a file system that has other subtrees.
SECURITY = b"security"
#: The longest name simple_lookup() knows; beyond it is ENAMETOOLONG.
NAME_MAX = 255
#: What kstrtobool_from_user() copies.
BOOLEAN_LENGTH = 3

ReadNode = Callable[[], bytes]
WriteNode = Callable[[bytes, Writer], int]


@define(eq=False)
class Attributes:
    """What setattr can change of a node; ``size`` is what truncate(2) made of it, and has no influence on reading."""

    mode: int
    uid: int
    gid: int
    size: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    #: Of device nodes: the number of the device.
    rdev: int = 0


@define(eq=False)
class Node:
    """One inode. ``removed`` nodes live until nobody refers to them; their number is never given to another."""

    ino: int
    attributes: Attributes
    parent: "Directory | None"
    name: bytes
    removed: bool = field(default=False, init=False)
    #: Whether the name leads here for as long as the tree lives; policies come and go.
    permanent: bool = field(default=False, init=False)
    #: Whether nothing but a setattr changes the attributes.
    constant: bool = field(default=False, init=False)
    #: How often the kernel was told of this inode, less what it has forgotten.
    lookups: int = field(default=0, init=False)

    @property
    def nlink(self) -> int:
        """The link count."""
        return 0 if self.removed else 1

    @property
    def path(self) -> str:
        """Where the node is, or was, below the root; for messages."""
        if self.parent is None:
            return ""
        return f"{self.parent.path}/{self.name.decode('utf-8', 'backslashreplace')}".removeprefix("/")


@define(eq=False)
class Directory(Node):
    """A directory. ``children`` is replaced, never changed, so that readers in other threads need no lock."""

    children: dict[bytes, Node] = field(factory=dict, init=False)
    #: Names that lead somewhere and are not listed.
    aliases: dict[bytes, Node] = field(factory=dict, init=False)

    @property
    def nlink(self) -> int:
        """Two, and one for each directory in it; a removed one has none (``simple_rmdir()``)."""
        if self.removed:
            return 0
        return 2 + sum(isinstance(child, Directory) for child in tuple(self.children.values()))

    def lookup(self, name: bytes) -> Node | None:
        """Return the child of that name."""
        return self.children.get(name) or self.aliases.get(name)

    def listing(self) -> list[tuple[bytes, Node]]:
        """Return names and nodes, the newest first, as ``dcache_readdir()`` gives them."""
        return list(reversed(self.children.items()))


@define(eq=False)
class File(Node):
    """A file. ``read`` or ``write`` is None where the kernel's file_operations have none, which answers EINVAL."""

    read: ReadNode | None = None
    write: WriteNode | None = None
    #: Whether a write is a whole policy (copied in by memdup_user()) and not a boolean, of which three bytes count.
    takes_policy: bool = False
    #: How many bytes of a write are copied in at most.
    copied: int = BOOLEAN_LENGTH
    #: Whether a write may name a file, which is opened as the writer would open it, whatever capabilities he has.
    names_file: bool = False
    #: Whether it can be open once at a time, and for writing alone (``ima_open_policy()``).
    exclusive: bool = False
    #: Whether writing takes the lock of a policy's directory, which an update holds while it verifies and reads files.
    waits: bool = False
    #: Whether this is the name ``activate``, which no released kernel has.
    alias: bool = False
    #: How many open descriptors show a size, because they may yet be read by sendfile(2).
    readers: int = field(default=0, init=False)
    #: Whether an ``exclusive`` one is open.
    taken: bool = field(default=False, init=False)


@define(eq=False)
class SymbolicLink(Node):
    """A symbolic link."""

    target: bytes


@frozen
class Owner:
    """Whom the nodes belong to: root, or the plain user who mounts for himself."""

    uid: int = 0
    gid: int = 0


class Tree:
    """All nodes, kept in step with ``ipe``; the tables may be read from any thread.

    ``root`` is the securityfs's. It is the root of the file system as well, or, with ``beside_others``, the directory
    ``security`` in one that has other subtrees too (`subtrees`): then only a clone of that directory is to be mounted
    where a securityfs belongs. With ``ima`` there is also the node of IMA's policy.
    """

    def __init__(
        self,
        ipe: Ipe,
        *,
        lsm_list: bytes,
        owner: Owner | None = None,
        beside_others: bool = False,
        ima: ImaPolicy | None = None,
    ) -> None:
        self._ipe = ipe
        self._owner = owner or Owner()
        self._inos = itertools.count(ROOT_INO + 1)
        self._nodes: dict[int, Node] = {}
        self._policies: dict[LoadedPolicy, Directory] = {}
        self._change = threading.Lock()
        self.top = Directory(ROOT_INO, self.attributes(stat.S_IFDIR | 0o755), None, b"")
        self._nodes[ROOT_INO] = self.root = self.top
        if beside_others:
            # Without a parent: it is the root of what is seen of it.
            self.root = Directory(next(self._inos), self.attributes(stat.S_IFDIR | 0o755), None, SECURITY)
            self.top.children[SECURITY] = self._nodes[self.root.ino] = self.root
        self._file(self.root, b"lsm", 0o444, read=lambda: lsm_list)
        # In the order of ipe_init_securityfs().
        top = self._directory(self.root, b"ipe")
        self._file(top, b"success_audit", 0o600, read=ipe.getaudit, write=ipe.setaudit)
        self._file(top, b"enforce", 0o600, read=ipe.getenforce, write=ipe.setenforce)
        self.policies = self._directory(top, b"policies")
        self._file(top, b"new_policy", 0o200, write=ipe.new_policy, takes_policy=True)
        if ima is not None:
            self._add_ima(ima)
        for node in self:
            node.permanent = True
        for directory in (self.root, top):  # not policies, whose links are counted
            directory.constant = True
        for loaded in ipe.policies:
            self._add_policy(loaded)
        ipe.subscribe(self._on_news)

    # -- what operations ask --------------------------------------------------------------------------------------

    def node(self, ino: int) -> Node:
        """Return the node of an inode number; KeyError if it was forgotten."""
        return self._nodes[ino]

    def forget(self, ino: int, count: int) -> None:
        """Take note that the kernel dropped ``count`` references; a removed node goes with the last."""
        node = self._nodes.get(ino)
        if node is None:
            return
        node.lookups -= count
        if node.removed and node.lookups <= 0:
            del self._nodes[ino]

    def __iter__(self) -> Iterator[Node]:
        return iter(tuple(self._nodes.values()))

    # -- nodes of other subtrees ----------------------------------------------------------------------------------

    def new_ino(self) -> int:
        """Return an inode number that no node ever had."""
        return next(self._inos)

    def add(self, node: Node) -> None:
        """Take in a node that belongs to no policy, under its name in its parent. FileExistsError if that is taken."""
        parent = node.parent
        assert parent is not None  # noqa: S101 - the root is there from the beginning
        with self._change:
            if node.name in parent.children:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), node.path)
            self._nodes[node.ino] = node
            parent.children = {**parent.children, node.name: node}

    def remove(self, node: Node) -> None:
        """Take such a node away; whoever has it open keeps it."""
        parent = node.parent
        assert parent is not None  # noqa: S101 - as in ``add``
        with self._change:
            parent.children = {name: child for name, child in parent.children.items() if child is not node}
        self._let_go(node)

    def rename(self, node: Node, name: bytes) -> Node | None:
        """Give such a node another name in its directory; return what had that name before, which is removed."""
        parent = node.parent
        assert parent is not None  # noqa: S101 - as in ``add``
        with self._change:
            before = parent.children.get(name)
            others = {key: child for key, child in parent.children.items() if child not in (node, before)}
            parent.children = {**others, name: node}
            node.name = name
        if before is not None and before is not node:
            self._let_go(before)
        return before

    def _let_go(self, node: Node) -> None:
        node.removed = True
        if node.lookups <= 0:
            self._nodes.pop(node.ino, None)

    # -- policies that come and go --------------------------------------------------------------------------------

    def _on_news(self, news: PolicyAdded | PolicyRemoved) -> None:
        match news:
            case PolicyAdded(loaded):
                self._add_policy(loaded)
            case PolicyRemoved(loaded):
                self._remove_policy(loaded)

    def _add_policy(self, loaded: LoadedPolicy) -> None:
        """Make a policy's directory (``ipe_new_policyfs_node()``)."""
        ipe = self._ipe
        directory = Directory(
            next(self._inos),
            self.attributes(stat.S_IFDIR | 0o755),
            self.policies,
            loaded.name.encode("latin-1"),
        )
        self._file(directory, b"pkcs7", 0o444, read=lambda: ipe.read_pkcs7(loaded))
        self._file(directory, b"policy", 0o444, read=lambda: ipe.read_policy(loaded))
        self._file(directory, b"name", 0o444, read=lambda: ipe.read_name(loaded))
        self._file(directory, b"version", 0o444, read=lambda: ipe.read_version(loaded))
        active = self._file(
            directory,
            b"active",
            0o600,
            read=lambda: ipe.getactive(loaded),
            write=lambda data, writer: ipe.setactive(loaded, data, writer),
            waits=True,
        )
        self._file(
            directory,
            b"update",
            0o200,
            write=lambda data, writer: ipe.update(loaded, data, writer),
            takes_policy=True,
        )
        self._file(
            directory,
            b"delete",
            0o200,
            write=lambda data, writer: ipe.delete_policy(loaded, data, writer),
            waits=True,
        )
        if ipe.profile.unsigned_policies:
            # An inode of its own, so that its opening can be told apart and counted; the attributes are shared.
            alias = File(next(self._inos), active.attributes, directory, b"activate", active.read, active.write)
            alias.waits = alias.alias = True
            directory.aliases[b"activate"] = self._nodes[alias.ino] = alias
        with self._change:
            self._policies[loaded] = directory
            self._nodes[directory.ino] = directory
            self.policies.children = {**self.policies.children, directory.name: directory}

    def _remove_policy(self, loaded: LoadedPolicy) -> None:
        """Take a policy's directory away with all in it (``securityfs_recursive_remove()``)."""
        with self._change:
            directory = self._policies.pop(loaded)
            # A policy of the same name may have been loaded since, and its news may have come first.
            self.policies.children = {n: node for n, node in self.policies.children.items() if node is not directory}
        for node in (directory, *directory.children.values(), *directory.aliases.values()):
            self._let_go(node)

    # -- IMA ------------------------------------------------------------------------------------------------------

    def _add_ima(self, ima: ImaPolicy) -> None:
        """Make what ``ima_fs_init()`` makes, of its nodes the one that matters to IPE.

        Without CONFIG_IMA_READ_POLICY nobody reads it; with CONFIG_IMA_WRITE_POLICY it can be written again and again.
        """
        directory = self._directory(self._directory(self.root, b"integrity"), b"ima")
        policy = self._file(directory, b"policy", 0o200, write=ima.write, waits=True)
        policy.copied, policy.names_file, policy.exclusive = LONGEST_WRITE, True, True
        attributes = self.attributes(stat.S_IFLNK | 0o444)
        link = SymbolicLink(next(self._inos), attributes, self.root, b"ima", b"integrity/ima")
        self.root.children[link.name] = self._nodes[link.ino] = link

    # -- making nodes ---------------------------------------------------------------------------------------------

    def attributes(self, mode: int) -> Attributes:
        """Return those of a new node of this mode, which belongs to the root of who sees it."""
        now = time.time_ns()
        return Attributes(mode, self._owner.uid, self._owner.gid, 0, now, now, now)

    def _directory(self, parent: Directory, name: bytes) -> Directory:
        node = Directory(next(self._inos), self.attributes(stat.S_IFDIR | 0o755), parent, name)
        parent.children[name] = self._nodes[node.ino] = node
        return node

    def _file(
        self,
        parent: Directory,
        name: bytes,
        mode: int,
        *,
        read: ReadNode | None = None,
        write: WriteNode | None = None,
        takes_policy: bool = False,
        waits: bool = False,
    ) -> File:
        attributes = self.attributes(stat.S_IFREG | mode)
        node = File(next(self._inos), attributes, parent, name, read, write, takes_policy=takes_policy, waits=waits)
        if takes_policy:
            node.copied = WRITE_LIMIT
        parent.children[name] = self._nodes[node.ino] = node
        return node


def lsm_list(source: Path = Path("/sys/kernel/security/lsm")) -> tuple[bytes, bool]:
    """Return what ``lsm`` shows, this machine's list with ``ipe`` in it, and whether the machine's could be read.

    Where it cannot (securityfs is not mounted in most containers) the list is the shortest a kernel with IPE has.
    """
    try:
        names = source.read_bytes().strip().split(b",")
        known = bool(names[0])
    except OSError:
        names, known = [b"capability"], False
    if not known:
        names = [b"capability"]
    if b"ipe" not in names:
        names.append(b"ipe")
    return b",".join(names), known
