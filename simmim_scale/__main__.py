"""`python -m simmim_scale`: the `simmim` command, also the script that every rank runs."""

from simmim_scale.cli import main

if __name__ == "__main__":
    main()
