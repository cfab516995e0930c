"""Judging every program, library and module of a tree of files, without executing anything.

tree.py       the tree: walked, and looked up in as by a process whose root it is
known.py      what is known of its files
ld_so.py      which libraries a dynamic linker maps for a program, in which order
ld_cache.py   /etc/ld.so.cache
judge.py      what becomes of each file under a policy
census.py     which files there are to be asked about, whatever the policy
"""
