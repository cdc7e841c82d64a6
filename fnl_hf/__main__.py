"""``python -m fnl_hf`` is the command ``fnl-hf``."""

from fnl_hf.commands.cli import main

if __name__ == "__main__":
    main()
