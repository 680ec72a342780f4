"""A program of the Tinker SDK, run by an environment that has nothing but the SDK: `serving_client.py BASE_MODEL`.

It prints what it saw as JSON; the same program is run by each version.
"""

import json
import sys

import tinker
from tinker import types

BATCH = [[5, 6, 7], [1, 2], [9], [5, 5, 5, 5], [8, 3], [4], [2, 7]]  # in chunks of two, the client makes four requests


def datum(targets: list[int]) -> types.Datum:
    inputs = {"target_tokens": targets, "weights": [1.0] * len(targets)}
    return types.Datum(model_input=types.ModelInput.from_ints([1] * len(targets)), loss_fn_inputs=inputs)


def train(client, steps: int) -> list[float]:
    """Both requests of a step are on their way before the first is answered, as recipes do it."""
    losses = []
    for _ in range(steps):
        read = client.forward_backward([datum(each) for each in BATCH], "cross_entropy")
        step = client.optim_step(types.AdamParams(learning_rate=0.1))
        losses.append(read.result().metrics["loss:sum"])
        step.result()
    return losses


def own_loss(data: list, logprobs: list) -> tuple:
    """The cross entropy, as a user writes it: the client sends its gradients for the log-probs."""
    return -sum(each.sum() for each in logprobs), {"data:sum": float(len(data))}


def after_one_step(service, path: str, custom: bool) -> float:
    """The loss after a step on the batch."""
    client = service.create_training_client_from_state(path)
    data = [datum(each) for each in BATCH]
    if custom:
        client.forward_backward_custom(data, own_loss).result()
    else:
        client.forward_backward(data, "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.1)).result()
    return client.forward(data, "cross_entropy").result().metrics["loss:sum"]


def refused(call) -> str:
    try:
        call()
    except tinker.TinkerError as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        return f"ValueError: {error}"
    return "accepted"


def main(base_model: str) -> None:
    said = {"version": tinker.__version__}
    service = tinker.ServiceClient()
    said["models"] = [each.model_name for each in service.get_server_capabilities().supported_models]
    client = service.create_lora_training_client(base_model=base_model, rank=8, user_metadata={"note": "x"})
    said["losses"] = train(client, 3)
    said["rank"] = client.get_info().model_data.model_name
    said["forward"] = len(client.forward([datum(each) for each in BATCH], "cross_entropy").result().loss_fn_outputs)
    said["bad loss"] = refused(lambda: client.forward_backward([datum([1])], "ppo").result())
    path = client.save_state("state").result().path
    said["path"] = path.split("/", 3)[3]
    said["name taken"] = refused(lambda: client.save_state("state").result())
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    params = types.SamplingParams(max_tokens=6, seed=7, temperature=1.0, stop=[])
    sample = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    said["samples"] = [[each.stop_reason, list(each.tokens), len(each.logprobs)] for each in sample.sequences]
    said["prompt"] = sampler.compute_logprobs(prompt).result()
    best = sampler.sample(
        prompt, num_samples=1, sampling_params=params, include_prompt_logprobs=True, topk_prompt_logprobs=2
    ).result()
    said["best"] = [None if each is None else len(each) for each in best.topk_prompt_logprobs]
    said["long"] = refused(
        lambda: sampler.sample(prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=500)).result()
    )
    again = service.create_training_client_from_state_with_optimizer(path)
    said["next"] = [train(each, 1)[0] for each in (client, again)]
    said["after"] = [train(each, 1)[0] for each in (client, again)]
    said["custom"] = [after_one_step(service, path, custom) for custom in (False, True)]
    named = client.save_weights_for_sampler("named").result().path
    base = service.create_sampling_client(model_path=named)
    said["named"] = len(base.sample(prompt, num_samples=1, sampling_params=params).result().sequences)
    rest = service.create_rest_client()
    runs = rest.list_training_runs().result().training_runs
    run_id = path.removeprefix("tinker://").split("/")[0]
    said["run"] = [each.user_metadata for each in runs if each.training_run_id == run_id]
    saved = rest.list_checkpoints(run_id).result().checkpoints
    said["saved"] = sorted(each.checkpoint_id for each in saved)
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    rest.delete_checkpoint_from_tinker_path(named).result()
    said["left"] = [[each.checkpoint_id, each.public] for each in rest.list_checkpoints(run_id).result().checkpoints]
    gone = service.create_sampling_client  # the current version asks the server with the first sample
    said["gone"] = refused(lambda: gone(model_path=named).sample(prompt, 1, params).result())
    said["sessions"] = len(rest.list_sessions().result().sessions)
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
