"""What a boot loader hands to the kernel, read and unpacked as the kernel does: initramfs, UKI, or a directory.

``open`` finds out which of these it is; ``rootfs`` puts its members into a directory and says what the kernel would.
"""
