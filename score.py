"""Rewards of completions that exist: `python score.py input=… output=… teacher_model=… student_model=…`."""

from rlt.commands.score import main

if __name__ == "__main__":
    main()
