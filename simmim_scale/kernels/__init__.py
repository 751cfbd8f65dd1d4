"""Ops with several implementations: `dispatch.py` chooses, one folder per op holds contract, reference and fast forms."""
