"""`python -m torch_csb.bench COMMAND …`"""

from __future__ import annotations

import argparse
import sys
import warnings

from torch_csb.bench import model, overhead, pack, plot, profile, prune, regimes, repeat, step, summary

TOOLS = (model, step, prune, profile, repeat, summary, plot, overhead, pack)


def main(arguments: list[str]) -> int:
    for message in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are implicitly disabled"):
        warnings.filterwarnings("ignore", message)
    parser = argparse.ArgumentParser(prog="python -m torch_csb.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, add_arguments, run in regimes.commands():
        _add(commands, name, text, add_arguments, run)
    for module in TOOLS:
        name = module.__name__.rpartition(".")[2]
        _add(commands, name, module.__doc__.splitlines()[0], module.add_arguments, module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


def _add(commands, name, text, add_arguments, run) -> None:
    command = commands.add_parser(name, help=text.replace("%", "%%"))
    add_arguments(command)
    command.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
