"""Device-mapper as user space meets it: the ioctls of /dev/mapper/control, and what tables map.

``ioctl`` is the parameter block and its rules, ``control`` carries commands out, ``mapped_device`` is a device with its
two tables, ``populate`` reads tables, ``arguments`` target lines. ``target`` says what a target is; the types are
``verity``, ``simple`` (linear, zero, error) and ``crypt``. None of it does I/O. Functions named in comments are those
of drivers/md/dm-*.c.
"""
