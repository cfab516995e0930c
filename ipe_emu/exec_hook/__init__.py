"""Running a command tree under the emulator: a sandbox around it, and an answer to every execution in it.

The processes of ``ipe-emu run``, and the modules they live in:

- P, the supervisor (`run`, `supervisor`): the model, the emulated securityfs in one thread, seccomp notifications in
  another. It stays outside the sandbox;
- H, the agent (`agent`): single-threaded, makes the namespaces and mounts, then waits for C;
- C, PID 1 of the sandbox (`init`): starts the command, reaps what is orphaned, reports how the command ended.
"""
