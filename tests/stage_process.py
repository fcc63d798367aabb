"""What runs in a process that the tests' fork server made: a stage's file, as `python FILE ...` would run it.

The server has imported torch already, so this starts in a tenth of a second instead of three. Only what is in
site-packages may be imported at the server: the stage and common.py are read anew in each process.
"""

import atexit
import os
import resource
import runpy
import sys
import traceback


def run_file(command: list, env: dict, cwd: str, outputs: tuple, path: list, file_size: int, own_python: bool) -> None:
    """Run command[0] as __main__, or the program after -c, and end with its exit status.

    outputs: the files that stdout and stderr are appended to. path: sys.path of a plain Python.
    file_size: the largest file that may be written, in bytes, or -1. own_python: in a Python of its own.
    """
    os.setsid()  # so that a signal can reach it and its loaders, and nobody else
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if own_python:
        os.execv(sys.executable, [sys.executable, *command])
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    for package in env.get("WITHOUT", "").split():
        sys.modules[package] = None  # as if it was not installed
    sys.path[:] = [os.path.dirname(os.path.abspath(command[0])), *path]
    if file_size >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    import torch

    torch.set_num_threads(1)
    status = 0
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(command[1], {"__name__": "__main__"})
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # multiprocessing ends a process without them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
