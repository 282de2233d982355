"""`python -m moelora`."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from moelora.commands import signals


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns its exit status: 2 for what the user can mend, 128 + n for signal n."""
    with signals.handled():  # before anything that takes time to import
        explicit: dict = {}
        try:
            return _run(argv, explicit)
        except KeyboardInterrupt as error:
            signum = signals.ending() or getattr(error, "signum", signals.ENDING[1])
        except Exception:
            if signals.ending() is None:
                raise
            signum = signals.ending()  # a library met it in the middle of something
        print(f"moelora: {_interrupted(explicit, signals.name(signum))}", file=sys.stderr)
        return 128 + signum


@contextmanager
def _without_collections() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _run(argv: list[str] | None, explicit: dict) -> int:
    from importlib import import_module

    from moelora.commands import config
    from moelora.errors import MoeloraError, memory

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal need not know every character
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainer sends some where it may
    try:
        explicit |= config.parse(argv)
        command = explicit["command"]
        print(f"moelora {command}: loading torch and transformers", file=sys.stderr, flush=True)
        with _without_collections():  # nothing of it is garbage: a fifth of the seconds that it takes
            module = import_module(f"moelora.commands.{command}")  # here, so that --help need not wait
        module.main({name: value for name, value in explicit.items() if name != "command"})
        sys.stdout.flush()
    except (MoeloraError, ImportError) as error:  # ImportError: a missing dependency, or operators not built
        if signals.ending() is not None:
            raise
        print(f"moelora: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        with suppress(OSError, AttributeError):  # else the interpreter complains at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signals.PIPE
    except OSError as error:
        if error.filename is None or signals.ending() is not None:
            raise
        print(f"moelora: error: cannot access {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if (told := memory(error)) is None:
            raise
        print(f"moelora: error: {told}", file=sys.stderr)
        return 2
    return 0


def _interrupted(explicit: dict, signal: str) -> str:
    from moelora.commands import checkpoint_options

    if explicit.get("command") in checkpoint_options.COMMANDS:
        return f"interrupted by {signal}: {checkpoint_options.GO_ON}"
    if explicit.get("command") != "finetune":
        return f"interrupted by {signal}"
    from pathlib import Path
    from shlex import quote

    from moelora.commands import directory, options

    out = explicit.get("output", options.DEFAULTS["output"])
    found = directory.look(Path(out)).checkpoint
    if found is None:
        return f"interrupted by {signal} before the first checkpoint"
    return (
        f"interrupted by {signal}: {found} is complete; go on with: "
        f"python -m moelora finetune --resume --output {quote(out)}"
    )


if __name__ == "__main__":
    sys.exit(main())
