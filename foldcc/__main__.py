"""`python -m foldcc` runs the demo."""

from foldcc.demo import main

if __name__ == "__main__":
    main()
