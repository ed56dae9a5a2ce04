"""Runs a chat template in other processes, so that one that loops or eats memory harms nothing else.

The sandbox keeps a template from Python's internals, but not from taking time and memory. The first message of such a
process is the template's source, which it answers with the names of the template's variables; each of the others has
the variables of one rendering. Work that takes longer than `MAX_SECONDS` ends it, as its parent sees by the exit code.
"""

import json
import resource
import signal
import sys
from typing import Any

from server.parts.hardening.processes import Processes, TimeLimitError, open_parent
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate, TemplateLimitError

COMMAND = (sys.executable, "-P", "-m", "server.parts.hardening.template_processes")
MAX_SECONDS = 2.0  # of processor time for one rendering; most take a few milliseconds
MAX_DATA_BYTES = 512 << 20  # RLIMIT_DATA; beyond it, Python raises MemoryError
MAX_PROCESSES = 16  # that render at the same time; there are no more than threads that ask for it
TOO_LARGE = "The chat template cannot render this request: it is too large."
TOO_SLOW = f"The chat template takes more than {MAX_SECONDS:g} seconds of processor time."


class TemplateProcesses:
    """A renderer that runs a template in processes of its own. Thread-safe."""

    def __init__(self, source: str) -> None:
        """Start the first process.

        Raises ChatTemplateError for a template that does not compile, TemplateLimitError if that takes too long, and
        OSError if there can be no process.
        """
        self.source = source
        content = source.encode("utf-8", "surrogatepass")
        self._processes = Processes(COMMAND, content, MAX_PROCESSES, "the chat template")
        try:
            is_ok, names = self._processes.start()
        except TimeLimitError:
            raise TemplateLimitError(TOO_SLOW) from None
        if not is_ok:
            self.close()
            raise ChatTemplateError(names.decode("utf-8", "surrogatepass"))
        self.variables, self.options = map(frozenset, json.loads(names))

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered text.

        Raises ChatTemplateError, TemplateLimitError, or EngineUnavailableError if no process answers.
        """
        try:
            is_ok, answer = self._processes.ask(json.dumps(variables).encode())
        except TimeLimitError:
            raise TemplateLimitError(TOO_SLOW) from None
        text = answer.decode("utf-8", "surrogatepass")
        if not is_ok:
            raise ChatTemplateError(text)
        return text

    def close(self) -> None:
        self._processes.close()


# A process.


def main() -> None:
    """Render until the socket is closed."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    with open_parent() as (read, send):
        template: SandboxedTemplate | None = None
        while (content := read()) is not None:
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # SIGPROF then ends the process
            try:
                if template is None:
                    template = SandboxedTemplate(content.decode())
                    answer = json.dumps([sorted(template.variables), sorted(template.options)])
                else:
                    answer = template.render(json.loads(content))
                is_ok = True
                data = answer.encode("utf-8", "surrogatepass")
            except (ChatTemplateError, MemoryError) as error:
                is_ok, data = False, (str(error) or TOO_LARGE).encode("utf-8", "surrogatepass")
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            send(is_ok, data)


if __name__ == "__main__":
    main()
