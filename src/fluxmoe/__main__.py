"""`python -m fluxmoe`, the same as `fluxmoe`."""

from fluxmoe.experiments.commands.main import main

if __name__ == "__main__":
    main()
