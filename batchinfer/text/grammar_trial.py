"""Trial compilation of untrusted grammars in a child process with limited memory and CPU time.

The library's limits do not cover everything: `a{1000000000}` is expanded before they apply, and exhausts the memory of
the process. Each trial has its own CPU time and memory; a crash of the child counts as a refusal, and the next trial
starts a new child. This file is the child when run as a script.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    import llguidance

COMPILE_S = 1.0  # CPU time
MASK_S = 0.02  # CPU time of the mask after the first token: about the cost of every step
MEMORY_BYTES = 2 << 30  # address space

TOO_LARGE = "too large: compiling it takes too long or too much memory"
TOO_SLOW = "too slow to follow: every token would take too long (repetitions of a text, as a{100000}, do that)"


class Vocabulary(NamedTuple):
    """The vocabulary in the library's form: bytes by token id, ids that are not text, and ids that end an output."""

    tokens: list[bytes]
    special: list[int]
    ends: list[int]


class Trials:
    """Owner of the child process, which tries one grammar at a time; started with the first trial."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = pickle.dumps(tuple(vocabulary))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def problem(self, source: str) -> str:
        """Return the reason why a grammar, in the library's form, is refused; empty if it is accepted.

        Takes seconds at most.
        """
        with self._lock:
            process = self._process
            if process is not None and process.poll() is not None:
                self._end(process)
                process = None
            try:
                if process is None:
                    process = self._process = self._start()
                    _send(process, self._vocabulary)
                _send(process, source.encode(errors="replace"))
                assert process.stdout is not None
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if answer.endswith(b"\n"):
                return str(json.loads(answer))
            if process is not None:
                self._end(process)
            return TOO_LARGE

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._end(self._process)

    def __del__(self) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: modules beside this file are not importable by name. New session: ^C in the terminal does not reach it.
        return subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # unwritten data is discarded
                pipe.close()


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(b"%d\n" % len(data) + data)
    process.stdin.flush()


class _Table:
    """The vocabulary for the library, which spells forced text with the longest tokens."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    greedy: Any = None

    def __init__(self, tokens: list[bytes], special: list[int], ends: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = ends[0]

    def __call__(self, text: str) -> list[int]:
        return list(self.greedy(text))


def _serve() -> None:
    """Answer each grammar on stdin (its length, a newline, its text) with a line of JSON: the problem, or ""."""
    import llguidance

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read = sys.stdin.buffer
    tokens, special, ends = pickle.loads(read.read(int(read.readline())))
    table = _Table(tokens, special, ends)
    slices = llguidance.LLTokenizer.json_slices()
    tokenizer = llguidance.LLTokenizer(cast(Any, table), n_vocab=len(tokens), eos_token=ends, slices=slices)
    table.greedy = tokenizer.greedy_tokenize
    limits = llguidance.LLParserLimits(precompute_large_lexemes=False, verbose_errors=False)
    while head := read.readline():
        source = read.read(int(head)).decode()
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S)  # its signal ends the process
        matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
        problem = matcher.get_error() if matcher.is_error() else ""
        if not problem and _step_s(matcher) > MASK_S:
            problem = TOO_SLOW
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


def _step_s(matcher: llguidance.LLMatcher) -> float:
    """Return the CPU seconds of the second token's mask, the lesser of two tries."""
    allowed = matcher.compute_bitmask()
    first = next((8 * place + (byte & -byte).bit_length() - 1 for place, byte in enumerate(allowed) if byte), None)
    if first is None or matcher.is_error():  # unsatisfiable: reported when it is compiled for its model
        return 0.0
    spent = []
    for _ in range(2):
        began = time.process_time()
        copy = matcher.deep_copy()
        copy.consume_token(first)
        copy.compute_bitmask()
        spent.append(time.process_time() - began)
    return min(spent)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        _serve()
    os._exit(0)
