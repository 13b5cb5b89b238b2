"""`python -m qv_lens`, the same as `qv-lens`."""

from qv_lens.cli import main

if __name__ == "__main__":
    main()
