"""What a sweep's process may do, as a program: hold BYTES, sleep and write its number to a FILE, or die."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1] == "hold":
        held = bytearray(int(sys.argv[2]))
        time.sleep(1)
    elif sys.argv[1] == "sleep":
        Path(sys.argv[2] + ".new").write_text(str(os.getpid()))
        os.rename(sys.argv[2] + ".new", sys.argv[2])
        time.sleep(300)
    else:  # be killed, as by a system without memory
        os.kill(os.getpid(), signal.SIGKILL)
