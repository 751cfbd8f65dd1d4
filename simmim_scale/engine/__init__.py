"""Training over DeepSpeed: `runtime` knows the ranks, `engine` takes steps, `checkpoint` keeps run states.

Config sections and the plan's numbers come in; nothing here knows what is trained.
"""
