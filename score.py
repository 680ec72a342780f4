"""Rewards of completions that exist: `python score.py input=… output=… teacher_model=… student_model=…`."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.score import main  # noqa: E402

if __name__ == "__main__":
    main()
