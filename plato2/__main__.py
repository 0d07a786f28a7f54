"""`python -m plato2 VERB` = `plato2 VERB`."""

from plato2.commands import main

if __name__ == "__main__":
    main()
