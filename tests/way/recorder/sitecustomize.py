"""Python imports this at the start of a process whose PYTHONPATH names the folder: records calls while it is asked to.

A client connects to the UNIX socket named after the process id in the folder WAY_FOLDER, sends a byte to begin, and
another to end; the answer is the calls as JSON. A call is a function's start or a coroutine's resumption.
"""

import json
import os
import socket
import sys
import threading
from collections import Counter
from types import CodeType, FrameType

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
EXPRESSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}  # parts of the functions that have them
FOLDERS = tuple(os.path.join(ROOT, name, "") for name in ("server", "engine"))


class Recorder:
    """The calls of functions in FOLDERS, of all threads.

    They are kept in groups: a group is what one frame that was called from elsewhere calls until it returns.
    """

    def __init__(self) -> None:
        self.is_recording = False
        self._groups: list[list[CodeType]] = []
        self._open: dict[int, list[CodeType]] = {}  # the last group of each thread
        self._depths: Counter[int] = Counter()  # of the frames of each thread's open group; 0: it has ended

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """The function for `sys.setprofile`."""
        code = frame.f_code
        if not self.is_recording or not code.co_filename.startswith(FOLDERS) or code.co_name in EXPRESSIONS:
            return
        thread = threading.get_ident()
        if event == "call":
            if not self._depths[thread]:
                self._open[thread] = []
                self._groups.append(self._open[thread])
            self._open[thread].append(code)
            self._depths[thread] += 1
        elif event == "return" and self._depths[thread]:  # else the frame is older than the recording
            self._depths[thread] -= 1

    def start(self) -> None:
        self._groups.clear()
        self._depths.clear()
        self.is_recording = True

    def stop(self) -> list[list[str]]:
        """Return the groups: the functions' names, as `path:qualified name`, in the order of their calls."""
        self.is_recording = False
        return [[_name(code) for code in group] for group in self._groups]


def _name(code: CodeType) -> str:
    return f"{os.path.relpath(code.co_filename, ROOT)}:{code.co_qualname}"


def serve(recorder: Recorder, listener: socket.socket) -> None:
    """Answer one client after another, for as long as the process lives."""
    while True:
        connection, _ = listener.accept()
        with connection:
            if connection.recv(1):
                recorder.start()
                connection.sendall(b".")
                connection.recv(1)
                connection.sendall(json.dumps(recorder.stop()).encode())


def install(folder: str) -> None:
    """Record the calls of all threads that start from now on, and of this one."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, str(os.getpid())))
    listener.listen()
    recorder = Recorder()
    threading.Thread(target=serve, args=(recorder, listener), daemon=True).start()
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)


if "WAY_FOLDER" in os.environ:
    install(os.environ["WAY_FOLDER"])
