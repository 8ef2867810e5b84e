"""A server with OpenAI's API that computes nothing and keeps a timetable: the truth that load generators are held against.

    python -m benchmarks._scripted_server [--port 0] [--ttft-ms 50] [--itl-ms 10] [--jitter 0] [--tokens-per-chunk 1] [--seed 0]

Request i (counted by arrival) gets its first tokens TTFT after its first byte was read, and the following ones ITL apart.
Every time is due at an absolute deadline, so that lateness of one chunk never moves the next. With jitter j, TTFT and
each gap are multiplied by a factor drawn evenly from 1 - j to 1 + j, the same for request i under the same seed whoever
asks. `GET /truth` answers what really happened since it was last asked, and counts requests from 0 again.

Written on epoll: an event loop's timers tick in milliseconds, and its callbacks cost more than these answers.
"""

import argparse
import gc
import heapq
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any  # Any: a prompt may be text, ids or messages

import msgspec

MODEL = "scripted"
_READ_BYTES = 1 << 18
_IDLE_S = 0.5
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_LETTER_ID = 69
"""What `penstock model make`'s tokenizer calls the letter a: a tool that counts by text counts what was sent."""


@dataclass(frozen=True, slots=True)
class Script:
    """When tokens are due."""

    ttft_s: float
    itl_s: float
    jitter: float
    tokens_per_chunk: int
    seed: int

    def due_s(self, number: int, chunks: Sequence[int]) -> list[float]:
        """Deadlines of request `number`'s chunks of so many tokens, in seconds after its arrival."""
        random = Random(f"{self.seed}/{number}") if self.jitter else None
        at_s, found = 0.0, []
        for index, tokens in enumerate(chunks):
            step_s = self.ttft_s if index == 0 else self.itl_s * tokens
            at_s += step_s * (1.0 + self.jitter * (2.0 * random.random() - 1.0)) if random else step_s
            found.append(at_s)
        return found

    def chunks(self, n_tokens: int) -> list[int]:
        """Tokens of each chunk of an answer of `n_tokens`."""
        whole, rest = divmod(n_tokens, self.tokens_per_chunk)
        return [self.tokens_per_chunk] * whole + ([rest] if rest else [])


class RequestTruth(msgspec.Struct):
    """One request as the server saw it; times on the system's monotonic clock, which all processes share."""

    number: int
    request_id: str
    """The `x-request-id` it came with; empty if none."""
    arrival_s: float
    """Its first byte was read."""
    first_on_connection: bool
    prompt_tokens: int
    chunk_tokens: list[int]
    due_s: list[float]
    sent_s: list[float]
    """Just before each chunk was written; shorter than `due_s` if the client left."""


class Truth(msgspec.Struct):
    """All requests since the last time somebody asked."""

    requests: list[RequestTruth]
    cpu_s: float
    """CPU time of the server's process."""
    wall_s: float
    overrun: int
    """Streams cut because the client did not read."""


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    prompt: Any = None
    messages: Any = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    return_token_ids: bool = False


@dataclass(slots=True)
class _Stream:
    truth: RequestTruth
    connection: "_Connection"
    usual: bytes
    last: bytes
    """Brings finish, usage and the end with it."""


