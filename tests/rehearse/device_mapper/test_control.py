import errno
import os
import random
import struct
from typing import Any

import pytest

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.rehearse.device_mapper.ioctl import Command, Flag
from tests.rehearse.device_mapper.caller import HEADER, Machine, block, reply, specs, targets_of

LINEAR = (0, 8, b"linear", b"/dev/vdb 16")


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(("kernel", "version"), [("linux-6.12", (4, 48, 0)), ("linux-7.3", (4, 50, 0))])
def test_the_version_is_the_kernels(kernel: str, version: tuple[int, int, int]) -> None:
    machine = Machine(kernel)
    for theirs, error in (
        ((4, 0, 0), 0),
        (version, 0),
        ((4, version[1] + 1, 0), errno.EINVAL),
        ((3, 0, 0), errno.EINVAL),
    ):
        found = reply(*machine.raw(0xC138FD00, block(version=theirs)))
        assert found.errno == error
        assert found.fields["version"] == version  # written in any case


def test_who_may(machine: Machine) -> None:
    memory = block()
    assert machine.raw(0xC138FD00, memory, capable=False) == (errno.EACCES, memory)


@pytest.mark.parametrize("request_", [0xC1380000, 0xC138FE00, 0xFD1200])
def test_other_ioctls(machine: Machine, request_: int) -> None:
    memory = block()
    assert machine.raw(request_, memory) == (errno.ENOTTY, memory)


def test_commands_that_do_not_exist(machine: Machine) -> None:
    for number in (18, 64, 255):
        assert reply(*machine.raw(0xC138FD00 | number, block())).errno == errno.ENOTTY


def test_direction_and_size_of_a_request_do_not_count(machine: Machine) -> None:
    assert machine.raw(0xFD00 | Command.LIST_DEVICES, block())[0] == 0


@pytest.mark.parametrize("size", [0, 304, 0x40000001, 0xFFFFFFFF])
def test_sizes_of_blocks_that_are_none(machine: Machine, size: int) -> None:
    memory = block(size=400)
    struct.pack_into("<I", memory, 12, size)
    assert machine.raw(0xC138FD00 | Command.LIST_DEVICES, memory)[0] == errno.EINVAL


def test_a_block_that_no_tool_makes(machine: Machine) -> None:
    memory = block(size=400)
    struct.pack_into("<I", memory, 12, 17 << 20)
    with pytest.raises(NotJudgedError, match="bytes of data"):
        machine.raw(0xC138FD00 | Command.LIST_DEVICES, memory)


@pytest.mark.parametrize("there", [0, 11, 12, 304, 305, 311, 399])
def test_memory_that_ends_early(machine: Machine, there: int) -> None:
    memory = block(size=400)[:there]
    assert machine.raw(0xC138FD00 | Command.LIST_DEVICES, memory)[0] == errno.EFAULT
    # Some commands look at the header alone.
    assert machine.raw(0xC138FD00 | Command.REMOVE_ALL, memory)[0] == (0 if there >= 305 else errno.EFAULT)


