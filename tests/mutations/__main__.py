"""`python -m tests.mutations`: the table of mutants, printed and written into docs/mutations.md."""

from tests.mutations.table import main

if __name__ == "__main__":
    raise SystemExit(main())
