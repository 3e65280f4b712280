"""`python -m whenwhere`."""

from .cli import main

main()