def test_a_device_from_its_making_to_its_end(machine: Machine) -> None:
    made = machine.call(Command.DEV_CREATE, name=b"root", uuid=b"CRYPT-VERITY-1")
    assert (made.errno, made.fields["dev"], made.flags) == (0, os.makedev(253, 0), Flag(0))
    assert machine.seen.said == []  # the disk is there once there is a table (dm_setup_md_queue)
    assert machine.devices.find(os.makedev(253, 0)) is None
    loaded = machine.call(Command.TABLE_LOAD, dev=os.makedev(253, 0), targets=1, data=specs([LINEAR]))
    assert (loaded.errno, loaded.flags) == (0, Flag.INACTIVE_PRESENT)
    assert (loaded.fields["name"], loaded.fields["uuid"]) == (b"root", b"CRYPT-VERITY-1")
    assert machine.seen.said == ["+dm-0"]
    device = machine.devices.named("dm-0")
    assert device is not None
    assert device.size == 0
    resumed = machine.call(Command.DEV_SUSPEND, uuid=b"CRYPT-VERITY-1")
    assert (resumed.errno, resumed.flags) == (0, Flag.ACTIVE_PRESENT | Flag.UEVENT_GENERATED)
    assert device.read(0, 4096) == machine.vdb.read(16 * 512, 4096)
    assert device.size == 4096
    again = machine.call(Command.DEV_SUSPEND, name=b"root")
    assert (again.errno, again.flags) == (0, Flag.ACTIVE_PRESENT)  # nothing to resume, no event
    device.openers += 1
    assert machine.call(Command.DEV_STATUS, name=b"root").fields["open"] == 1
    assert machine.call(Command.DEV_REMOVE, name=b"root").errno == errno.EBUSY
    device.openers -= 1
    removed = machine.call(Command.DEV_REMOVE, name=b"root", event_nr=7)
    assert machine.seen.told_udev == ["change root 0", "remove root 7"]
    assert (removed.errno, removed.flags & Flag.UEVENT_GENERATED) == (0, Flag.UEVENT_GENERATED)
    assert machine.seen.said[-1] == "-dm-0"
    assert machine.devices.named("dm-0") is None
    assert machine.devices.claims(machine.vdb) == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": b"root"}, 0),
        ({"uuid": b"u"}, 0),
        ({"dev": os.makedev(253, 0)}, 0),
        ({"dev": os.makedev(253, 0) | 1 << 32}, 0),  # huge_decode_dev() looks at the low half
        ({}, errno.ENXIO),
        ({"name": b"other"}, errno.ENXIO),
        ({"uuid": b"v"}, errno.ENXIO),
        ({"dev": os.makedev(254, 0)}, errno.ENXIO),
        ({"name": b"root", "uuid": b"u"}, errno.EINVAL),
        ({"name": b"root", "dev": os.makedev(253, 0)}, errno.ENXIO),
        ({"uuid": b"u", "dev": os.makedev(253, 0)}, errno.ENXIO),
    ],
)
def test_how_a_device_is_found(machine: Machine, fields: dict[str, Any], error: int) -> None:
    machine.call(Command.DEV_CREATE, name=b"root", uuid=b"u")
    for command in (Command.DEV_STATUS, Command.TABLE_STATUS, Command.TABLE_DEPS, Command.TABLE_CLEAR):
        found = machine.call(command, **fields)
        assert found.errno == error
        if not error:
            assert (found.fields["name"], found.fields["uuid"]) == (b"root", b"u")


@pytest.mark.parametrize("name", [b"", b"a/b", b".", b"..", b"control"])
def test_names_that_are_none(machine: Machine, name: bytes) -> None:
    assert machine.call(Command.DEV_CREATE, name=name).errno == errno.EINVAL
    machine.call(Command.DEV_CREATE, name=b"root")
    if name:
        assert machine.call(Command.DEV_RENAME, name=b"root", data=name + b"\0").errno == errno.EINVAL


def test_names_are_cut_where_the_field_ends(machine: Machine) -> None:
    assert machine.call(Command.DEV_CREATE, name=b"n" * 128).fields["name"] == b"n" * 127


def test_two_of_one_name_or_uuid_or_number(machine: Machine) -> None:
    assert machine.call(Command.DEV_CREATE, name=b"a", uuid=b"u").errno == 0
    assert machine.call(Command.DEV_CREATE, name=b"a").errno == errno.EBUSY
    assert machine.call(Command.DEV_CREATE, name=b"b", uuid=b"u").errno == errno.EBUSY
    persistent: dict[str, Any] = {"flags": Flag.PERSISTENT_DEV, "dev": os.makedev(253, 0)}
    assert machine.call(Command.DEV_CREATE, name=b"b", **persistent).errno == errno.EBUSY
    persistent["dev"] = os.makedev(253, 7)
    assert machine.call(Command.DEV_CREATE, name=b"b", **persistent).fields["dev"] == os.makedev(253, 7)
    assert machine.call(Command.DEV_CREATE, name=b"c").fields["dev"] == os.makedev(253, 1)


