"""What a sweep's process may do, as a program: hold BYTES, or die."""

from __future__ import annotations

import os
import signal
import sys
import time

if __name__ == "__main__":
    if sys.argv[1] == "hold":
        held = bytearray(int(sys.argv[2]))
        time.sleep(1)
    else:  # be killed, as by a system without memory
        os.kill(os.getpid(), signal.SIGKILL)
