"""The process in which a chat template runs: `python -m server.text.templates.process`.

Its standard input is a socket. It reads the template's source and answers with the names of the template's variables;
then it reads the variables of one rendering after the other, and answers each with the text or an error. It ends when
the socket is closed. Work that takes longer than `MAX_SECONDS` ends it too, as its parent sees by the exit code.
"""

import json
import resource
import signal
import socket
import struct
from typing import BinaryIO

from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate

MAX_SECONDS = 2.0  # of processor time for one rendering; most take a few milliseconds
MAX_DATA_BYTES = 512 << 20  # RLIMIT_DATA; beyond it, Python raises MemoryError

TOO_LARGE = "The chat template cannot render this request: it is too large."

HEAD = struct.Struct("<?I")  # whether it is an answer without an error, and the number of bytes that follow


def main() -> None:
    """Render until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as reader:
        template: SandboxedTemplate | None = None
        while (content := read_message(reader)) is not None:
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # SIGPROF then ends the process
            try:
                if template is None:
                    template = SandboxedTemplate(content[1].decode())
                    answer = json.dumps([sorted(template.variables), sorted(template.options)])
                else:
                    answer = template.render(json.loads(content[1]))
                is_ok = True
                data = answer.encode("utf-8", "surrogatepass")
            except (ChatTemplateError, MemoryError) as error:
                is_ok, data = False, (str(error) or TOO_LARGE).encode("utf-8", "surrogatepass")
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            send_message(connection, is_ok, data)


def send_message(connection: socket.socket, is_ok: bool, content: bytes) -> None:
    """Send a message, either way. Raises OSError."""
    connection.sendall(HEAD.pack(is_ok, len(content)) + content)


def read_message(reader: BinaryIO) -> tuple[bool, bytes] | None:
    """Return the next message, or None if the peer has closed the socket. Raises OSError, with TimeoutError."""
    head = reader.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    is_ok, num_bytes = HEAD.unpack(head)
    content = reader.read(num_bytes)
    return None if len(content) < num_bytes else (is_ok, content)


if __name__ == "__main__":
    main()
