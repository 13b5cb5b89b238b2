"""`python -m qv_lens.cli`."""

from qv_lens.cli import main

if __name__ == "__main__":
    main()
