"""`python -m stethoscope`."""

from stethoscope.cli import main

main()
