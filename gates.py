"""Is a result good enough: `python gates.py GATES.yaml RESULT.json`."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.gates import main  # noqa: E402

if __name__ == "__main__":
    main()
