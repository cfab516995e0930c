"""securityfs as the rehearsed machine shows it: a node tree over the LSM, served through FUSE."""
