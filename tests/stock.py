"""Scripts in processes that know nothing of what the test session has imported, lrc least of all."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

# Importing torch and transformers takes longer than what most scripts do: one process does it, and a fork of it runs each.
_FORKING = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM, modeling_layers
for line in sys.stdin:
    code, arguments, *files = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate(files, 1):
            os.dup2(os.open(name, os.O_WRONLY), number)
        sys.argv = ["-c", *arguments]
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def plain_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has imported nothing."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def stock_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has imported torch and transformers, and never lrc."""
    server, words = _server(), [str(argument) for argument in arguments]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        server.stdin.write(json.dumps([textwrap.dedent(code), words, out.name, err.name]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with the test session, whose end closes its input."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", _FORKING], stdin=pipe, stdout=pipe, text=True, cwd="/")


def logits_without_lrc(folder: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """Load a checkpoint where lrc is not installed, and keep its logits in a file; what the process said."""
    return stock_python(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM
        sys.modules["lrc"] = None
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        torch.save(model(torch.arange(3, 15)[None]).logits, sys.argv[2])
        assert model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False).shape == (1, 10)
        """,
        folder,
        file,
    )


def refused_without_lrc(folders: Sequence[Path]) -> int:
    """How many of these checkpoints transformers refuses where lrc is not imported; one process tries them all."""
    done = stock_python(
        """
        import sys
        from transformers import AutoModelForCausalLM
        for folder in sys.argv[1:]:
            try:
                AutoModelForCausalLM.from_pretrained(folder)
            except Exception as error:
                print("refused", type(error).__name__)
            else:
                print("LOADED", folder)
        assert "lrc" not in sys.modules
        """,
        *folders,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split().count("refused")
