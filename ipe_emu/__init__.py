"""A userspace emulator of Linux's Integrity Policy Enforcement (IPE) LSM.

Dependencies point one way:
``policy, pkcs7, keyring, integrity, audit, profiles <- lsm <- ipe_securityfs, exec_hook <- cli``;
``linux`` is a leaf. Nothing in or below ``lsm`` knows of FUSE, an event loop or namespaces.
"""

__version__ = "0.1.0"
