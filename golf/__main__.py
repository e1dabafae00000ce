"""`python -m golf`: the same as the command `golf`."""
from golf.cli import main

main()
