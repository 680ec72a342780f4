"""Every public method of the SDK's clients, each called once against a server, run by an environment that has nothing
but the SDK: `sdk_table.py BASE_MODEL`. It prints what became of each call as JSON: "works", or what was said.

Methods come from the classes themselves; one that has no call below is reported as "not probed".
"""

import asyncio
import inspect
import json
import sys
import threading
from datetime import UTC, datetime

import tinker
from tinker import types
from tinker.lib.public_interfaces.rest_client import RestClient

LIMIT_S = 60
CLASSES = {
    "ServiceClient": tinker.ServiceClient,
    "TrainingClient": tinker.TrainingClient,
    "SamplingClient": tinker.SamplingClient,
    "RestClient": RestClient,
}
PROMPT = types.ModelInput.from_ints([1, 2, 3])
PARAMS = types.SamplingParams(max_tokens=2, seed=1)
SINCE, UNTIL = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)


def batch() -> list:
    inputs = {"target_tokens": [5, 6], "weights": [1.0, 1.0]}
    return [types.Datum(model_input=types.ModelInput.from_ints([1, 1]), loss_fn_inputs=inputs)]


def custom(data, logprobs):
    return -sum(each.sum() for each in logprobs), {}


class Story:
    """One session with a model, a sampler and saved weights; `call` calls a method of each."""

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model
        self.service = tinker.ServiceClient()
        self.training = self.service.create_lora_training_client(base_model=base_model, rank=8)
        self.training.forward_backward(batch(), "cross_entropy").result()
        self.training.optim_step(types.AdamParams()).result()
        self.path = self.training.save_state("state").result().path
        self.weights = self.training.save_weights_for_sampler("sampler").result().path
        external = getattr(self.training, "save_weights_external", None)
        self.external = external("external").result().path if external else ""
        self.sampling = self.training.save_weights_and_get_sampling_client()
        self.rest = self.service.create_rest_client()
        self.run_id = self.path.removeprefix("tinker://").split("/")[0]
        self.session_id = self.run_id.split(":")[0]
        self.saved = 0

    def name(self) -> str:
        self.saved += 1
        return f"n{self.saved}"

    def new_path(self) -> str:
        return self.training.save_state(self.name()).result().path

    def sampler_id(self) -> str:
        return self.rest.get_session(self.session_id).result().sampler_ids[-1]

    def calls(self) -> dict:
        """By class and method; those that end in _async are called as their plain ones are."""
        base, path, weights, run = self.base_model, self.path, self.weights, self.run_id
        adam = types.AdamParams(learning_rate=0.01)
        return {
            "ServiceClient": {
                "create_lora_training_client": lambda f: f(base_model=base, rank=8),
                "create_sampling_client": lambda f: f(base_model=base),
                "create_training_client_from_state": lambda f: f(path),
                "create_training_client_from_state_with_optimizer": lambda f: f(path),
                "copy_weights": lambda f: f(path),
                "create_custom_loss": lambda f: f(custom_of_datum, {"logprobs": 1, "weights": 1}),
                "close": lambda f: f("success"),
            },
            "TrainingClient": {
                "create_sampling_client": lambda f: f(weights),
                "forward": lambda f: f(batch(), "cross_entropy"),
                "forward_backward": lambda f: f(batch(), "cross_entropy"),
                "forward_backward_custom": lambda f: f(batch(), custom),
                "load_state": lambda f: f(path),
                "load_state_with_optimizer": lambda f: f(path),
                "optim_step": lambda f: f(adam),
                "save_state": lambda f: f(self.name()),
                "save_weights_for_sampler": lambda f: f(self.name()),
                "save_weights_external": lambda f: f(self.name()),
            },
            "SamplingClient": {
                "compute_logprobs": lambda f: f(PROMPT),
                "sample": lambda f: f(PROMPT, 1, PARAMS),
                "create": lambda f: f(self.service.holder, base_model=base),
                "from_sampler_handle": lambda f: f(self.sampling.get_sampler_handle()),
                "on_queue_state_change": lambda f: f(queue_state(), None),
            },
            "RestClient": {
                "assign_session_project": lambda f: f(self.session_id, "p"),
                "copy_weights": lambda f: f(path, "p"),
                "delete_checkpoint": lambda f: f(run, f"weights/{self.new_path().rsplit('/', 1)[1]}"),
                "delete_checkpoint_from_tinker_path": lambda f: f(self.new_path()),
                "export_session_trace": lambda f: f(self.session_id),
                "get_billing_usage": lambda f: f(SINCE, UNTIL),
                "get_checkpoint_archive_url": lambda f: f(run, weights.split("/", 3)[3]),
                "get_checkpoint_archive_url_from_tinker_path": lambda f: f(weights),
                "get_external_weights_urls": lambda f: f(self.external),
                "get_sampler": lambda f: f(self.sampler_id()),
                "get_session": lambda f: f(self.session_id),
                "get_training_run": lambda f: f(run),
                "get_training_run_by_tinker_path": lambda f: f(path),
                "get_weights_info_by_tinker_path": lambda f: f(path),
                "list_checkpoints": lambda f: f(run),
                "publish_checkpoint_from_tinker_path": lambda f: f(path),
                "search_sessions": lambda f: f(types.SessionSearchRequest()),
                "set_checkpoint_ttl_from_tinker_path": lambda f: f(path, None),
                "unpublish_checkpoint_from_tinker_path": lambda f: f(path),
            },
        }


def custom_of_datum(logprobs, weights):
    loss = -(logprobs * weights).sum()
    return loss, {"custom/loss:sum": loss}


def queue_state():
    from tinker.lib.api_future_impl import QueueState

    return QueueState.ACTIVE


def methods(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]


def outcome(work) -> str:
    """What one call came to, within the time limit."""
    said: list[str] = []

    def run() -> None:
        try:
            found = work()
            if inspect.isawaitable(found) and not hasattr(found, "result"):
                found = asyncio.run(awaited(found))
            if hasattr(found, "result"):
                found.result()
            said.append("works")
        except Exception as error:  # noqa: BLE001  (whatever it is, it is what the table says)
            said.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return said[0] if said else f"no answer within {LIMIT_S} s"


async def awaited(found):
    found = await found
    return await found if inspect.isawaitable(found) else found


def table(story: Story) -> dict[str, dict[str, str]]:
    objects = dict(zip(CLASSES, (story.service, story.training, story.sampling, story.rest), strict=True))
    calls, found = story.calls(), {}
    for name, kind in CLASSES.items():
        found[name] = {}
        for method in sorted(methods(kind), key=lambda each: (each == "close", each)):
            call = calls[name].get(method.removesuffix("_async"), lambda f: f())
            found[name][method] = outcome(partial(call, getattr(objects[name], method)))
        if "close" in found[name]:  # what comes after needs a session
            story = Story(story.base_model)
            calls = story.calls()
            objects = dict(zip(CLASSES, (story.service, story.training, story.sampling, story.rest), strict=True))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"version": tinker.__version__, "table": table(Story(sys.argv[1]))}))
