"""One HTML page of one or several runs: `python report.py OUTPUT_DIR... [--out=report.html]`."""

from rlt.commands.report import main

if __name__ == "__main__":
    main()
