"""python -m fastbert, and torchrun ... -m fastbert."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
