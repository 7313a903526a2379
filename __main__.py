"""Entry point of `python -m mmaudit`, the same as the command `mmaudit`."""

from .cli.main import main

main()