class _Connection:
    """One client's socket: bytes in until a request is whole."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.rest, self.asked = sock, b"", 0
        self.first_byte_s = 0.0

    def take(self, now_s: float) -> tuple[bytes, bytes] | None:
        """Read; head and body of a request if one is whole. Raises ConnectionError at the end."""
        piece = self.sock.recv(_READ_BYTES)
        if not piece:
            raise ConnectionError("closed")
        if not self.rest:
            self.first_byte_s = now_s
        self.rest += piece
        end = self.rest.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.rest[:end]
        length = int(_header(head, b"content-length") or 0)
        if len(self.rest) < end + 4 + length:
            return None
        body, self.rest = self.rest[end + 4 : end + 4 + length], self.rest[end + 4 + length :]
        return head, body


class ScriptedServer:
    """Owns the listening socket, all connections and the heap of what is due next."""

    def __init__(self, script: Script, port: int) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", port), backlog=8192)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, _Connection] = {}
        self._due: list[tuple[float, int, int, _Stream]] = []
        self._requests: list[RequestTruth] = []
        self._order = self._overrun = 0
        self._since_cpu_s, self._since_s = time.process_time(), time.monotonic()

    def serve(self) -> None:
        """For ever. `select` on the epoll's own descriptor waits to the microsecond; epoll itself to the millisecond."""
        while True:
            wait_s = self._due[0][0] - time.monotonic() if self._due else _IDLE_S
            if wait_s > 0:
                select.select([self._epoll], [], [], wait_s)
            for descriptor, _ in self._epoll.poll(0):
                if descriptor == self._listener.fileno():
                    self._accept()
                else:
                    self._hear(self._connections[descriptor])
            now_s = time.monotonic()
            while self._due and self._due[0][0] <= now_s:
                _, _, index, stream = heapq.heappop(self._due)
                self._send_chunk(stream, index)

    def _accept(self) -> None:
        try:
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections[sock.fileno()] = _Connection(sock)
                self._epoll.register(sock.fileno(), select.EPOLLIN)
        except BlockingIOError:
            return

    def _hear(self, connection: _Connection) -> None:
        now_s = time.monotonic()
        try:
            request = connection.take(now_s)
        except OSError:
            self._drop(connection)
            return
        if request is not None:
            self._answer(connection, *request)

    def _drop(self, connection: _Connection) -> None:
        if connection.sock.fileno() >= 0:
            del self._connections[connection.sock.fileno()]
            self._epoll.unregister(connection.sock.fileno())
            connection.sock.close()

    def _answer(self, connection: _Connection, head: bytes, body: bytes) -> None:
        method, path, *_ = head.decode("latin-1").split(" ", 2)
        if method == "POST" and path in ("/v1/completions", "/v1/chat/completions"):
            self._begin(connection, _header(head, b"x-request-id"), path.startswith("/v1/chat"), body)
        elif path == "/truth":
            self._tell(connection)
        elif path in ("/health", "/v1/models"):
            cards = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "us"}]}
            self._write(connection, _whole(200, msgspec.json.encode(cards)))
        else:
            self._write(connection, _whole(404, _error(f"{method} {path} is not here")))

    def _begin(self, connection: _Connection, request_id: str, chat: bool, body: bytes) -> None:
        try:
            asked = msgspec.json.decode(body, type=_Body)
        except msgspec.MsgspecError as error:
            self._write(connection, _whole(400, _error(str(error))))
            return
        n_tokens = asked.max_completion_tokens or asked.max_tokens or 0
        if not asked.stream or n_tokens < 1:
            self._write(connection, _whole(400, _error("only streams with max_tokens are scripted")))
            return
        number = len(self._requests)
        chunks = self._script.chunks(n_tokens)
        truth = RequestTruth(
            number=number,
            request_id=request_id,
            arrival_s=connection.first_byte_s,
            first_on_connection=connection.asked == 0,
            prompt_tokens=_prompt_tokens(asked),
            chunk_tokens=chunks,
            due_s=[connection.first_byte_s + due_s for due_s in self._script.due_s(number, chunks)],
            sent_s=[],
        )
        connection.asked += 1
        self._requests.append(truth)
        stream = _Stream(truth, connection, *_pieces(truth, asked, chat))
        self._write(connection, _STREAM_HEAD + (_role(number) if chat else b""))
        self._put(stream, 0)

    def _put(self, stream: _Stream, index: int) -> None:
        self._order += 1
        heapq.heappush(self._due, (stream.truth.due_s[index], self._order, index, stream))

    def _send_chunk(self, stream: _Stream, index: int) -> None:
        if stream.connection.sock.fileno() < 0:
            return
        stream.truth.sent_s.append(time.monotonic())
        is_last = index == len(stream.truth.due_s) - 1
        self._write(stream.connection, stream.last if is_last else stream.usual)
        if index + 1 < len(stream.truth.due_s):
            self._put(stream, index + 1)

    def _write(self, connection: _Connection, data: bytes) -> None:
        """All of it at once, or the client is too slow to be served by a timetable."""
        try:
            whole = connection.sock.send(data) == len(data)
        except BlockingIOError:
            whole = False
        except OSError:
            self._drop(connection)
            return
        if not whole:
            self._overrun += 1
            self._drop(connection)

    def _tell(self, connection: _Connection) -> None:
        """Megabytes, after a run: the timetable may wait."""
        connection.sock.setblocking(True)
        connection.sock.sendall(_whole(200, msgspec.json.encode(self._take_truth())))
        connection.sock.setblocking(False)

    def _take_truth(self) -> Truth:
        cpu_s, now_s = time.process_time(), time.monotonic()
        found = Truth(self._requests, cpu_s - self._since_cpu_s, now_s - self._since_s, self._overrun)
        self._requests, self._overrun = [], 0
        self._since_cpu_s, self._since_s = cpu_s, now_s
        return found


