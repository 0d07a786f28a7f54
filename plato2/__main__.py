"""`python -m plato2 VERB` = `plato2 VERB`."""

import signal


def main() -> None:
    """The entry point of the `plato2` command."""
    heard = signal.getsignal(signal.SIGINT)
    if heard is signal.default_int_handler:  # while modules are imported, Ctrl-C ends at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from plato2.commands import main as run

    signal.signal(signal.SIGINT, heard)
    run()


if __name__ == "__main__":
    main()
