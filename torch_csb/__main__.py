"""`python -m torch_csb info | inspect … | convert … | bench …`"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys

from torch_csb._build_info import build_info
from torch_csb.cli import convert, inspect


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_csb")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, architectures, what was built and what is missing")
    for module in (inspect, convert):
        text = module.__doc__.splitlines()[0]
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser("bench", help="benchmarks, as python -m torch_csb.bench", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        if importlib.util.find_spec("torch_csb.bench") is None:
            parser.error("this installation has no torch_csb.bench")
        sys.argv = ["python -m torch_csb.bench", *rest]
        runpy.run_module("torch_csb.bench", run_name="__main__", alter_sys=True)
        return 0
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "info":
        print(build_info())
        return 0
    # A terminal without UTF-8 still gets its table.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