def test_renaming(machine: Machine) -> None:
    machine.create(b"a", LINEAR)
    machine.call(Command.DEV_CREATE, name=b"b", uuid=b"u")
    assert machine.call(Command.DEV_RENAME, name=b"a", data=b"b\0").errno == errno.EBUSY
    assert machine.call(Command.DEV_RENAME, name=b"z", data=b"y\0").errno == errno.ENXIO
    assert machine.call(Command.DEV_RENAME, name=b"a", data=b"n" * 128 + b"\0").errno == errno.EINVAL
    assert machine.call(Command.DEV_RENAME, name=b"a", size=320, data=b"unended!").errno == errno.EINVAL
    assert machine.call(Command.DEV_RENAME, name=b"a", start=8, data=b"c\0").errno == errno.EINVAL
    renamed = machine.call(Command.DEV_RENAME, name=b"a", data=b"c\0")
    assert (renamed.errno, renamed.fields["event"]) == (0, 1)
    assert machine.call(Command.DEV_RENAME, name=b"c", flags=Flag.UUID, data=b"u\0").errno == errno.EBUSY
    assert machine.call(Command.DEV_RENAME, name=b"c", flags=Flag.UUID, data=b"v\0").errno == 0
    assert machine.call(Command.DEV_RENAME, name=b"c", flags=Flag.UUID, data=b"w\0").errno == errno.EINVAL
    assert machine.call(Command.DEV_STATUS, uuid=b"v").fields["name"] == b"c"


def names_in(found: Any) -> list[tuple[int, bytes]]:
    names, position = [], 0
    while found.data[position:]:
        dev, following = struct.unpack_from("<QI", found.data, position)
        names.append((dev, found.data[position + 12 :].split(b"\0")[0]))
        if not following:
            break
        position += following
    return names


def test_lists(machine: Machine) -> None:
    empty = machine.call(Command.LIST_DEVICES)
    assert (empty.fields["size"], empty.data) == (312, b"")
    for name, uuid in ((b"b", b""), (b"a-long-name", b"LUKS-1"), (b"c", b"")):
        machine.call(Command.DEV_CREATE, name=name, uuid=uuid)
    assert names_in(machine.call(Command.LIST_DEVICES)) == [
        (os.makedev(253, 1), b"a-long-name"), (os.makedev(253, 0), b"b"), (os.makedev(253, 2), b"c"),
    ]  # fmt: skip
    assert [name for _, name in names_in(machine.call(Command.LIST_DEVICES, uuid=b"LUKS"))] == [b"a-long-name"]
    with_uuid = machine.call(Command.LIST_DEVICES, name=b"a", flags=Flag.UUID)
    assert with_uuid.data == (
        struct.pack("<QI", os.makedev(253, 1), 0) + b"a-long-name\0" + struct.pack("<II", 0, 1) + b"LUKS-1\0\0"
    )
    for size in (305, 312, 319, 330):
        short = machine.call(Command.LIST_DEVICES, size=size)
        assert (short.errno, short.flags & Flag.BUFFER_FULL, short.fields["size"]) == (0, Flag.BUFFER_FULL, 305)


def test_versions_of_target_types(machine: Machine) -> None:
    found = machine.call(Command.LIST_VERSIONS)
    names, position = {}, 0
    while True:
        following, *version = struct.unpack_from("<4I", found.data, position)
        names[found.data[position + 16 :].split(b"\0")[0]] = tuple(version)
        if not following:
            break
        position += following
    assert names == {
        b"crypt": (1, 29, 0), b"error": (1, 7, 0), b"linear": (1, 5, 0), b"verity": (1, 13, 0), b"zero": (1, 2, 0),
    }  # fmt: skip
    one = machine.call(Command.GET_TARGET_VERSION, name=b"verity")
    assert (one.errno, one.data[:23]) == (0, struct.pack("<4I", 0, 1, 13, 0) + b"verity\0")
    assert machine.call(Command.GET_TARGET_VERSION, name=b"verify").errno == errno.EINVAL
    assert machine.call(Command.LIST_VERSIONS, size=320).flags & Flag.BUFFER_FULL


