"""Binary formats as the kernel reads them, and the order in which an execution asks about the files it needs."""
