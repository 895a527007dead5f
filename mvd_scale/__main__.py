"""`python -m mvd_scale`, which the `deepspeed` launcher starts on every rank."""

from mvd_scale.cli import main

if __name__ == "__main__":
    main()
