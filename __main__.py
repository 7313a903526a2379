"""`python -m mmaudit` is `mmaudit`."""

from .cli.main import main

main()
