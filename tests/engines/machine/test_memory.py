"""Claims about the memory that a server gives back."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import re
from engines.machine import memory

MB = 1 << 20

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

if {together}:
    memory.keep_together()
bytearray(b"x") * (27 * MB)  # a picture of 9 megapixels has come and gone
before = resident()
picture = bytearray(b"x") * (20 * MB)
del picture
print((resident() - before) // MB)
"""


def left_after(*, together: bool) -> int:
    """MB that large pictures leave behind in a process."""
    program = PROGRAM.format(together=together)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(done.stdout)


def test_large_pictures_leave_no_memory_behind_which_the_c_library_would_keep() -> None:
    assert left_after(together=True) < 4
    assert left_after(together=False) > 15, "else there is nothing to mend"
