"""What one FUSE session serves beside the securityfs: image files, disks, device nodes, and texts as in /proc.

pyfuse3 serves one session per process, so that whatever else is to be seen as a file is a subtree of this one. Only
clones of single directories and files are mounted where a rehearsed tree can see them.
"""

import stat
from collections.abc import Callable
from typing import Protocol

from attrs import define

from ipe_securityfs.tree import Directory, Node, Owner, Tree

#: The names of the directories in the file system's root.
IMAGES = b"images"
DEVICES = b"devices"
TEXTS = b"texts"
MAPPER = b"mapper"


class Content(Protocol):
    """What can be read of an image, in any thread."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer only at the end. KernelError for what cannot be read, such as EIO."""


@define(eq=False)
class ImageFile(Node):
    """A regular file that can be read and nothing else. Its content never changes, and the kernel may keep it."""

    content: Content


class Disk(Content, Protocol):
    """What is behind the node of a block device; in any thread. Its size may change."""

    def write(self, offset: int, data: bytes) -> int:
        """Write what fits, and return its length. KernelError as the device answers."""

    def opened(self) -> None:
        """Note that a file was opened on it."""

    def closed(self) -> None:
        """Note that such a file was closed for the last time."""


@define(eq=False)
class DiskFile(Node):
    """A file that reads and writes what a block device does. Its content is never kept by the kernel."""

    disk: Disk


@define(eq=False)
class DeviceNode(Node):
    """A block or character device as stat(2) shows it. What opening it means is for who traps open(2) to say."""


@define(eq=False)
class TextFile(Node):
    """A file as those of /proc: everybody may read it, its size is 0, and each open sees the text of that moment.

    ``text`` is called in any thread.
    """

    text: Callable[[], bytes]


@define(eq=False)
class NodeDirectory(Directory):
    """A directory of device nodes and links to them in which names can be removed and changed, as in a devtmpfs.

    mknod(2) does not get here: the kernel refuses it in a user namespace. For who traps it there is ``add_device``.
    """


class Subtrees:
    """Puts nodes beside the securityfs of a tree that was made with ``beside_others``; from any thread."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.images = self._directory(IMAGES, 0o700)
        self.devices = self._directory(DEVICES, 0o755)
        self.texts = self._directory(TEXTS, 0o755)
        #: What /dev/mapper is: mounted as a whole, because programs take a mount on a name in it for one *of* a device.
        self.mapper = NodeDirectory(tree.new_ino(), self._tree.attributes(stat.S_IFDIR | 0o755), tree.top, MAPPER)
        tree.add(self.mapper)

    def add_image(self, name: bytes, content: Content) -> ImageFile:
        """Serve an image as ``images/NAME``. FileExistsError if there is one of that name."""
        attributes = self._tree.attributes(stat.S_IFREG | 0o400)
        attributes.size = content.size
        image = ImageFile(self._tree.new_ino(), attributes, self.images, name, content)
        image.permanent = image.constant = True
        self._tree.add(image)
        return image

    def add_disk(self, name: bytes, disk: Disk) -> DiskFile:
        """Serve a disk as ``images/NAME``. FileExistsError if there is one of that name."""
        node = DiskFile(self._tree.new_ino(), self._tree.attributes(stat.S_IFREG | 0o600), self.images, name, disk)
        self._tree.add(node)
        return node

    def add_device(
        self,
        name: bytes,
        mode: int,
        number: int,
        *,
        owner: Owner | None = None,
        directory: NodeDirectory | None = None,
    ) -> DeviceNode:
        """Serve a node as ``devices/NAME``: ``mode`` with its type (S_IFBLK, S_IFCHR), ``number`` as os.makedev().

        Or in another ``directory``. It can be given another mode and owner, as in a devtmpfs; at first it is the
        tree's, or ``owner``'s. FileExistsError if there is one of that name.
        """
        attributes = self._tree.attributes(mode)
        if owner is not None:
            attributes.uid, attributes.gid = owner.uid, owner.gid
        attributes.rdev = number
        node = DeviceNode(self._tree.new_ino(), attributes, directory or self.devices, name)
        self._tree.add(node)
        return node

    def add_text(self, name: bytes, text: Callable[[], bytes]) -> TextFile:
        """Serve a text as ``texts/NAME``. FileExistsError if there is one of that name."""
        node = TextFile(self._tree.new_ino(), self._tree.attributes(stat.S_IFREG | 0o444), self.texts, name, text)
        node.permanent = node.constant = True
        self._tree.add(node)
        return node

    def remove(self, node: ImageFile | DiskFile | DeviceNode) -> None:
        """Take a node away; whoever has an image open can read on."""
        self._tree.remove(node)

    def _directory(self, name: bytes, mode: int) -> Directory:
        directory = Directory(self._tree.new_ino(), self._tree.attributes(stat.S_IFDIR | mode), self._tree.top, name)
        directory.permanent = True
        self._tree.add(directory)
        return directory
