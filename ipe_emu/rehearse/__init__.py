"""A whole boot, rehearsed: the image, disks, device-mapper, mounts, PID 1, and the report of what happened."""
