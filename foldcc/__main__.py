"""`python -m foldcc` runs the demo; `python -m foldcc kernels` compiles the kernels of a model without a GPU."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["kernels"]:
        from foldcc.codegen.aot import main as kernels

        sys.exit(kernels(sys.argv[2:]))
    from foldcc.demo import main

    main()
