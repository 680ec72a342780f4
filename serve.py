"""The training API for clients elsewhere: `python serve.py [port=8000] [state_dir=...] [base_models=[...]]`."""

from rlt.commands.serve import main

if __name__ == "__main__":
    main()
