"""A server for the test of `peers.py`: it answers at once, and appends the prompts to a file.

python stub_peer.py PORT FILE [TOKENS_PER_ANSWER]
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock


class Handler(BaseHTTPRequestHandler):
    prompts = Path()
    num_tokens: int | None = None  # None: as many as requested
    lock = Lock()

    def do_GET(self) -> None:
        self.answer("application/json", json.dumps({"data": [{"id": "stub"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock, self.prompts.open("a") as file:
            file.write(body["prompt"] + "\n")
        num_tokens = body["max_tokens"] if self.num_tokens is None else self.num_tokens
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": num_tokens}
        events = [{"choices": [{"text": "a"}]}] * num_tokens + [{"choices": [], "usage": usage}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self.answer("text/event-stream", "".join(lines) + "data: [DONE]\n\n")

    def answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    Handler.prompts = Path(sys.argv[2])
    Handler.num_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else None
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
