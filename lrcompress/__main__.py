"""`python -m lrcompress`."""

from lrcompress.cli import main

main()
