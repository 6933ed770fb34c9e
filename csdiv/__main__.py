"""``python -m csdiv``: the command, for launchers such as torchrun."""

from csdiv.cli import main

main()
