"""`python -m lgl_plugin`, the same as the command `lgl`."""

from lgl_plugin.cli.main import main

if __name__ == "__main__":
    main()
