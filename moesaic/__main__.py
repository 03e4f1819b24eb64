"""`python -m moesaic` is the same as `moesaic`."""

from moesaic.cli.main import main

main()
