"""`python -m sparse_attn`."""

from sparse_attn.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
