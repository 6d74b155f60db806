"""Checkpoints that cannot be lost: a leaf library that knows no model, no trainer and no configuration.

Import from the modules: `manager` writes (and needs torch), `reader` only looks (and needs none),
`policies` decide.
"""
