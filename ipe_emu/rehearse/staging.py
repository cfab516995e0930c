"""Where the agent of a boot keeps what it mounts for the machine: a mount namespace that the machine never sees."""

from pathlib import Path
from typing import Final

#: Any directory of the host's will do: what it holds is of no use to the agent.
STAGING: Final = Path("/sys")
#: The FUSE session, and what it serves (``ipe_securityfs.subtrees``).
SESSION: Final = STAGING / "session"
SECURITYFS: Final = SESSION / "security"
TEXTS: Final = SESSION / "texts"
DEVICE_NODES: Final = SESSION / "devices"
#: What /dev/mapper is, and how mountinfo names it as the root of a mount.
MAPPER: Final = SESSION / "mapper"
MAPPER_ROOT: Final = b"/mapper"
#: What stands for the machine's file systems of these types.
DEVTMPFS: Final = STAGING / "devtmpfs"
SYSFS: Final = STAGING / "sysfs"
PROC: Final = STAGING / "proc"
CGROUP2: Final = STAGING / "cgroup2"
#: Where there is but one user id: no option that names another is allowed.
DEVPTS: Final = STAGING / "devpts"
#: An empty directory, that of no file system which is served here.
EMPTY: Final = STAGING / "empty"
#: One directory for each mount that is composed of several.
COMPOSED: Final = STAGING / "composed"
#: One directory for each file system of a block device.
VOLUMES: Final = STAGING / "volumes"
#: Where the machine's root file system is mounted until it is the root.
ROOT: Final = STAGING / "root"

DIRECTORIES: Final = (SESSION, DEVTMPFS, SYSFS, PROC, DEVPTS, CGROUP2, EMPTY, COMPOSED, VOLUMES, ROOT)
