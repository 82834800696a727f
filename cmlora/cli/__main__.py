"""`python -m cmlora.cli`, and `accelerate launch -m cmlora.cli`."""

from cmlora.cli import main

main()
