"""The process in which a model's code meets its unit tests: it ties its own hands, then runs the program.

This file is run, never imported, in an isolated interpreter without site-packages, and before it anything is limited:
code between fork and exec would be unsafe beside the threads of the process that starts it.

| | Linux | macOS | Windows |
|---|---|---|---|
| wall clock (by the parent) | yes | yes | yes |
| CPU time, file size, open files | kernel | kernel | no |
| memory | kernel | no | no |
| network | kernel, where user namespaces are allowed; else Python | Python | Python |
| other processes, files outside its folder, ctypes | Python | Python | Python |

"Python" is an audit hook, which sees what the program does through Python; native code that gets around Python gets
around it.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from typing import Any

NEW_USERS, NEW_NETWORK = 0x10000000, 0x40000000
"""Source: linux/sched.h."""
FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "winreg.", "_winapi.", "os.exec", "os.spawn", "os.posix_spawn"),
    *("os.fork", "os.system", "os.startfile", "os.kill", "syslog.", "webbrowser.", "resource.", "signal.pthread_kill"),
    *("ftplib.", "http.client.", "smtplib.", "urllib.", "sqlite3.enable_load_extension"),
)
"""Beginnings of audit events. Source: docs.python.org, "Audit events table"."""
CHANGES = frozenset(
    f"os.{word}" for word in ("remove", "rename", "rmdir", "mkdir", "truncate", "link", "symlink", "chmod", "chown")
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: int, size: int, file_size: int) -> None:
    """Bound what the kernel can bound."""
    with contextlib.suppress(ImportError):
        import resource

        wanted = {
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_AS: size,
            resource.RLIMIT_FSIZE: file_size,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
        }
        for kind, most in wanted.items():
            with contextlib.suppress(OSError, ValueError):  # macOS refuses RLIMIT_AS
                resource.setrlimit(kind, (most, most))


def leave_the_network() -> None:
    """Move to a network namespace of its own, in which nothing can be reached; the hook stands in where it may not."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).unshare(NEW_USERS | NEW_NETWORK)


def stand_guard(home: str) -> None:
    """Refuse the network, other processes, native code, and changes outside `home`."""
    inside = os.path.realpath(home) + os.sep

    def is_outside(path: Any) -> bool:
        if not isinstance(path, str | bytes):
            return False
        text = os.fsdecode(path)
        return ".." in text or not (os.path.realpath(text) + os.sep).startswith(inside)

    def is_touched(path: Any, flags: Any) -> bool:
        # A folder that is open could be written to by names that are told beside it, which no event tells.
        return path != os.devnull and (bool((flags or 0) & WRITING) or os.path.isdir(path))  # noqa: PTH112 - pathlib takes time to import

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        changed = arguments if event in CHANGES else ()
        if event == "open" and is_touched(arguments[0], arguments[2]):
            changed = arguments[:1]
        if event.startswith(FORBIDDEN) or any(map(is_outside, changed)):
            raise PermissionError(f"{event} is not for unit tests")

    def no_process(*_: Any) -> None:
        raise PermissionError("processes are not for unit tests")

    with contextlib.suppress(ImportError):
        import _posixsubprocess

        vars(_posixsubprocess)["fork_exec"] = no_process  # tells no event, and multiprocessing calls it
    sys.addaudithook(guard)


if __name__ == "__main__":
    program = sys.argv[1]
    leave_the_network()
    limit(*map(int, sys.argv[2:]))
    stand_guard(os.path.dirname(program))  # noqa: PTH120 - pathlib takes time to import, once a row
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")
