"""A process that compares answers with math-verify: a request a line on standard input, a verdict a line on output.

It is started by its path and imports nothing of the package, so that it is small and starts fast. Its limits are the
kernel's: past the CPU time of one comparison the process dies, also inside a power of a million digits that no Python
code could interrupt, and also where its parent has died before it. CPU time and not wall-clock time, so that a busy
machine changes no reward; the latter is bounded as well, ten times as high.

Arguments: seconds of CPU time for each comparison, bytes of memory.
"""

import json
import logging
import os
import resource
import signal
import sys

logging.disable(logging.CRITICAL)

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # noqa: E402

_EITHER = [LatexExtractionConfig(), ExprExtractionConfig()]


def compare(reference: str, answer: str) -> dict[str, object]:
    """``right`` true or false; ``gave_up`` for an answer that math-verify cannot bear, which is the answer's fault; or
    ``error`` for a reference that it cannot read, which no answer could match."""
    try:
        gold = _parse(reference)
    except Exception as error:
        return {"error": f"reference answer {reference[:80]!r}: {type(error).__name__}: {error}"[:200]}
    if not gold:
        return {"error": f"math-verify cannot read the reference answer {reference[:80]!r}"}
    try:
        return {"right": bool(verify(gold, _parse(answer), timeout_seconds=None))}
    except Exception as error:
        return {"gave_up": type(error).__name__}


def _parse(text: str) -> list:
    return parse(f"\\boxed{{{text}}}", _EITHER, parsing_timeout=None)


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints is taken for a reply
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        reply = compare(*request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
