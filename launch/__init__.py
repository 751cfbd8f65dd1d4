"""`python -m launch`: starts the ranks of a run through the DeepSpeed launcher, passes signals on, leaves no orphan behind."""
