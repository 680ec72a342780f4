"""Raw text and public formats to clean rows: `python prepare.py [RUN] [key=value ...]`; `--help` says more."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.prepare import main  # noqa: E402

if __name__ == "__main__":
    main()
