"""What a run does when memory, a device, a machine or a person fails it."""
