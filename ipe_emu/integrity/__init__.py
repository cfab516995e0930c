"""What is known of a file: boot_verified, dm-verity and fs-verity."""