def test_status_and_table(machine: Machine) -> None:
    lines = [
        (0, 8, b"linear", b"254:16 16"),
        (8, 24, b"linear", b"254:0 0"),
        (32, 1, b"zero", b""),
        (33, 2, b"error", b""),
    ]
    given = [(0, 8, b"linear", b"/dev/vdb 16"), (8, 24, b"linear", b"254:0 0"), *lines[2:]]
    assert machine.create(b"a", *given, flags=0).errno == 0
    assert targets_of(machine.call(Command.TABLE_STATUS, name=b"a", flags=Flag.STATUS_TABLE)) == lines
    assert [line[3] for line in targets_of(machine.call(Command.TABLE_STATUS, name=b"a"))] == [b""] * 4
    deps = machine.call(Command.TABLE_DEPS, name=b"a")
    assert struct.unpack("<IIQQ", deps.data) == (2, 0, machine.vda.number, machine.vdb.number)
    assert machine.call(Command.TABLE_DEPS, name=b"a", size=330).flags & Flag.BUFFER_FULL
    device = machine.devices.named("dm-0")
    assert device is not None
    assert device.read(0, 32 * 512 + 512) == machine.vdb.read(8192, 4096) + bytes(24 * 512 + 512)
    with pytest.raises(KernelError) as caught:
        device.read(33 * 512, 1)
    assert caught.value.errno == errno.EIO


def test_what_does_not_fit_is_cut_at_a_target(machine: Machine) -> None:
    machine.create(b"a", LINEAR, (8, 8, b"linear", b"/dev/vdb 0"))
    whole = machine.call(Command.TABLE_STATUS, name=b"a", flags=Flag.STATUS_TABLE).fields["size"]
    full = set()
    for size in range(305, whole + 2):
        found = machine.call(Command.TABLE_STATUS, name=b"a", flags=Flag.STATUS_TABLE, size=size)
        assert found.fields["targets"] == 2
        if found.flags & Flag.BUFFER_FULL:
            full.add(found.fields["size"])
        else:
            assert size > whole
    # Where all fits but what aligns it, all is there and the flag is set.
    assert full == {305, 312 + 40 + len(b"254:16 16\0"), whole}


def test_suspending(machine: Machine) -> None:
    machine.call(Command.DEV_CREATE, name=b"a")
    assert machine.call(Command.DEV_SUSPEND, name=b"a", flags=Flag.SUSPEND).flags == Flag.SUSPEND
    assert machine.call(Command.DEV_SUSPEND, name=b"a").errno == errno.EINVAL  # dm_resume() without a table
    machine.load(b"a", LINEAR)
    assert machine.call(Command.DEV_SUSPEND, name=b"a").errno == 0
    found = machine.call(Command.DEV_SUSPEND, name=b"a", flags=Flag.SUSPEND)
    assert found.flags == Flag.SUSPEND | Flag.ACTIVE_PRESENT | Flag.READONLY


def test_a_table_that_waits(machine: Machine) -> None:
    machine.create(b"a", LINEAR, flags=0)
    machine.load(b"a", (0, 16, b"linear", b"/dev/vda 0"))
    waiting = machine.call(Command.TABLE_STATUS, name=b"a", flags=Flag.QUERY_INACTIVE_TABLE | Flag.STATUS_TABLE)
    assert targets_of(waiting) == [(0, 16, b"linear", b"254:0 0")]
    assert waiting.flags & (Flag.READONLY | Flag.INACTIVE_PRESENT) == Flag.READONLY | Flag.INACTIVE_PRESENT
    assert machine.devices.claims(machine.vda) == 1
    cleared = machine.call(Command.TABLE_CLEAR, name=b"a")
    assert not cleared.flags & Flag.INACTIVE_PRESENT
    assert machine.devices.claims(machine.vda) == 0


