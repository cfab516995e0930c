"""An event that IPE is asked about: who, through which hook, on which file."""

import enum

from attrs import frozen

from ipe_emu.integrity.facts import NO_FACTS, Facts


class Hook(enum.Enum):
    """Where in the kernel the question came from (``enum ipe_hook_type``); the value stands in audit records."""

    BPRM_CHECK = "BPRM_CHECK"
    BPRM_CREDS_FOR_EXEC = "BPRM_CREDS_FOR_EXEC"
    MMAP = "MMAP"
    MPROTECT = "MPROTECT"
    KERNEL_READ = "KERNEL_READ"
    KERNEL_LOAD = "KERNEL_LOAD"
    POLICY_LOAD = "POLICY_LOAD"


@frozen
class Subject:
    """The process an audit record names: its pid as the machine's administrator sees it, and its comm."""

    pid: int
    comm: bytes


@frozen
class File:
    """The file of an event: its path (``d_path``), its superblock's ``s_id``, its inode number, and its facts."""

    path: bytes
    dev: str
    ino: int
    facts: Facts = NO_FACTS
