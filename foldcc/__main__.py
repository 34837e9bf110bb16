"""`python -m foldcc` runs the demo; with `kernels` it compiles a model's kernels without a GPU, with `tune` it times tiles."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["kernels"]:
        from foldcc.codegen.aot import main as kernels

        sys.exit(kernels(sys.argv[2:]))
    if sys.argv[1:2] == ["tune"]:
        from foldcc.codegen.tune import main as tune

        sys.exit(tune(sys.argv[2:]))
    from foldcc.demo import main

    main()
