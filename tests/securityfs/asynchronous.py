"""Write ``1`` to a file through io_submit(2), and exit with the errno of the result; 0 if it was written."""

import ctypes
import os
import platform
import struct
import sys

SETUP, GETEVENTS, SUBMIT = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}[platform.machine()]
IOCB_CMD_PWRITE = 1

libc = ctypes.CDLL(None, use_errno=True)
context = ctypes.c_ulong()
if libc.syscall(SETUP, 1, ctypes.byref(context)) < 0:
    sys.exit(ctypes.get_errno())
data = ctypes.create_string_buffer(b"1", 1)
fd = os.open(sys.argv[1], os.O_WRONLY)
# struct iocb: data, key, flags, operation, priority, descriptor, buffer, length, offset, reserved, flags, resfd
fields = (0, 0, 0, IOCB_CMD_PWRITE, 0, fd, ctypes.addressof(data), 1, 0, 0, 0, 0)
control = ctypes.create_string_buffer(struct.pack("=QIIHhIQQqQII", *fields))
pointer = ctypes.c_void_p(ctypes.addressof(control))
if libc.syscall(SUBMIT, context, ctypes.c_long(1), ctypes.byref(pointer)) < 0:
    sys.exit(ctypes.get_errno())
event = ctypes.create_string_buffer(32)  # struct io_event: data, object, result, second result
libc.syscall(GETEVENTS, context, ctypes.c_long(1), ctypes.c_long(1), event, None)
(result,) = struct.unpack_from("=q", event.raw, 16)
sys.exit(-result if result < 0 else 0)
