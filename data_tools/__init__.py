"""Tools that make and check data: `python -m data_tools synth | shard | verify`. Start at cli.py."""
