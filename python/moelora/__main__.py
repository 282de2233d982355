"""`python -m moelora`."""

import sys

from moelora import MoeloraError, options


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns its exit status: 2 for what the user can mend, 130 when interrupted."""
    explicit = vars(options.parser().parse_args(argv))
    command = explicit.pop("command")
    try:
        _COMMANDS[command](explicit)
    except (MoeloraError, ImportError) as error:  # ImportError: a missing dependency, or operators not built
        print(f"moelora: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        told = _interrupted(explicit) if command == "finetune" else "interrupted"
        print(f"moelora: {told}", file=sys.stderr)
        return 130
    return 0


def _finetune(explicit: dict) -> None:
    from moelora import finetune  # seconds to import, which --help need not wait for

    finetune.main(explicit)


def _inspect(explicit: dict) -> None:
    from moelora import inspection

    inspection.main(explicit)


def _models(explicit: dict) -> None:
    from moelora import survey

    print(survey.markdown(), end="")


_COMMANDS = {"finetune": _finetune, "inspect": _inspect, "models": _models}


def _interrupted(explicit: dict) -> str:
    from pathlib import Path

    from moelora.training import last_checkpoint

    out = explicit.get("output", options.DEFAULTS["output"])
    found = last_checkpoint(Path(out))
    if found is None:
        return "interrupted before the first checkpoint"
    return f"interrupted: {found} is complete; go on with: python -m moelora finetune --resume --output {out}"


if __name__ == "__main__":
    sys.exit(main())
