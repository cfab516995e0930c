"""Volumes: images of read-only file systems, mounted without the help of this machine's kernel.

``specification`` says which image, ``image`` opens and verifies it, ``recognise`` finds out what file system it holds,
``helper`` mounts it: programs of user space read the image through the emulator, which verifies each block as dm-verity
does. ``facts`` is what IPE then knows of the files.

The supervisor opens images; the sandbox's agent, which has the namespaces, mounts them and starts the programs.
"""
