"""`python -m foldcc`: the commands; without one, the demo."""

import sys
from argparse import REMAINDER, ArgumentParser

COMMANDS = {
    "demo": "trains a small Mixtral on eight processes next to itself in one (the default)",
    "kernels": "compiles a model's kernels without a GPU",
    "coverage": "folds a small model of every causal language model type of Transformers",
    "tune": "times tiles on this GPU and writes their table",
}


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="python -m foldcc", description="A compiler for distributed transformers.")
    commands = parser.add_subparsers(dest="command", required=True, title="commands, each with a --help of its own")
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False).add_argument("rest", nargs=REMAINDER)
    own = arguments[:1] in (["-h"], ["--help"]) or (arguments and not arguments[0].startswith("-"))
    command, rest = (parser.parse_known_args(arguments[:1])[0].command, arguments[1:]) if own else ("demo", arguments)
    if command == "kernels":
        from foldcc.tools.aot import main as kernels

        return kernels(rest)
    if command == "coverage":
        from foldcc.tools.coverage import main as coverage

        return coverage(rest)
    if command == "tune":
        from foldcc.tools.tune import main as tune

        return tune(rest)
    from foldcc.tools.demo import main as demo

    demo(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
