"""A deterministic renderer of photograph-like pictures of textured objects, with classes, boxes and masks.

Reading order: scene.py (a picture) -> places.py, solids.py, patterns.py (what it is made of) -> dataset.py (files).
"""
