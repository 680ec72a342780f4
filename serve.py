"""The training API for clients elsewhere: `python serve.py [port=8000] [state_dir=...] [base_models=[...]]`."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.serve import main  # noqa: E402

if __name__ == "__main__":
    main()
