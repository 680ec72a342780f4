"""One HTML page of one or several runs: `python report.py OUTPUT_DIR... [--out=report.html]`."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.report import main  # noqa: E402

if __name__ == "__main__":
    main()