@pytest.mark.parametrize(
    ("targets", "error"),
    [
        ([], errno.EINVAL),
        ([(0, 0, b"linear", b"/dev/vdb 0")], errno.EINVAL),
        ([(1, 8, b"linear", b"/dev/vdb 0")], errno.EINVAL),
        ([LINEAR, (9, 8, b"linear", b"/dev/vdb 0")], errno.EINVAL),
        ([(0, 1 << 55, b"linear", b"/dev/vdb 0")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb 0 0")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb -1")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb 0x10")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdc 0")], errno.ENOENT),
        ([(0, 8, b"linear", b"254:32 0")], errno.ENXIO),
        ([(0, 8, b"linear", b"4096:0 0")], errno.EOVERFLOW),
        ([(0, 8, b"linear", b"253:0 0")], errno.EINVAL),  # onto itself
        ([(0, 513, b"linear", b"/dev/vdb 0")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb 505")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb 18446744073709551615")], errno.EINVAL),
        ([(0, 8, b"nonsense", b"")], errno.EINVAL),
        ([(0, 8, b"", b"")], errno.EINVAL),
        ([(0, 8, b"zero", b"1")], errno.EINVAL),
        ([(0, 8, b"linear", b"/dev/vdb 18446744073709551632")], 0),  # sscanf() keeps 64 bits: 16
        ([(0, 8, b"linear", b" \\/dev\\/vdb\t\xa016 ")], 0),
    ],
)
def test_tables(machine: Machine, targets: list[tuple[int, int, bytes, bytes]], error: int) -> None:
    assert machine.create(b"a", *targets).errno == error
    assert machine.devices.claims(machine.vdb) == (0 if error else 1)
    if error:
        assert machine.devices.named("dm-0") is None


@pytest.mark.parametrize("kind", [b"striped", b"snapshot", b"integrity", b"thin-pool"])
def test_target_types_that_are_not_emulated(machine: Machine, kind: bytes) -> None:
    with pytest.raises(NotJudgedError, match=kind.decode()):
        machine.create(b"a", (0, 8, kind, b""))


def test_specs_that_lie(machine: Machine) -> None:
    machine.call(Command.DEV_CREATE, name=b"a")

    def load(data: bytes, targets: int = 1, start: int = 312, size: int = 1024) -> int:
        return machine.call(Command.TABLE_LOAD, name=b"a", data=data, targets=targets, start=start, size=size).errno

    good = specs([LINEAR])
    assert load(good) == 0
    for start in (0, 304, 305, 311, 313, 1024, 985, 0xFFFFFFF8):
        assert load(good, start=start) == errno.EINVAL
    assert load(good, targets=2) == errno.EINVAL
    assert load(good, targets=0xFFFFFFFF) == errno.EOVERFLOW
    assert load(good, targets=1 << 20) == errno.EINVAL
    assert load(good[:40] + b"a" * 700, size=1024) == errno.EINVAL
    two = bytearray(specs([LINEAR, (8, 8, b"linear", b"/dev/vdb 0")]))
    assert load(bytes(two), targets=2) == 0
    for following in (0, 8, 40, 51, 53, 1 << 31):
        struct.pack_into("<I", two, 20, following)
        assert load(bytes(two), targets=2) == errno.EINVAL


def test_devices_on_devices(machine: Machine) -> None:
    assert machine.create(b"lower", LINEAR).errno == 0
    assert machine.create(b"upper", (0, 4, b"linear", b"253:0 2")).errno == 0
    upper = machine.devices.named("dm-1")
    assert upper is not None
    assert upper.read(0, 2048) == machine.vdb.read(18 * 512, 2048)
    assert machine.call(Command.DEV_REMOVE, name=b"lower").errno == errno.EBUSY
    assert machine.call(Command.DEV_STATUS, name=b"lower").fields["open"] == 1
    deferred = machine.call(Command.DEV_REMOVE, name=b"lower", flags=Flag.DEFERRED_REMOVE)
    assert deferred.errno == 0
    assert machine.call(Command.DEV_STATUS, name=b"lower").flags & Flag.DEFERRED_REMOVE
    assert machine.call(Command.DEV_REMOVE, name=b"upper").errno == 0
    machine.dm.closed(os.makedev(253, 0))
    assert machine.call(Command.DEV_STATUS, name=b"lower").errno == errno.ENXIO


def test_removing_all(machine: Machine) -> None:
    machine.create(b"a", LINEAR)
    machine.create(b"b", (0, 4, b"linear", b"253:0 2"))
    machine.create(b"c", (0, 4, b"zero", b""))
    device = machine.devices.named("dm-2")
    assert device is not None
    device.openers = 1
    assert machine.call(Command.REMOVE_ALL).errno == 0
    assert [name for _, name in names_in(machine.call(Command.LIST_DEVICES))] == [b"c"]


