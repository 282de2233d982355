"""`python -m moelora`."""

import os
import sys
from importlib import import_module

from moelora import MoeloraError
from moelora.commands import config, options


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns its exit status: 2 for what the user can mend, 130 when interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainer sends some where it may
    explicit: dict = {}
    command = None
    try:
        explicit = config.parse(argv)
        command = explicit.pop("command")
        print(f"moelora {command}: loading torch and transformers", file=sys.stderr, flush=True)
        # Seconds to import, which --help need not wait for.
        import_module(f"moelora.commands.{command}").main(explicit)
    except (MoeloraError, ImportError) as error:  # ImportError: a missing dependency, or operators not built
        print(f"moelora: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        told = _interrupted(explicit) if command == "finetune" else "interrupted"
        print(f"moelora: {told}", file=sys.stderr)
        return 130
    return 0


def _interrupted(explicit: dict) -> str:
    from pathlib import Path

    from moelora.commands.training import last_checkpoint

    out = explicit.get("output", options.DEFAULTS["output"])
    found = last_checkpoint(Path(out))
    if found is None:
        return "interrupted before the first checkpoint"
    return f"interrupted: {found} is complete; go on with: python -m moelora finetune --resume --output {out}"


if __name__ == "__main__":
    sys.exit(main())
