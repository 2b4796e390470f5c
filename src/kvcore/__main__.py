"""`python -m kvcore` is `kvcore`."""

from .cli import main

main()
