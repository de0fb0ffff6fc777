"""A mail server and a webhook receiver inside of the booted host, of the standard library: what came is a line in a file.

    python3 far_ends.py FOLDER      mail.jsonl, webhooks.jsonl; while FOLDER/hang exists, mail is not answered after DATA
                                    and webhooks are answered by nothing

Ports: 2525, 8025. Prints "ready" when both listen.
"""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import sys
import threading
import time

FOLDER = sys.argv[1]


def keep(name, record):
    """Appended with one write: lines of several threads do not mix."""
    fd = os.open(f"{FOLDER}/{name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, json.dumps(record).encode() + b"\n")
    os.close(fd)


def hang():
    while os.path.exists(f"{FOLDER}/hang"):
        time.sleep(0.05)


class Mail(socketserver.StreamRequestHandler):
    def handle(self):
        self.say("220 far end")
        recipients = []
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"RCPT":
                recipients.append(line.decode().split(":", 1)[1].strip().strip("<>"))
            if verb == b"DATA":
                self.say("354 go on")
                text = self.read_text()
                hang()
                keep("mail", {"to": recipients, "text": text})
            if verb == b"QUIT":
                self.say("221 bye")
                return
            self.say("250 ok")

    def read_text(self):
        lines = []
        while (line := self.rfile.readline()) not in (b".\r\n", b""):
            lines.append(line.decode())
        return "".join(lines)

    def say(self, text):
        self.wfile.write(text.encode() + b"\r\n")


class Webhook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        hang()
        keep("webhooks", {"path": self.path, "id": self.headers["webhook-id"], "body": json.loads(body)})
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, *_):
        """Who hangs up in the middle is what the test is about."""


servers = [Server(("127.0.0.1", 2525), Mail), Server(("127.0.0.1", 8025), Webhook)]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
