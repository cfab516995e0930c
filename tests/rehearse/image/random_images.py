"""Images that nobody would make: few names, so that members meet; every type, compression, lie and damage."""

import random
import stat

from tests.rehearse.image.making import REFUSED, TOOLS, TRAILER, compress, member, padded

_NAMES = (
    b"a", b"b", b"d", b"d/x", b"d/y", b"d/e", b"d/e/f", b"l", b"l/z", b"/abs", b"../up", b"a/", b"d/", b"l/", b".",
    b"..", b"", b"d/..", b"d/../q", b"nop/x", b"a/x", b"x" * 255, b"x" * 256, b"./a", b"//d//x", b"TRAILER!!!",
    b"d/TRAILER!!!", b"dev/null", b"fifo", b"sock", b"\xff\xfe w",
)  # fmt: skip
_TARGETS = (
    b"d", b"/d", b"a", b"..", b"../..", b"/", b"nowhere", b"l", b"d/e", b"/dev", b"x\0y", b"t" * 4095, b"t" * 4096,
)  # fmt: skip
_PERMISSIONS = (0o644, 0o755, 0, 0o4755, 0o1777, 0o2755)
_NODES = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
_ODD_NUMBERS = (b"0x12zzzz", b"0000001g", b"        ", b"+0000001", b"0X000001", b"1_2_3_4_")
_COMPRESSIONS = {**TOOLS, **{name: command for name, (command, _) in REFUSED.items()}}


def random_image(seed: int, prefix: bytes) -> bytes:
    """An image that begins with the archive ``prefix``, which is left as it is."""
    choice = random.Random(seed)
    image = prefix
    for _ in range(choice.randrange(1, 4)):
        segment = _archive(choice)
        kind = choice.choice(["none"] * len(_COMPRESSIONS) + sorted(_COMPRESSIONS))
        if kind != "none":
            segment = compress(_COMPRESSIONS[kind], segment)
        if kind == "none" or choice.random() < 0.5:
            image = padded(image)
        elif choice.random() < 0.3:
            image += bytes(choice.randrange(7))
        image += segment
    damage = choice.random()
    if damage < 0.15:
        return image[: choice.randrange(len(prefix), len(image) + 1)]
    if damage < 0.3:
        place = choice.randrange(len(prefix), len(image))
        return image[:place] + bytes([choice.randrange(256)]) + image[place + 1 :]
    return image


def _archive(choice: random.Random) -> bytes:
    archive = b""
    for _ in range(choice.randrange(1, 12)):
        archive += _member(choice)
        if choice.random() < 0.05:
            archive += bytes(choice.randrange(9))
    if choice.random() < 0.7:
        archive += TRAILER
    if choice.random() < 0.3:
        archive += bytes(-len(archive) % 512)
    return archive


def _member(choice: random.Random) -> bytes:
    name, permissions = choice.choice(_NAMES), choice.choice(_PERMISSIONS)
    kind = choice.choices(["file", "directory", "link", "node", "odd"], [8, 5, 4, 4, 1])[0]
    data = b""
    if kind == "file":
        mode = stat.S_IFREG | permissions
        data = choice.choice([b"", b"hello", b"0123456789" * choice.choice([1, 10, 500])])
    elif kind == "directory":
        mode = stat.S_IFDIR | permissions
    elif kind == "link":
        mode, data = stat.S_IFLNK | 0o777, choice.choice(_TARGETS)
    elif kind == "node":
        mode = choice.choice(_NODES) | permissions
    else:
        mode = choice.choice([0, 0o150000, 0o170000, 0x1FFFF])
    nlink, ino = choice.choice([(1, 0)] * 7 + [(2, 1), (3, 1), (2, 2)])
    magic, checksum = b"070701", 0
    if choice.random() < 0.3:
        magic, checksum = b"070702", sum(data) + (choice.random() < 0.1)
    if choice.random() < 0.02:
        magic = choice.choice([b"070707", b"070703"])
    rare = choice.random()
    return member(
        name,
        mode,
        data,
        magic=magic,
        ino=ino,
        nlink=nlink,
        uid=choice.choice([0, 0, 0, 5, 1000]),
        gid=choice.choice([0, 0, 7]),
        mtime=choice.choice([1, 1000, 1 << 31, (1 << 32) - 1]),
        rdev=choice.choice([(1, 3), (8, 1), (0, 0), (300, 70000), (5000, 3)]) if kind == "node" else (0, 0),
        checksum=checksum,
        raw={choice.randrange(13): choice.choice(_ODD_NUMBERS)} if rare < 0.02 else None,
        name_size=choice.choice([0, 1, len(name), len(name) + 5, 4096, 4097, 100_000]) if 0.02 < rare < 0.04 else None,
        size=choice.choice([0, 1, len(data) + 1, len(data) + 4, 4096, 4097, 10**6]) if 0.04 < rare < 0.06 else None,
    )
