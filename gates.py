"""Is a result good enough: `python gates.py GATES.yaml RESULT.json`."""

from rlt.commands.gates import main

if __name__ == "__main__":
    main()