def _header(head: bytes, name: bytes) -> str:
    at = head.lower().find(b"\r\n" + name + b":")
    return head[at + len(name) + 3 :].split(b"\r\n", 1)[0].decode("latin-1").strip() if at >= 0 else ""


def _prompt_tokens(asked: _Body) -> int:
    """Ids are counted; text counts a token per character, as the letters that these answers are made of."""
    if isinstance(asked.prompt, str | list):
        return len(asked.prompt)
    return sum(len(str(message.get("content", ""))) for message in asked.messages or ())


def _whole(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _error(text: str) -> bytes:
    return msgspec.json.encode({"error": {"message": text, "type": "invalid_request_error", "code": None}})


def _event(fields: Mapping[str, Any]) -> bytes:
    data = b"data: " + msgspec.json.encode(fields) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _frame(number: int, chat: bool) -> dict[str, Any]:
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": f"cmpl-{number}", "object": kind, "created": 0, "model": MODEL}


def _role(number: int) -> bytes:
    """What chat servers send at once: a chunk without a token."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    return _event({**_frame(number, True), "choices": [choice]})


def _pieces(truth: RequestTruth, asked: _Body, chat: bool) -> tuple[bytes, bytes]:
    """Bytes of every chunk but the last, and of the last."""

    def chunk(tokens: int, finish: str | None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": {"content": "a" * tokens}} if chat else {"text": "a" * tokens, "logprobs": None}
        if asked.return_token_ids:
            choice["token_ids"] = [_LETTER_ID] * tokens
        return _event({**_frame(truth.number, chat), "choices": [choice]})

    n_tokens = sum(truth.chunk_tokens)
    usage = {
        "prompt_tokens": truth.prompt_tokens,
        "completion_tokens": n_tokens,
        "total_tokens": truth.prompt_tokens + n_tokens,
    }
    last = chunk(truth.chunk_tokens[-1], "length")
    if asked.stream_options is not None and asked.stream_options.include_usage:
        last += _event({**_frame(truth.number, chat), "choices": [], "usage": usage})
    last += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    return chunk(truth.chunk_tokens[0], None), last


def main(argv: Sequence[str]) -> None:
    """Serve until killed; the port is printed as the first line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    script = Script(
        ttft_s=options.ttft_ms / 1e3,
        itl_s=options.itl_ms / 1e3,
        jitter=options.jitter,
        tokens_per_chunk=options.tokens_per_chunk,
        seed=options.seed,
    )
    server = ScriptedServer(script, options.port)
    gc.disable()  # a collection in the middle of a run is lateness
    print(server.port, flush=True)
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
