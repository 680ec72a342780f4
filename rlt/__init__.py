"""The library under the doors: import a room of it by name, such as `rlt.rewards` or `rlt.logprobs`."""
