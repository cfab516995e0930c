"""Block devices of the rehearsed machine: disks from image files, their partitions, and what tools ask of them.

``content`` is what can be read and written, ``device`` the table of devices, ``partitions`` (with ``gpt`` and ``mbr``)
finds partitions as the kernel does, ``ioctls`` answers the block layer's ioctls. ``disk`` is the option ``--disk``.
"""
