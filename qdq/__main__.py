"""`python -m qdq` is `qdq`."""

from qdq.cli.main import main

if __name__ == "__main__":
    main()