def test_a_disk_in_use_cannot_be_mapped(machine: Machine) -> None:
    machine.devices.claim(machine.vdb, "a file system")
    assert machine.create(b"a", LINEAR).errno == errno.EBUSY
    machine.devices.release(machine.vdb, "a file system")
    assert machine.create(b"a", LINEAR).errno == 0
    with pytest.raises(KernelError, match="vdb is in use"):
        machine.devices.claim(machine.vdb, "a file system")


def test_secure_data_is_wiped(machine: Machine) -> None:
    memory = block(size=512, flags=Flag.SECURE_DATA, name=b"none", data=b"secret")
    error, after = machine.raw(0xC138FD00 | Command.TABLE_STATUS, memory)
    assert (error, bytes(after)) == (errno.ENXIO, bytes(512))


def test_waiting_and_messages(machine: Machine) -> None:
    machine.create(b"a", LINEAR)
    assert machine.call(Command.DEV_WAIT, name=b"a", event_nr=5).errno == 0
    with pytest.raises(NotJudgedError, match="waiting for an event"):
        machine.call(Command.DEV_WAIT, name=b"a")
    assert machine.call(Command.TARGET_MSG, name=b"a", data=bytes(8) + b"hello\0").errno == errno.EINVAL
    assert machine.call(Command.TARGET_MSG, name=b"a", data=bytes(8) + b"@cancel_deferred_remove\0").errno == 0
    with pytest.raises(NotJudgedError, match="statistics"):
        machine.call(Command.TARGET_MSG, name=b"a", data=bytes(8) + b"@stats_list\0")
    assert machine.call(Command.DEV_ARM_POLL).errno == 0
    with pytest.raises(NotJudgedError, match="DEV_SET_GEOMETRY"):
        machine.call(Command.DEV_SET_GEOMETRY, name=b"a", data=b"1 1 1 0\0")


DOCUMENTED = {
    0, errno.EINVAL, errno.ENXIO, errno.EBUSY, errno.ENOENT, errno.EOVERFLOW, errno.ENOTTY, errno.EFAULT, errno.ENOKEY,
    errno.E2BIG,
}  # fmt: skip


def test_mutated_commands() -> None:
    """Whatever the bytes are: an errno that the kernel has for it, nothing written behind the buffer, state intact."""
    seeds = random.Random(7)
    succeeded = 0
    for round_ in range(40):
        machine = Machine(("linux-6.12", "linux-7.3")[round_ % 2])
        machine.create(b"a", LINEAR)
        for _ in range(100):
            command = seeds.choice(list(Command))
            memory = block(
                name=seeds.choice((b"a", b"b", b"", b"control")), uuid=seeds.choice((b"", b"", b"u")),
                dev=seeds.choice((0, 0, os.makedev(253, 0))),
                flags=seeds.choice((0, 1, 2, 16, 1 << 14, 1 << 17, 1 << 12)),
                targets=seeds.choice((0, 1, 1, 2)), size=seeds.choice((305, 320, 400, 700)),
                data=seeds.choice((b"", b"b\0", specs([LINEAR]), specs([LINEAR, (8, 4, b"zero", b"")]))),
            )[:700]  # fmt: skip
            for _ in range(seeds.choice((0, 0, 1, 3))):
                memory[seeds.randrange(len(memory))] = seeds.choice((0, 1, 255, seeds.randrange(256)))
            try:
                error, after = machine.raw(0xC138FD00 | command, memory)
            except NotJudgedError:
                continue
            assert error in DOCUMENTED
            succeeded += not error
            assert len(HEADER.unpack_from(bytes(after).ljust(312, b"\0"))) == 13
            expected = sum(1 for device in machine.dm for table in (device.active, device.inactive) if table
                           for used in table.used if used is machine.vdb)  # fmt: skip
            assert machine.devices.claims(machine.vdb) == expected
    assert succeeded > 1000
