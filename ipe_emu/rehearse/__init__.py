"""Booting: the image, disks, device-mapper, mounts, PID 1 and the report of a rehearsed machine."""
