"""What Linux offers and Python does not wrap: system calls, namespaces, mounts, seccomp, ``/proc``.

A leaf: standard library only, imported by the exec hook and the mount, importing nothing of this project but
:mod:`ipe_emu.errors`. It is the only place that uses ``ctypes``.
"""
