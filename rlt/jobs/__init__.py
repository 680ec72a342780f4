"""What a plan can be: training, a collection, an evaluation, a preparation, a pipeline; each has `run(plan, stop)`."""

from importlib import import_module

from rlt.planning.plan import Plan

DEFAULT_LIMIT_S = 1800  # for ranks to meet, where the run has no ddp_timeout


def run_plan(plan: Plan) -> None:
    """Run a plan to its end, as one process or as one rank of several, and say what came of it.

    A run that is asked to stop exits with `PREEMPTED`, once it has saved; before its first step, at once. What is heavy
    is imported by then only.
    """
    from rlt.survival.stop_signals import StopOnSignal

    if not (plan.profile.stages or plan.profile.prepares):  # stages are processes of their own, tasks know no others
        from backends.roll_call import is_one_of_several, meet

        if is_one_of_several():
            meet(plan.config.get("ddp_timeout", DEFAULT_LIMIT_S))
    if plan.config["deterministic"]:
        from rlt.models.devices import be_deterministic

        be_deterministic()
    job = import_module(f"rlt.jobs.{plan.profile.job}")
    with StopOnSignal() as stop:
        job.run(plan, stop)
