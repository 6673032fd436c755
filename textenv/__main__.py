"""`python -m textenv`."""

from textenv.cli import main

main()
