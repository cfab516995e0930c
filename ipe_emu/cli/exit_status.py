"""The exit statuses, the same for every command."""

#: As expected.
OK = 0
#: The policy, or an expectation, failed it.
DENIED = 1
#: Bad usage or bad input.
USAGE = 2
#: The rehearsed program failed for its own reasons.
PROGRAM_FAILED = 3
#: Something that matters could not be judged.
NOT_JUDGED = 4
#: Nothing was started, because this machine cannot emulate it; test runners read it as a skip.
CANNOT_EMULATE = 77
#: What ``run`` returns in place of NOT_JUDGED: its other statuses are the command's own.
RUN_FAILED = 125
#: As a shell reports a program that SIGINT or SIGPIPE ended.
INTERRUPTED = 130
BROKEN_PIPE = 141
